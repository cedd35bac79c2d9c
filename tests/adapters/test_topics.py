"""Topics are stored, and the nearest one is chosen by the product with all prototypes."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bam_ray.adapters.embedders import EmbedderIdentity
from bam_ray.adapters.topics import PROTOTYPES_FILE, TOPICS_FILE, Topic, Topics
from bam_ray.errors import CheckpointError

IDENTITY = EmbedderIdentity("minilm", "0" * 64, 8, 64)


def some_topics(owners: list[int], threshold: float = 0.0) -> Topics:
    """Return topics with random prototypes, of which `owners` are the topics."""
    prototypes = F.normalize(torch.randn(len(owners), 8, generator=torch.Generator().manual_seed(0)), dim=1)
    topics = [Topic(f"topic-{index:04}", 3, 100, ("a", "b"), threshold) for index in range(max(owners) + 1)]
    return Topics(IDENTITY, topics, prototypes, torch.tensor(owners))


def texts(count: int = 50) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(1)), dim=1)


@pytest.mark.parametrize("owners", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 3, 3]], ids=["equal", "unequal"])
def test_the_nearest_topic_has_the_nearest_prototype(owners: list[int]) -> None:
    topics, vectors = some_topics(owners), texts()
    nearest = topics.nearest(vectors)
    for index, vector in enumerate(vectors):
        by_topic = {}
        for owner, prototype in zip(owners, topics.prototypes, strict=True):
            by_topic[owner] = max(by_topic.get(owner, -1.0), float(vector @ prototype))
        second, best = sorted(by_topic.values())[-2:]
        assert by_topic[int(nearest.topics[index])] == best
        assert float(nearest.scores[index]) == pytest.approx(best, abs=1e-6)
        assert float(nearest.margins[index]) == pytest.approx(best - second, abs=1e-6)


def test_a_far_text_has_no_topic() -> None:
    topics = some_topics([0, 1], threshold=0.9)
    near, far = topics.choose(torch.stack([topics.prototypes[1], -topics.prototypes[1]]))
    assert (near.topic, near.nearest, near.threshold) == ("topic-0001", "topic-0001", 0.9)
    assert near.score == pytest.approx(1.0)
    assert far.topic is None
    assert far.nearest == "topic-0000"


def test_one_topic_has_a_margin_too() -> None:
    topics = some_topics([0, 0])
    assert topics.choose(topics.prototypes[:1])[0].margin == pytest.approx(2.0)


def test_saved_topics_are_loaded_unchanged(tmp_path: Path) -> None:
    topics = some_topics([0, 1, 1], threshold=0.25)
    topics.save(tmp_path)
    loaded = Topics.load(tmp_path)
    assert (loaded.embedder, loaded.topics, loaded.names) == (IDENTITY, topics.topics, topics.names)
    assert torch.equal(loaded.prototypes, topics.prototypes)
    assert torch.equal(loaded.prototype_topics, topics.prototype_topics)


@pytest.mark.parametrize("damage", ["missing", "cut", "json", "version", "topics"])
def test_damaged_topics_are_one_clear_error(tmp_path: Path, damage: str) -> None:
    some_topics([0, 1]).save(tmp_path)
    facts = json.loads((tmp_path / TOPICS_FILE).read_text())
    if damage == "missing":
        (tmp_path / TOPICS_FILE).unlink()
    elif damage == "cut":
        (tmp_path / PROTOTYPES_FILE).write_bytes((tmp_path / PROTOTYPES_FILE).read_bytes()[:-9])
    elif damage == "json":
        (tmp_path / TOPICS_FILE).write_text("[]")
    elif damage == "version":
        (tmp_path / TOPICS_FILE).write_text(json.dumps({**facts, "version": 2}))
    else:
        (tmp_path / TOPICS_FILE).write_text(json.dumps({**facts, "topics": facts["topics"][:1]}))
    with pytest.raises(CheckpointError, match=r"make (them|the topics again)|newer release"):
        Topics.load(tmp_path)
