"""The corpus stage counts tokens, and mixtures weight their embeddings by the counts of the corpus."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data import Corpus
from bam_ray.errors import CheckpointError, Interrupted
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.settings import Recipe
from bam_ray.stages.token_counts import COUNTS, read_token_counts
from bam_ray.upcycling.routers.counts import row_weights
from tests.support.stage_run import RecordingContext, make_artifacts, run_task, small_recipe, task_run

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
MIXTURES: dict[str, Any] = {
    "btx": {"method": "btx", "embeddings": "counts"},
    "soup": {"method": "soup", "embeddings": "counts"},
    "plain": {"method": "btx"},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def artifact(recipe: Recipe, store: BlobStore, kind: ArtifactKind, name: str) -> Artifact:
    return Artifact(store, kind, find_task(task_graph(recipe), kind, name).id)


def embeddings(recipe: Recipe, store: BlobStore, kind: ArtifactKind, name: str) -> list[Tensor]:
    """Return the embedding and the output head, if it is not tied, of a model of the run."""
    reader = TensorReader(store, artifact(recipe, store, kind, name).prefix)
    return [reader.read(each).float() for each in EMBEDDINGS if each in reader.specs]


def without_counts(recipe: Recipe, store: BlobStore) -> None:
    """Publish the corpus of `recipe` as an earlier version would have: without the file of its counts."""
    run = task_run(recipe, store, ArtifactKind.CORPORA, "corpus")
    manifest = run.artifact.manifest()
    assert manifest is not None
    folder = run.artifact.fetch()
    run.artifact.set_aside(manifest, "for the test")
    (folder / COUNTS).unlink()
    assert COUNTS not in run.artifact.publish(folder, manifest, run.take_lease()).files


def test_the_corpus_contains_the_counts_of_each_domain(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    store = open_store(recipe.store.uri)
    context = RecordingContext()
    manifest = run_task(recipe, store, ArtifactKind.CORPORA, "corpus", context)
    assert COUNTS in manifest.files
    notes = [report.note for report in context.reports]
    assert notes[-3:] == ["counting the tokens of general", "counting the tokens of code", "uploading"]
    assert [report.step for report in context.reports] == list(range(len(notes)))
    assert context.reports[-1].step == context.reports[-1].total_steps
    folder = artifact(recipe, store, ArtifactKind.CORPORA, "corpus").fetch()
    corpus = Corpus(folder)
    counts = read_token_counts(folder, corpus.domains)
    for domain in ("general", "code"):
        rows = corpus.train(domain).flatten()
        assert counts[domain].tokens.tolist() == np.bincount(rows, minlength=300).tolist()
        assert counts[domain].pairs.sum() == (rows[:-1] != corpus.end_of_text_id).sum()


def test_damaged_or_missing_counts_are_one_error(tmp_path: Path) -> None:
    """Names of domains may contain dots and end like the name of a tensor."""
    path = tmp_path / COUNTS
    counts = {name: torch.tensor([token]) for token, name in enumerate(("a.b.tokens", "a.b.pairs", "tokens.tokens"))}
    save_file(counts, path)
    assert read_token_counts(tmp_path, ["a.b"])["a.b"].total == 0
    with pytest.raises(
        CheckpointError, match=r"counts.safetensors cannot be read \(.*tokens.pairs.*\): make the corpus"
    ):
        read_token_counts(tmp_path, ["a.b", "tokens"])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="make the corpus again"):
        read_token_counts(tmp_path, ["a.b"])


def test_counting_stops_when_it_is_asked_to(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    store = open_store(recipe.store.uri)
    context = RecordingContext(stop_at=5)  # the note before the first domain is counted
    with pytest.raises(Interrupted):
        run_task(recipe, store, ArtifactKind.CORPORA, "corpus", context)
    assert context.reports[-1].note == "counting the tokens of general"
    assert not artifact(recipe, store, ArtifactKind.CORPORA, "corpus").is_committed()


def test_mixtures_use_the_counts_with_and_without_the_file(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, upcycle={"mixtures": MIXTURES})
    store = open_store(recipe.store.uri)
    make_artifacts(recipe, store, ("corpora", "seeds", "branches", "upcycled"))
    folder = artifact(recipe, store, ArtifactKind.CORPORA, "corpus").fetch()
    counts = read_token_counts(folder, ["general", "code"])
    weights = row_weights([counts["general"], counts["code"]], 300)  # the seed's text is the general one
    assert (weights - 0.5).abs().max() > 0.4
    seed = embeddings(recipe, store, ArtifactKind.SEEDS, "seed")
    code = embeddings(recipe, store, ArtifactKind.BRANCHES, "code")
    expected = [weights[0, :, None] * one + weights[1, :, None] * other for one, other in zip(seed, code, strict=True)]
    made = {name: embeddings(recipe, store, ArtifactKind.UPCYCLED, name) for name in MIXTURES}
    for name in ("btx", "soup"):
        torch.testing.assert_close(made[name], expected)
    torch.testing.assert_close(made["plain"], [(one + other) / 2 for one, other in zip(seed, code, strict=True)])

    without_counts(recipe, store)
    other = small_recipe(tmp_path, upcycle={"mixtures": {"again": MIXTURES["btx"]}})
    make_artifacts(other, store, ("upcycled",))
    assert all(map(torch.equal, embeddings(other, store, ArtifactKind.UPCYCLED, "again"), made["btx"]))
    made_of = json.loads(artifact(other, store, ArtifactKind.UPCYCLED, "again").read_file("lineage.json"))
    assert made_of["tensors"][EMBEDDINGS[0]]["token_counts"] == [counts["general"].total, counts["code"].total]


def test_embeddings_are_part_of_the_identity_of_a_mixture(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, upcycle={"mixtures": MIXTURES})
    tasks = [find_task(task_graph(recipe), ArtifactKind.UPCYCLED, name) for name in ("btx", "plain")]
    assert len({task.id.rpartition("-")[2] for task in tasks}) == 2
