"""Balanced k-means, and the partitions of an FFN's neurons."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.errors import UpcycleError
from bam_ray.upcycling.split.balanced_kmeans import balanced_assignment, balanced_kmeans
from bam_ray.upcycling.split.partition import clustering_partition, inner_partition, inter_partition, random_partition


def points(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the sum of the squared distances to the means of the clusters."""
    return sum((x[labels == j] - x[labels == j].mean(0)).square().sum().item() for j in labels.unique())


def greedy_kmeans(x: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """Run Lloyd's iteration from random points, and assign the nearest pairs first until a cluster is full."""
    size = len(x) // k
    centers = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]]
    for _ in range(50):
        distances = torch.cdist(x, centers)
        labels = torch.full((len(x),), -1)
        for pair in distances.flatten().argsort().tolist():
            point, cluster = divmod(pair, k)
            if labels[point] < 0 and (labels == cluster).sum() < size:
                labels[point] = cluster
        centers = torch.stack([x[labels == j].mean(0) for j in range(k)])
    return labels


def test_planted_clusters_are_recovered() -> None:
    k, size = 8, 25
    centers = points(k, 16, 0) * 10
    truth = torch.arange(k).repeat(size)[torch.randperm(k * size, generator=torch.Generator().manual_seed(1))]
    x = centers[truth] + points(k * size, 16, 2) + 100.0  # far from the origin
    for seed in range(5):
        labels = balanced_kmeans(x, k, seed)
        pairs = set(zip(labels.tolist(), truth.tolist(), strict=True))
        assert len(pairs) == k
        assert labels.bincount().tolist() == [size] * k


def test_error_is_below_that_of_greedy_assignment() -> None:
    totals = torch.zeros(3)
    for seed in range(6):
        x = points(48, 4, seed) * torch.tensor([3.0, 1.0, 1.0, 0.5])
        labels = balanced_kmeans(x, 4, seed)
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == [12] * 4
        random = torch.arange(4).repeat(12)
        totals += torch.tensor([error(x, labels), error(x, greedy_kmeans(x, 4, seed)), error(x, random)])
    ours, greedy, chance = totals.tolist()
    assert ours <= greedy
    assert ours < 0.6 * chance


@given(st.integers(0, 10_000), st.sampled_from([(8, 2), (6, 3), (8, 4)]))
def test_assignment_is_optimal(seed: int, shape: tuple[int, int]) -> None:
    n, k = shape
    random = np.random.default_rng(seed)
    costs = random.integers(0, 9, (n, k)).astype(float)  # integers, so that there are ties
    labels, _ = balanced_assignment(costs, random.normal(size=k) * random.integers(0, 10))
    assert np.bincount(labels, minlength=k).tolist() == [n // k] * k
    assert costs[np.arange(n), labels].sum() == min(
        costs[np.arange(n), list(order)].sum() for order in equal_assignments(n, k)
    )


def equal_assignments(n: int, k: int) -> list[tuple[int, ...]]:
    """Return all assignments of n points to k clusters of n/k points."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(n):
        found = [(*start, j) for start in found for j in range(k) if start.count(j) < n // k]
    return found


def test_kmeans_is_deterministic_and_accepts_equal_points() -> None:
    x = points(40, 3, 0)
    assert torch.equal(balanced_kmeans(x, 4, 7), balanced_kmeans(x, 4, 7))
    assert balanced_kmeans(torch.ones(12, 3), 4, 0).bincount().tolist() == [3] * 4
    assert balanced_kmeans(x, 1, 0).tolist() == [0] * 40


@pytest.mark.parametrize("construction", ["random", "clustering"])
def test_independent_partitions_are_disjoint_and_complete(construction: str) -> None:
    rows = points(60, 8, 0)

    def partition(seed: int) -> torch.Tensor:
        return random_partition(60, 4, seed) if construction == "random" else clustering_partition(rows, 4, seed)

    parts = partition(0)
    assert parts.shape == (4, 15)
    assert parts.flatten().sort().values.tolist() == list(range(60))
    assert torch.equal(parts, parts.sort(1).values)
    assert torch.equal(parts, partition(0))


def test_random_partitions_differ_by_seed() -> None:
    assert not torch.equal(random_partition(60, 4, 0), random_partition(60, 4, 1))


def test_clustering_depends_only_on_directions() -> None:
    directions = torch.eye(4).repeat(5, 1) + 0.05 * points(20, 4, 0)
    lengths = torch.rand(20, 1, generator=torch.Generator().manual_seed(1)) * 9 + 1
    parts = clustering_partition(directions * lengths, 4, 0)
    assert sorted(map(tuple, parts.tolist())) == [tuple(range(start, 20, 4)) for start in range(4)]


def test_inner_has_the_most_important_neurons_of_each_group() -> None:
    importance = torch.tensor([[5.0, 1, 4, 0, 3, 2], [0, 1, 2, 3, 4, 5]])
    assert inner_partition(importance, 3).tolist() == [[0, 2, 4], [3, 4, 5]]


def test_inter_shares_the_neurons_that_most_groups_pick() -> None:
    # Each group picks three neurons, {0, 1, 2}, {0, 3, 5} and {0, 3, 4}: most pick 0 and 3
    importance = torch.tensor([[9.0, 8, 7, 1, 2, 0], [9, 1, 0, 7, 2, 8], [9, 0, 1, 8, 7, 2]])
    shared, experts = inter_partition(importance, 2, 1)
    assert shared.tolist() == [0, 3]
    assert experts.tolist() == [[1], [5], [4]]
    # Every group picks all neurons, so the mean importance decides
    shared, experts = inter_partition(importance, 3, 3)
    assert shared.tolist() == [0, 3, 4]
    assert experts.tolist() == [[1, 2, 5]] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_partition(11008, 7, 0), r"11008 neurons cannot be divided into 7 experts .* 2, 4, 8, 16$"),
        (
            lambda: clustering_partition(torch.ones(10, 2), 3, 0),
            r"10 neurons cannot be divided into 3 experts .* 1, 2, 5, 10$",
        ),
        (lambda: balanced_kmeans(torch.ones(4, 2), 8, 0), r"4 points cannot be divided into 8 clusters .* 2, 4$"),
        (lambda: inner_partition(torch.ones(2, 6), 7), "use 1 to 6"),
        (lambda: inter_partition(torch.ones(2, 6), 3, 4), "at most 6 for both"),
        (lambda: inter_partition(torch.ones(2, 6), 0, 4), "at least 1"),
    ],
)
def test_invalid_sizes_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UpcycleError, match=message):
        call()
