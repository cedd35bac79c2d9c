"""The stage of topics: it commits topics and the topic of every document, and stops on request."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bam_ray.adapters.embedders import embedder_of
from bam_ray.adapters.topics import Topics
from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.data import Corpus
from bam_ray.data.corpus_documents import CorpusDocuments
from bam_ray.errors import Interrupted
from bam_ray.settings import EmbedderName
from tests.support.stage_run import RecordingContext, make_artifacts, run_task, small_recipe, task_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("embedder", ["tfidf", "seed"])
def test_topics_are_committed_with_all_assignments(tmp_path: Path, embedder: EmbedderName) -> None:
    recipe = small_recipe(tmp_path, topics={"count": 3, "embedder": embedder, "min_documents": 3})
    store = open_store(recipe.store.uri)
    context = RecordingContext()
    make_artifacts(recipe, store, ("corpora", "seeds"))
    manifest = run_task(recipe, store, ArtifactKind.TOPICS, "topics", context)
    assert manifest.metrics["topics/held_out_accuracy"] == 1.0
    assert context.reports[-1].step == context.reports[-1].total_steps > 0
    folder = task_run(recipe, store, ArtifactKind.TOPICS, "topics").artifact.fetch()
    topics = Topics.load(folder)
    assert len(topics) == manifest.metrics["topics/count"] >= 2
    assert (folder / "topics.html").read_text().count("topic-000") >= len(topics)
    corpus = Corpus(task_run(recipe, store, ArtifactKind.CORPORA, "corpus").artifact.fetch())
    seed = task_run(recipe, store, ArtifactKind.SEEDS, "seed").artifact.fetch()
    loaded = embedder_of(topics.embedder, folder, seed)
    assignments = load_file(folder / "assignments.safetensors")
    for domain in corpus.domains:
        for part in ("train", "held_out"):
            documents = CorpusDocuments(corpus, domain, held_out=part == "held_out")
            vectors = loaded.embed(list(documents.texts(range(len(documents)))))
            assert torch.equal(assignments[f"{domain}/{part}"], topics.nearest(vectors).topics.int())
    sizes = torch.bincount(torch.cat([each for name, each in assignments.items() if name.endswith("/train")]))
    assert sizes.tolist() == [topic.documents for topic in topics.topics]


def test_an_interrupted_search_is_started_again(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, topics={"count": 3, "embedder": "tfidf", "min_documents": 3})
    store = open_store(recipe.store.uri)
    make_artifacts(recipe, store, ("corpora",))
    with pytest.raises(Interrupted, match="run the same command again"):
        run_task(recipe, store, ArtifactKind.TOPICS, "topics", RecordingContext(stop_at=0))
    assert task_run(recipe, store, ArtifactKind.TOPICS, "topics").artifact.manifest() is None
    assert run_task(recipe, store, ArtifactKind.TOPICS, "topics").kind == "topics"
