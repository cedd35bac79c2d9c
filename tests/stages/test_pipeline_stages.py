"""All stages in one process, without a cluster: each makes its artifact from those of earlier stages."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.data import Corpus
from bam_ray.errors import CheckpointError, FamilyError, Interrupted
from bam_ray.evaluation.perplexity import perplexity
from bam_ray.pipeline.graph import find_task, task_graph
from tests.support.stage_run import (
    TRAINING,
    RecordingContext,
    make_artifacts,
    run_task,
    small_recipe,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def test_every_stage_makes_its_artifact(tmp_path: Path) -> None:
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled", "mixtures", "reports"))
    manifests = {}
    for task in task_graph(run):
        manifest = Artifact(store, task.kind, task.id).manifest()
        assert manifest is not None
        assert (manifest.id, manifest.kind, manifest.name) == (task.id, task.kind, task.name)
        manifests[task.kind, task.name] = manifest
    branch = manifests["branches", "code"]
    assert branch.parents == (manifests["seeds", "seed"].id, manifests["corpora", "corpus"].id)
    assert branch.tokens == 1280
    assert branch.facts["sequences_drawn"]["code"] > branch.facts["sequences_drawn"]["general"]
    assert branch.compute.flops > 0
    assert manifests["mixtures", "bam"].compute.flops > manifests["mixtures", "btx"].compute.flops
    assert not [key for key in store.list() if "/steps/" in key], "training checkpoints are deleted at the end"

    folder = Artifact(store, "mixtures", manifests["mixtures", "bam"].id).fetch()
    assert AutoModelForCausalLM.from_pretrained(folder).config.expert_names == ["seed", "code"]
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "lineage.json", "curve.json", "config.json", "modeling_bam.py"} <= names
    assert not {"optimizer.safetensors", "trainer.json"} & names


def test_a_model_soup_is_averaged_trained_and_evaluated(tmp_path: Path) -> None:
    run = small_recipe(tmp_path, upcycle={"mixtures": {"soup": {"method": "soup"}}})
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled", "mixtures", "reports"))
    tasks = task_graph(run)

    def weights(kind: ArtifactKind, name: str) -> dict[str, torch.Tensor]:
        folder = Artifact(store, kind, find_task(tasks, kind, name).id).fetch()
        return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())

    seed, code = weights(ArtifactKind.SEEDS, "seed"), weights(ArtifactKind.BRANCHES, "code")
    average, trained = weights(ArtifactKind.UPCYCLED, "soup"), weights(ArtifactKind.MIXTURES, "soup")
    assert average.keys() == trained.keys() == seed.keys()
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, (seed[name] + code[name]) / 2)
    assert any(not torch.equal(average[name], trained[name]) for name in average)
    report = Artifact(store, ArtifactKind.REPORTS, find_task(tasks, ArtifactKind.REPORTS, "report").id).fetch()
    models = json.loads((report / "results.json").read_text())["models"]
    assert [(model["kind"], model["name"]) for model in models] == [
        ("seeds", "seed"),
        ("branches", "code"),
        ("mixtures", "soup"),
        ("ensembles", "posterior"),
        ("ensembles", "uniform"),
    ]


def test_a_control_is_the_seed_trained_on_the_blend_of_mixing(tmp_path: Path) -> None:
    compare = {"dense": [1, 0.5], "peak_lr": 0.01, "prior": ["tables", "vectors"]}
    run = small_recipe(tmp_path, compare=compare)
    store = open_store(run.store.uri)
    made = ("corpora", "seeds", "branches", "controls", "upcycled", "mixtures", "reports")
    make_artifacts(run, store, made)
    manifests = {(task.kind, task.name): Artifact(store, task.kind, task.id).manifest() for task in task_graph(run)}
    dense, half, mixture = (
        manifests[key] for key in [("controls", "dense"), ("controls", "dense-0.5x"), ("mixtures", "bam")]
    )
    branch, report = manifests["branches", "code"], manifests["reports", "report"]
    assert dense is not None and half is not None and mixture is not None and branch is not None and report is not None
    assert dense.tokens == 2 * half.tokens == branch.tokens + mixture.tokens
    assert dense.settings["blend"] == {"general": 1.0, "code": 1.0}
    assert dense.settings["training"]["peak_lr"] == 0.01
    assert dense.metrics["loss/nll"] < half.metrics["loss/nll"]
    models = json.loads((Artifact(store, "reports", report.id).fetch() / "results.json").read_text())["models"]
    tokens = {model["name"]: model["lineage_tokens"] for model in models if model["kind"] != "branches"}
    with_prior = ["dense-prior-tables", "dense-prior-vectors"]
    assert list(tokens) == ["seed", "dense", "dense-0.5x", *with_prior, "bam", "btx", "posterior", "uniform"]
    assert tokens["dense"] == tokens["bam"] == tokens[with_prior[0]] == tokens[with_prior[1]]
    scores = {model["name"]: model for model in models}
    layers = scores["dense"]["parameters"] - 300 * 16  # the rest is the table of 300 tokens of width 16
    assert scores[with_prior[0]]["parameters"] == layers + 2 * 300 * 16 + 2 * 2 * 16  # two tables, two routers
    assert scores[with_prior[1]]["parameters"] == scores["dense"]["parameters"] + 2 * (2 * 16 + 300)
    for name in with_prior:
        assert scores[name]["active_parameters"] == scores[name]["parameters"]
        assert scores[name]["experts"] == 1 and scores[name]["routing"] is None
        assert scores[name]["flops"] > scores["dense"]["flops"]
        assert scores[name]["domains"]["general"]["nll"] != scores["dense"]["domains"]["general"]["nll"]
    assert [claim for claim in report.facts["findings"] if "dense control" in claim] == [
        f"mixture {name} beats the dense control in mean perplexity" for name in ("bam", "btx")
    ]


def test_a_mixture_of_the_seed_alone_trains_on_all_tokens(tmp_path: Path) -> None:
    mixtures = {"bam": {"method": "bam"}, "sparse": {"method": "sparse", "num_experts": 2}}
    mix = {"training": TRAINING, "without_branches": "all_tokens"}
    run = small_recipe(tmp_path, upcycle={"mixtures": mixtures}, mix=mix)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled", "mixtures", "reports"))
    report = find_task(task_graph(run), "reports", "report")
    results = json.loads((Artifact(store, "reports", report.id).fetch() / "results.json").read_text())
    scores = {model["name"]: model for model in results["models"] if model["kind"] == "mixtures"}
    assert (scores["bam"]["tokens"], scores["sparse"]["tokens"]) == (1280, 2560)
    assert scores["bam"]["lineage_tokens"] == scores["sparse"]["lineage_tokens"] == 3840


def test_a_committed_artifact_is_not_made_again(tmp_path: Path) -> None:
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora",))
    context = RecordingContext()
    manifest = run_task(run, store, "corpora", "corpus", context)
    assert manifest.id == task_graph(run)[0].id
    assert not context.reports


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("branches", "code"),
        ("controls", "dense-0.5x"),
        ("controls", "dense-prior-tables"),
        ("controls", "dense-prior-vectors"),
    ],
)
def test_a_stopped_model_resumes_to_the_same_weights(tmp_path: Path, kind: str, name: str) -> None:
    run = small_recipe(tmp_path, compare={"dense": [0.5], "prior": ["tables", "vectors"]})
    weights = []
    for number, stop_at in enumerate((None, 6)):
        store = open_store(str(tmp_path / f"store-{number}"))
        make_artifacts(run, store, ("corpora", "seeds"))
        if stop_at is not None:
            with pytest.raises(Interrupted, match=r"step 6 of (10|20)"):
                run_task(run, store, kind, name, RecordingContext(stop_at))
        context = RecordingContext()
        manifest = run_task(run, store, kind, name, context)
        assert context.reports[0].step == (1 if stop_at is None else 7)
        weights.append((Artifact(store, kind, manifest.id).fetch() / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_dynamic_blend_resumes_exactly(tmp_path: Path) -> None:
    mix = {"training": TRAINING, "dynamic_blend": {"every": 3, "sequences": 8}}
    run = small_recipe(tmp_path, mix=mix)
    curves = []
    for number, stop_at in enumerate((None, 7)):
        store = open_store(str(tmp_path / f"store-{number}"))
        make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))
        if stop_at is not None:
            with pytest.raises(Interrupted, match="step 7 of 10"):
                run_task(run, store, "mixtures", "bam", RecordingContext(stop_at))
        manifest = run_task(run, store, "mixtures", "bam")
        assert manifest is not None
        curves.append([point["nll"] for point in manifest_curve(store, manifest.id)])
        if stop_at is None:
            log = store.get(f"mixtures/{manifest.id}/events/0001.0001.jsonl").decode().splitlines()
            moves = [event for event in map(json.loads, log) if event["event"] == "blend"]
            assert [move["step"] for move in moves] == [3, 6, 9]
            weights = {"code": 0.5, "general": 0.5}
            for move in moves:
                behind = {each: max(0.0, move["held_out"][each] - move["reference"][each]) for each in weights}
                grown = {each: weight * math.exp(behind[each]) for each, weight in weights.items()}
                weights = {each: weight / sum(grown.values()) for each, weight in grown.items()}
                assert move["weights"] == pytest.approx(weights)
            assert weights["code"] != pytest.approx(0.5, abs=1e-3)
            branch = Artifact(store, "branches", find_task(task_graph(run), "branches", "code").id).fetch()
            corpus = Corpus(Artifact(store, "corpora", task_graph(run)[0].id).fetch())
            rows = corpus.held_out("code")
            rows = rows[[number * len(rows) // 8 for number in range(8)]]
            nll = perplexity(AutoModelForCausalLM.from_pretrained(branch), rows, 4).nll
            assert moves[0]["reference"]["code"] == pytest.approx(nll)
    assert curves[0] == curves[1]


def manifest_curve(store: BlobStore, id: str) -> list[dict[str, float]]:
    points: list[dict[str, float]] = json.loads(Artifact(store, "mixtures", id).read_file("curve.json"))
    return points


def test_a_stage_names_the_parent_that_is_missing(tmp_path: Path) -> None:
    run = small_recipe(tmp_path)
    with pytest.raises(CheckpointError, match=r"corpora/corpus-.* is not committed"):
        run_task(run, open_store(run.store.uri), "seeds", "seed")


def test_a_seed_can_be_imported_from_a_folder(tmp_path: Path) -> None:
    first = small_recipe(tmp_path)
    store = open_store(first.store.uri)
    make_artifacts(first, store, ("corpora", "seeds"))
    made = Artifact(store, "seeds", task_graph(first)[1].id).fetch()

    data = first.data.model_dump() | {"tokenizer": {"folder": str(made)}}
    second = small_recipe(tmp_path, data=data, seed={"folder": str(made)})
    make_artifacts(second, store, ("corpora", "seeds", "branches"))
    imported = Artifact(store, "seeds", task_graph(second)[1].id).fetch()
    assert (imported / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()

    config = json.loads((made / "config.json").read_text())
    for key, value, error, message in (
        ("model_type", "gpt2", FamilyError, "has architecture 'gpt2'"),
        ("vocab_size", 10, FamilyError, r"has shape \[300, 16\], but config.json describes \[10, 16\]"),
    ):
        other = tmp_path / key
        other.mkdir()
        for path in made.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        (other / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(error, match=message):
            make_artifacts(small_recipe(tmp_path, data=data, seed={"folder": str(other)}), store, ("seeds",))


def test_losses_fall(tmp_path: Path) -> None:
    """Ten steps on words of six letters lower the loss."""
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds"))
    curve = json.loads((Artifact(store, "seeds", task_graph(run)[1].id).fetch() / "curve.json").read_text())
    assert curve[0]["nll"] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.3)
    assert curve[-1]["nll"] < curve[0]["nll"] - 0.5
