"""Means and TIES-merging against element-by-element references."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bam_ray.errors import UpcycleError
from bam_ray.upcycling.averaging import merge_trimmed, ties, trim_threshold, weighted_mean


def values(count: int, size: int, seed: int = 0) -> list[Tensor]:
    """Tensors [size], all but the first close to the first."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, generator=generator)
    return [first, *(first + 0.1 * torch.randn(size, generator=generator) for _ in range(count - 1))]


def reference(seed: list[float], branches: list[list[float]], density: float, scale: float) -> list[float]:
    """TIES-merging in plain Python."""
    tasks = [[value - start for value, start in zip(branch, seed, strict=True)] for branch in branches]
    for task in tasks:
        order = sorted(range(len(task)), key=lambda i, task=task: abs(task[i]))
        for i in order[: len(task) - max(round(density * len(task)), 1)]:
            task[i] = 0.0
    merged = []
    for start, *column in zip(seed, *tasks, strict=True):
        positive = sum(column) > 0
        same = [value for value in column if value != 0.0 and (value > 0) == positive]
        merged.append(start + scale * sum(same) / max(len(same), 1))
    return merged


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0.01, 1.0), st.floats(0.1, 2.0), st.integers(0, 1000))
def test_ties_is_the_reference(branches: int, size: int, density: float, scale: float, seed: int) -> None:
    start, *others = values(branches + 1, size, seed)
    expected = reference(start.tolist(), [other.tolist() for other in others], density, scale)
    torch.testing.assert_close(ties(start, others, density, scale), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_ties_by_hand() -> None:
    seed = torch.tensor([1.0, 1.0, 1.0, 1.0])
    tasks = [torch.tensor([4.0, -2.0, 1.0, 0.5]), torch.tensor([2.0, 3.0, -0.5, 1.0])]
    # Half of each is kept: [4, -2, 0, 0] and [2, 3, 0, 0]; the second element's sign is that of 3 - 2
    merged = ties(seed, [seed + task for task in tasks], density=0.5, scale=2.0)
    torch.testing.assert_close(merged, torch.tensor([1 + 2 * 3.0, 1 + 2 * 3.0, 1.0, 1.0]))


def test_one_branch_untrimmed_is_that_branch_and_equal_branches_are_the_seed() -> None:
    seed, branch = values(2, 50)
    torch.testing.assert_close(ties(seed, [branch], 1.0), branch)
    assert torch.equal(ties(seed, [seed, seed], 0.2), seed)


def test_chunks_give_what_the_whole_gives() -> None:
    seed, *branches = values(4, 101)
    thresholds = [trim_threshold(branch - seed, 0.3) for branch in branches]
    assert [int(((branch - seed).abs() >= t).sum()) for branch, t in zip(branches, thresholds, strict=True)] == [30] * 3
    chunks = [
        merge_trimmed(part, [branch[at : at + 25] for branch in branches], thresholds, 0.7)
        for at, part in zip(range(0, 101, 25), seed.split(25), strict=True)
    ]
    assert torch.equal(torch.cat(chunks), ties(seed, branches, 0.3, 0.7))


def test_weighted_mean() -> None:
    models = values(3, 20)
    torch.testing.assert_close(weighted_mean(models), (models[0] + models[1] + models[2]) / 3)
    mean = weighted_mean(models, [1.0, 0.0, 3.0])
    torch.testing.assert_close(mean, 0.25 * models[0] + 0.75 * models[2])
    torch.testing.assert_close(weighted_mean(models, [2.0, 0.0, 6.0]), mean)
    assert torch.equal(weighted_mean([models[0]] * 4), models[0])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(UpcycleError, match="do not fit 3 models"):
        weighted_mean(values(3, 4), weights)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_densities_that_are_no_share_are_refused(density: float) -> None:
    seed, branch = values(2, 4)
    with pytest.raises(UpcycleError, match="use a share above 0"):
        ties(seed, [branch], density)
