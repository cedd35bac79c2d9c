"""TIES-merging of one parameter of several models that came from one seed (arXiv 2306.01708).

All functions take flat fp32 tensors of equal size. A task vector is the difference between a branch and the seed.
Trimming compares the elements of a parameter with each other, so it needs whole tensors. The later steps treat each
element separately.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bam_ray.errors import UpcycleError


def ties(seed: Tensor, branches: Sequence[Tensor], density: float, scale: float = 1.0) -> Tensor:
    """Merge a whole parameter with TIES: seed and branches [n] -> [n].

    Trim: the fraction `density` of the largest elements of each task vector is kept. Elect: the sign of an element is
    that of the sum of the kept values. Merge: the mean of the values that have this sign, times `scale`, is added to
    the seed. If the kept values of an element cancel exactly, the seed's value remains.

    Raises:
        UpcycleError: `density` is not above 0 and at most 1.
    """
    thresholds = [trim_threshold(branch - seed, density) for branch in branches]
    return merge_trimmed(seed, branches, thresholds, scale)


def trim_threshold(task: Tensor, density: float) -> float:
    """Return the smallest magnitude that is kept when the largest `density`·n elements of a task vector [n] are kept.

    At least one element is kept, and so are all elements that equal the smallest one kept. Each parameter is trimmed
    separately, as merging tools do. The paper trims all parameters together, which a stream of tensors cannot do.
    """
    if not 0.0 < density <= 1.0:
        raise UpcycleError(f"density is {density}: use a fraction above 0 and at most 1, which trims nothing")
    kept = max(round(density * task.numel()), 1)
    return float(task.abs().kthvalue(task.numel() - kept + 1).values)


def merge_trimmed(seed: Tensor, branches: Sequence[Tensor], thresholds: Sequence[float], scale: float = 1.0) -> Tensor:
    """Trim each branch by its threshold, elect signs and merge, for a parameter or a chunk of it: [n] -> [n]."""
    tasks = [_trimmed(branch - seed, threshold) for branch, threshold in zip(branches, thresholds, strict=True)]
    elected = torch.stack(tasks).sum(0).sign()
    total, count = torch.zeros_like(seed), torch.zeros_like(seed)
    for task in tasks:
        agrees = task.sign() == elected
        total.add_(task * agrees)
        count.add_(agrees)
    return seed + scale * total / count.clamp_min(1.0)


def _trimmed(task: Tensor, threshold: float) -> Tensor:
    return torch.where(task.abs() >= threshold, task, 0.0)
