"""The evaluate stage on a folder store with a complete tiny run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from transformers import PreTrainedModel

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, ComputeCost, Manifest
from bam_ray.data import Corpus
from bam_ray.errors import CheckpointError, Interrupted
from bam_ray.evaluation.ensemble import ensemble_nll
from bam_ray.evaluation.perplexity import perplexity
from bam_ray.evaluation.results import Results
from bam_ray.evaluation.table import format_perplexity
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.settings import Recipe
from bam_ray.stages.evaluate import ancestors, evaluate, held_out_rows
from bam_ray.stages.run import run_stage
from tests.support.stage_run import task_run
from tests.support.tiny import SIZES, dense

LENGTH = 16
END, END_OF_DOCUMENT = 1, 6  # the end-of-text token and its place in every row
DOMAINS = ("general", "code")
MIXTURES = {"bam": "kv_experts", "btx": "averaged"}


class Listener:
    """A context that records progress, and requests a stop once it receives the note `stop_at`."""

    node = "here"

    def __init__(self, stop_at: str | None = None) -> None:
        self.received: list[Progress] = []
        self.stop_at = stop_at

    def report(self, progress: Progress) -> None:
        self.received.append(progress)

    def should_stop(self) -> bool:
        return any(progress.note == self.stop_at for progress in self.received)


def make_recipe(store: Path, batch_sequences: int = 4, dtype: str = "auto") -> Recipe:
    training = {"tokens": 640, "batch_tokens": 64, "peak_lr": 1e-3}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "store": {"uri": str(store)},
            "data": {"domains": {name: {"source": "unused"} for name in DOMAINS}, "sequence_length": LENGTH},
            "seed": {"scratch": {}, "training": training},
            "branch": {"domains": ["code"], "training": training},
            "upcycle": {"mixtures": {"bam": {"method": "bam"}, "btx": {"method": "btx"}}},
            "mix": {"training": training},
            "evaluate": {"tokens_per_domain": 10 * LENGTH, "batch_sequences": batch_sequences, "dtype": dtype},
        }
    )


def write_corpus(folder: Path, attend_across_documents: bool) -> None:
    rng = np.random.default_rng(0)
    facts = {
        "sequence_length": LENGTH,
        "vocab_size": 96,
        "end_of_text_id": END,
        "dtype": "<u2",
        "attend_across_documents": attend_across_documents,
    }
    (folder / "corpus.json").write_text(
        json.dumps({**facts, "domains": {name: {"held_out_tokens": 30 * LENGTH, "leak": 0.0} for name in DOMAINS}})
    )
    for name in DOMAINS:
        (folder / name).mkdir(parents=True)
        rows = rng.integers(2, 96, size=(30, LENGTH)).astype("<u2")
        rows[:, END_OF_DOCUMENT] = END
        rows.tofile(folder / name / "held_out.bin")


def tiny_model(task: Task) -> PreTrainedModel:
    if task.kind not in ("upcycled", "mixtures"):
        return dense("cohere", seed=4 if task.kind == "branches" else 5)
    torch.manual_seed(0 if task.kind == "mixtures" else 1)
    attention = MIXTURES[task.name]
    config = BamConfig(**SIZES, num_experts=2, attention_experts=attention, expert_names=["seed", "code"])
    return BamForCausalLM(config)


def evaluations(store: BlobStore) -> list[str]:
    """Return the keys of the manifests of all evaluations."""
    return [key for key in store.list("evaluations/") if key.endswith("manifest.json")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[Recipe, BlobStore]:
    """Return a recipe, and a store in which everything but the report is committed.

    The parameter says whether documents attend to each other; they do by default.
    """
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    recipe = make_recipe(tmp_path / "store")
    store = open_store(recipe.store.uri)
    for task in task_graph(recipe):
        if task.kind == "reports":
            continue
        folder = tmp_path / "made" / task.id
        folder.mkdir(parents=True)
        trained = task.kind in ("seeds", "branches", "mixtures")
        if task.kind == "corpora":
            write_corpus(folder, getattr(request, "param", True))
        else:
            tiny_model(task).save_pretrained(folder)
        if trained:
            (folder / "curve.json").write_text(json.dumps([{"step": step, "nll": 5.0 - step} for step in range(3)]))
        Artifact(store, task.kind, task.id).publish(
            folder,
            Manifest(
                id=task.id,
                kind=task.kind,
                name=task.name,
                parents=task.parents,
                step=10 * trained,
                tokens=640 if trained else 10**6,
                compute=ComputeCost(flops=1e6 * trained, device_seconds=3.0 * trained),
                facts={"computed_on": [{"step": 0, "processes": 1}, {"step": 5, "processes": 2}]} if trained else {},
            ),
        )
    return recipe, store


def test_every_model_is_scored_on_every_domain(run: tuple[Recipe, BlobStore]) -> None:
    recipe, store = run
    listener = Listener()
    manifest = evaluate(task_run(recipe, store, "reports", "report", listener))
    graph = task_graph(recipe)
    assert manifest == Artifact(store, "reports", find_task(graph, ArtifactKind.REPORTS, "report").id).manifest()
    assert set(manifest.files) == {"report.html", "results.json"}
    assert manifest.attempt == "0001.0001"

    folder = Artifact(store, "reports", manifest.id).fetch()
    results = Results.model_validate_json((folder / "results.json").read_bytes())
    assert [model.label for model in results.models] == [
        "seed",
        "branch code",
        "mixture bam",
        "mixture btx",
        "ensemble posterior",
        "ensemble uniform",
    ]
    seed, code, bam, btx, posterior, _ = results.models
    assert (bam.attention_experts, btx.attention_experts, seed.attention_experts) == ("kv_experts", "averaged", None)
    assert bam.routing is not None and len(bam.routing.domains["code"].layers) == 2
    assert seed.routing is None
    # A corpus has no training tokens. The lineage of a mixture has those of the seed, the branch and itself. That
    # of an ensemble has those of the seed and the branch, each once
    assert [model.lineage_tokens for model in results.models] == [640, 1280, 1920, 1920, 1280, 1280]
    assert (bam.tokens, bam.flops, bam.lineage_flops) == (640, 1e6, 3e6)
    assert (posterior.tokens, posterior.flops, posterior.lineage_flops) == (0, 0.0, 2e6)
    assert (bam.steps, bam.worker_seconds, bam.processes, bam.branches) == (10, 3.0, 2, ("code",))
    assert (code.branches, posterior.branches) == ((), ("code",))
    assert code.serving is not None and bam.serving is not None and posterior.serving is not None
    assert code.serving.cache_bytes == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, fp32
    assert bam.serving.cache_bytes == posterior.serving.cache_bytes == 2 * code.serving.cache_bytes
    assert posterior.serving.flops == 2 * code.serving.flops > bam.serving.flops > code.serving.flops
    assert bam.serving.parameters == bam.active_parameters
    assert posterior.parameters == posterior.active_parameters == seed.parameters + code.parameters
    assert bam.active_parameters < bam.parameters

    corpus = Artifact(store, "corpora", graph[0].id).fetch()
    rows = np.fromfile(corpus / "code" / "held_out.bin", dtype="<u2").reshape(-1, LENGTH)
    again = perplexity(dense("cohere", seed=4), rows[::3], batch_sequences=10)
    assert code.domains["code"].perplexity == pytest.approx(again.perplexity, rel=1e-5)
    assert code.domains["code"].tokens == 10 * (LENGTH - 1)

    html = (folder / "report.html").read_text()
    assert "mixture bam" in html and format_perplexity(bam.perplexity("code")) in html
    assert ">Training<" in html
    assert manifest.facts["findings"].keys() == {finding.claim for finding in results.findings}
    assert manifest.metrics["perplexity/mean/seed"] == results.means[seed.id]
    assert manifest.metrics["perplexity/mean/ensemble posterior"] == results.means[posterior.id]
    assert ">ensemble uniform</td>" in html and "The ensembles average" in html
    assert "mixture bam beats ensemble posterior in mean perplexity" in manifest.facts["findings"]
    assert listener.received[0] == Progress(step=0, total_steps=4, note="seed on general")
    assert listener.received[-1] == Progress(step=4, total_steps=4, note="writing the report")

    silent = Listener()
    assert run_stage(task_run(recipe, store, ArtifactKind.REPORTS, "report", silent)) == manifest
    assert silent.received == [], "a finished report is not computed again"


@pytest.mark.parametrize("run", [True, False], indirect=True)
def test_ensembles_follow_from_the_stored_token_nlls(
    run: tuple[Recipe, BlobStore], request: pytest.FixtureRequest
) -> None:
    recipe, store = run
    report = evaluate(task_run(recipe, store, "reports", "report"))
    results = Results.model_validate_json(Artifact(store, "reports", report.id).read_file("results.json"))
    evaluations = [Artifact(store, "evaluations", id) for id in report.facts["evaluations"]]
    stored = [load(evaluation.read_file("token_nll.safetensors")) for evaluation in evaluations]
    for model, nll in zip(results.models[:4], stored, strict=True):
        assert {domain: (each.dtype, each.shape) for domain, each in nll.items()} == dict.fromkeys(
            DOMAINS, (np.float32, (10, LENGTH - 1))
        )
        for domain, each in nll.items():
            assert model.domains[domain].sequence_nll == pytest.approx(each.mean(axis=1, dtype=float), rel=1e-14)

    starts = np.zeros((10, LENGTH - 1), dtype=bool)
    starts[:, END_OF_DOCUMENT] = not request.node.callspec.params["run"]  # the prediction after the end-of-text token
    for weights, model in zip(("posterior", "uniform"), results.models[4:], strict=True):
        for domain in DOMAINS:
            members = np.stack([nll[domain] for nll in stored[:2]])
            expected = ensemble_nll(members, starts, weights).mean(axis=1)
            assert model.domains[domain].sequence_nll == pytest.approx(expected, rel=1e-12)
            assert model.domains[domain].tokens == 10 * (LENGTH - 1)


def test_an_interrupted_evaluation_resumes(run: tuple[Recipe, BlobStore]) -> None:
    recipe, store = run
    with pytest.raises(Interrupted, match="model 3 of 4"):
        evaluate(task_run(recipe, store, "reports", "report", Listener(stop_at="mixture bam on code")))
    report = find_task(task_graph(recipe), "reports", "report")
    assert Artifact(store, "reports", report.id).manifest() is None
    assert len(evaluations(store)) == 2

    other_batch = make_recipe(Path(recipe.store.uri), batch_sequences=3)  # not a part of the identity of an evaluation
    listener = Listener(stop_at="mixture btx on general")
    with pytest.raises(Interrupted, match="model 4 of 4"):
        evaluate(task_run(other_batch, store, ArtifactKind.REPORTS, "report", listener))
    notes = [progress.note for progress in listener.received]
    assert notes[0] == "mixture bam on general", "the seed and the branch were not evaluated again"


def test_oracle_routing_uses_the_expert_of_each_domain(run: tuple[Recipe, BlobStore]) -> None:
    """The oracle scores are those of a model whose routers always choose the domain's expert."""
    recipe, store = run
    listener = Listener()
    report = evaluate(task_run(recipe, store, "reports", "report", listener))
    results = Results.model_validate_json(Artifact(store, "reports", report.id).read_file("results.json"))
    bam = next(model for model in results.models if model.label == "mixture bam")
    assert {domain: each.expert for domain, each in bam.oracle.items()} == {"general": "seed", "code": "code"}
    rows = Corpus(task_run(recipe, store, "reports", "report").parent("corpora", "corpus").fetch()).held_out("code")
    for kind, score in (("upcycled", bam.oracle["code"].unmixed), ("mixtures", bam.oracle["code"].mixed)):
        model = tiny_model(find_task(task_graph(recipe), ArtifactKind(kind), "bam"))
        for name, module in model.named_modules():
            if name.endswith(".gate"):
                module.register_forward_hook(lambda _, __, logits: 1e4 * torch.tensor([0.0, 1.0]).expand_as(logits))
        assert score.nll == pytest.approx(perplexity(model, held_out_rows(rows, 10 * LENGTH), 10).nll, rel=1e-6)
    assert bam.oracle["code"].mixed.nll != pytest.approx(bam.domains["code"].nll, rel=1e-4)
    assert len(evaluations(store)) == 4 + 2 * 2, "oracle scores are committed, before and after mixing"
    notes = {progress.note for progress in listener.received}
    assert "oracle routing of mixture btx before mixing on code" in notes


def test_the_parts_of_the_gap_sum_to_the_gap(run: tuple[Recipe, BlobStore]) -> None:
    recipe, store = run
    report = evaluate(task_run(recipe, store, "reports", "report"))
    results = Results.model_validate_json(Artifact(store, "reports", report.id).read_file("results.json"))
    nll = {model.label: {domain: each.nll for domain, each in model.domains.items()} for model in results.models}
    pairs = [(each.model, each.domain, each.specialist) for each in results.gap_parts]
    specialists = {"general": "seed", "code": "branch code"}
    assert pairs == [(f"mixture {name}", domain, specialists[domain]) for name in MIXTURES for domain in DOMAINS]
    for each in results.gap_parts:
        gap = nll[each.model][each.domain] - nll[each.specialist][each.domain]
        assert each.averaging + each.drift + each.routing == pytest.approx(gap, abs=1e-12)
        assert each.total == pytest.approx(gap, abs=1e-12)
        assert min(abs(each.averaging), abs(each.drift), abs(each.routing)) > 1e-6, "the random models all differ"
    html = Artifact(store, "reports", report.id).read_file("report.html").decode()
    assert "Gap to the specialists" in html and f"{results.gap_parts[0].drift:+.4f}" in html


def test_models_are_evaluated_in_the_dtype_of_the_recipe(run: tuple[Recipe, BlobStore]) -> None:
    recipe, store = run
    means = []
    for dtype in ("auto", "bf16"):
        manifest = evaluate(task_run(make_recipe(Path(recipe.store.uri), dtype=dtype), store, "reports", "report"))
        means.append([value for name, value in sorted(manifest.metrics.items())])
    assert means[1] == pytest.approx(means[0], rel=0.01)
    assert all(fp32 != bf16 for fp32, bf16 in zip(*means, strict=True))


def test_a_missing_model_is_named(run: tuple[Recipe, BlobStore]) -> None:
    recipe, store = run
    task = find_task(task_graph(recipe), "mixtures", "btx")
    store.delete(f"mixtures/{task.id}/manifest.json")
    with pytest.raises(CheckpointError, match=f"{task.id} is not committed"):
        evaluate(task_run(recipe, store, "reports", "report", Listener()))
    assert list(store.list("evaluations/")) == []


def test_held_out_rows_are_spread_evenly() -> None:
    rows = np.arange(30).repeat(4).reshape(30, 4)
    assert held_out_rows(rows, 12)[:, 0].tolist() == [0, 10, 20]
    assert held_out_rows(rows, 3)[:, 0].tolist() == [0]
    assert held_out_rows(rows, 10**9).tolist() == rows.tolist()


def test_ancestors_are_listed_once(tmp_path: Path) -> None:
    graph = task_graph(make_recipe(tmp_path))
    mixture = find_task(graph, ArtifactKind.MIXTURES, "bam")
    made = {task.id: Manifest(id=task.id, kind=task.kind, name=task.name, parents=task.parents) for task in graph}
    found = ancestors(mixture.id, made)
    kinds = {task.id: task.kind for task in graph}
    assert found[0] == mixture.id
    assert sorted(kinds[id] for id in found) == ["branches", "corpora", "mixtures", "seeds", "upcycled"]
