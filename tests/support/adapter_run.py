"""A tiny run with topics and adapters, whose topics are assigned by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.data import Corpus
from bam_ray.data.corpus_documents import CorpusDocuments
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Recipe
from tests.support.stage_run import make_artifacts, small_recipe

TOPICS = 5
ADAPTERS: dict[str, Any] = {
    "rank": 4,
    "alpha": 8,
    "tasks": 2,
    "training": {"tokens": 768, "batch_tokens": 128, "peak_lr": 0.02, "micro_batch_sequences": 4},
}


def adapter_recipe(folder: Path, **adapters: Any) -> Recipe:
    """Return a recipe with five topics and the adapters of `ADAPTERS`, updated with `adapters`."""
    return small_recipe(folder, topics={"count": TOPICS}, adapters={**ADAPTERS, **adapters})


def write_topics(recipe: Recipe, store: BlobStore, folder: Path) -> Manifest:
    """Commit topics for a corpus that exists: document n belongs to topic n mod 5, and every seventh to none."""
    run = PipelineRun.of(recipe, store)
    corpus = Corpus(run.artifact(ArtifactKind.CORPORA, "corpus").fetch())
    tensors = {}
    for domain in corpus.domains:
        for part in ("train", "held_out"):
            documents = np.arange(len(CorpusDocuments(corpus, domain, held_out=part == "held_out")))
            topics = np.where(documents % 7 == 6, -1, documents % TOPICS)
            tensors[f"{domain}/{part}"] = topics.astype(np.int32)
    folder.mkdir()
    save_file(tensors, folder / "assignments.safetensors")
    names = [{"name": f"topic-{number:04d}"} for number in range(TOPICS)]
    (folder / "topics.json").write_text(json.dumps({"topics": names}))
    task = run.task(ArtifactKind.TOPICS, "topics")
    artifact = run.artifact(ArtifactKind.TOPICS, "topics")
    return artifact.publish(folder, Manifest(id=task.id, kind=task.kind, name=task.name, parents=task.parents))


def make_parents(recipe: Recipe, store: BlobStore, folder: Path) -> None:
    """Make the corpus, the seed and the topics of `recipe`; `folder` must not exist."""
    make_artifacts(recipe, store, ("corpora", "seeds"))
    write_topics(recipe, store, folder)
