"""TIES-merging equals an element-by-element reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bam_ray.errors import UpcycleError
from bam_ray.upcycling.averaging import merge_trimmed, ties, trim_threshold


def values(count: int, size: int, seed: int = 0) -> list[Tensor]:
    """Return tensors [size]. All are close to the first."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, generator=generator)
    return [first, *(first + 0.1 * torch.randn(size, generator=generator) for _ in range(count - 1))]


def reference(seed: list[float], branches: list[list[float]], density: float, scale: float) -> list[float]:
    """Merge with TIES in plain Python."""
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
def test_ties_equals_the_reference(branches: int, size: int, density: float, scale: float, seed: int) -> None:
    start, *others = values(branches + 1, size, seed)
    expected = reference(start.tolist(), [other.tolist() for other in others], density, scale)
    torch.testing.assert_close(ties(start, others, density, scale), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_ties_by_hand() -> None:
    seed = torch.tensor([1.0, 1.0, 1.0, 1.0])
    tasks = [torch.tensor([4.0, -2.0, 1.0, 0.5]), torch.tensor([2.0, 3.0, -0.5, 1.0])]
    # Half of each is kept: [4, -2, 0, 0] and [2, 3, 0, 0]. The second element has the sign of 3 - 2.
    merged = ties(seed, [seed + task for task in tasks], density=0.5, scale=2.0)
    torch.testing.assert_close(merged, torch.tensor([1 + 2 * 3.0, 1 + 2 * 3.0, 1.0, 1.0]))


def test_one_untrimmed_branch_and_equal_branches_are_kept() -> None:
    seed, branch = values(2, 50)
    torch.testing.assert_close(ties(seed, [branch], 1.0), branch)
    assert torch.equal(ties(seed, [seed, seed], 0.2), seed)


def test_chunks_give_the_same_result_as_the_whole() -> None:
    seed, *branches = values(4, 101)
    thresholds = [trim_threshold(branch - seed, 0.3) for branch in branches]
    assert [int(((branch - seed).abs() >= t).sum()) for branch, t in zip(branches, thresholds, strict=True)] == [30] * 3
    chunks = [
        merge_trimmed(part, [branch[at : at + 25] for branch in branches], thresholds, 0.7)
        for at, part in zip(range(0, 101, 25), seed.split(25), strict=True)
    ]
    assert torch.equal(torch.cat(chunks), ties(seed, branches, 0.3, 0.7))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_invalid_densities_are_refused(density: float) -> None:
    seed, branch = values(2, 4)
    with pytest.raises(UpcycleError, match="use a fraction above 0"):
        ties(seed, [branch], density)
