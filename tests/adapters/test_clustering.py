"""Clusters of vectors of length 1: repeatable, of similar sizes, and those that are there."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bam_ray.adapters import clustering
from bam_ray.adapters.clustering import density_centers, nearest_center, spherical_kmeans


def groups(sizes: list[int], spread: float = 0.15) -> tuple[Tensor, Tensor]:
    """Return points [n, 16] around random directions, and the group of each point."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(len(sizes), 16, generator=generator), dim=1)
    owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    noise = spread * torch.randn(len(owners), 16, generator=generator)
    return F.normalize(directions[owners] + noise, dim=1), owners


def assert_same_partition(found: Tensor, expected: Tensor) -> None:
    """Assert that two labelings of points differ only in the names of the clusters."""
    pairs = set(zip(found.tolist(), expected.tolist(), strict=True))
    assert len(pairs) == len(set(found.tolist())) == len(set(expected.tolist()))


@pytest.mark.parametrize("balanced", [True, False])
def test_separate_groups_are_found(balanced: bool) -> None:
    x, owners = groups([40, 40, 40, 40])
    centers = spherical_kmeans(x, 4, 0, balanced=balanced)
    torch.testing.assert_close(centers.norm(dim=1), torch.ones(4))
    assert_same_partition(nearest_center(x, centers), owners)


def test_balanced_clusters_have_similar_sizes() -> None:
    x, _ = groups([300, 20, 20, 20], spread=0.25)
    sizes = {}
    for balanced in (True, False):
        centers = spherical_kmeans(x, 12, 0, balanced=balanced)
        sizes[balanced] = torch.bincount(nearest_center(x, centers), minlength=12).float()
    assert sizes[True].std() < 0.7 * sizes[False].std()
    assert sizes[True].min() >= 10


def test_weights_of_clusters_are_balanced() -> None:
    x, owners = groups([300, 20, 20, 20])
    weights = torch.tensor([1.0, 15.0, 15.0, 15.0])[owners]  # the groups have equal weights
    for seed in range(3):
        centers = spherical_kmeans(x, 4, seed, balanced=True, weights=weights)
        assert_same_partition(nearest_center(x, centers), owners)
    equal = spherical_kmeans(x, 4, 0, balanced=True, weights=torch.ones(len(x)))
    torch.testing.assert_close(equal, spherical_kmeans(x, 4, 0, balanced=True))


def test_the_result_depends_only_on_the_seed() -> None:
    x, _ = groups([50, 50, 50], spread=0.5)
    first, again, other = (spherical_kmeans(x, 8, seed, balanced=True) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = groups([50, 50, 50], spread=0.5)
    whole = nearest_center(x, spherical_kmeans(x, 8, 0, balanced=True))
    monkeypatch.setattr(clustering, "CHUNK_PRODUCTS", 8 * 7)
    assert_same_partition(nearest_center(x, spherical_kmeans(x, 8, 0, balanced=True)), whole)


def test_equal_points_give_one_cluster() -> None:
    x = F.normalize(torch.ones(20, 16), dim=1)
    assert len(spherical_kmeans(x, 4, 0, balanced=True)) == 1
    assert len(spherical_kmeans(x[:1], 4, 0, balanced=True)) == 1


def test_density_finds_the_number_of_groups() -> None:
    x, owners = groups([60, 50, 40, 30, 20], spread=0.05)
    centers = density_centers(x, 10, 0)
    assert_same_partition(nearest_center(x, centers), owners)


def test_text_without_groups_is_one_cluster() -> None:
    x = F.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert len(density_centers(x, 20, 0)) == 1
