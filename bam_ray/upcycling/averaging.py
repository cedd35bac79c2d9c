"""How several models' values of one parameter become one.

All functions take aligned flat fp32 tensors: one parameter, or one chunk of it, of every model. `weighted_mean` and
`merge_trimmed` look at each element by itself, so chunks give what whole tensors give. Trimming compares a parameter's
elements with each other: `trim_threshold`, and `ties` with it, need whole tensors. To merge in chunks, find every
branch's threshold first (one task vector in memory), then merge.

The seed takes part in a mean as one of the N models. In TIES it is where task vectors start, and none itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bam_ray.errors import UpcycleError


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Σ w_i · x_i / Σ w_i: N tensors [n] -> [n]. Without weights all count alike.

    Raises `UpcycleError` where a weight is negative, all are 0, or there is not one for each model.
    """
    weights = [1.0] * len(values) if weights is None else list(weights)
    if len(weights) != len(values) or min(weights) < 0.0 or sum(weights) <= 0.0:
        raise UpcycleError(f"weights {weights} do not fit {len(values)} models: give each one of 0 or more, not all 0")
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total.add_(value, alpha=weight)
    return total.div_(sum(weights))


def ties(seed: Tensor, branches: Sequence[Tensor], density: float, scale: float = 1.0) -> Tensor:
    """TIES-merging (arXiv 2306.01708) of a whole parameter: seed and branches [n] -> [n].

    Trim: of each task vector (branch - seed) the share `density` of the largest elements is kept. Elect: an element's
    sign is that of the sum of what is left. Merge: the mean of the elements that have this sign, times `scale`, is
    added to the seed, whose value stays where they cancel exactly. Raises `UpcycleError` where `density` is not above 0
    and at most 1.
    """
    thresholds = [trim_threshold(branch - seed, density) for branch in branches]
    return merge_trimmed(seed, branches, thresholds, scale)


def trim_threshold(task: Tensor, density: float) -> float:
    """The least magnitude that is kept of a whole task vector [n] when the largest `density`·n elements are.

    At least one is kept, and all that equal the last. Trimming is by parameter, as merging tools do; the paper does it
    over all parameters at once, which a stream of tensors cannot.
    """
    if not 0.0 < density <= 1.0:
        raise UpcycleError(f"density is {density}: use a share above 0, and at most 1, which trims nothing")
    kept = max(round(density * task.numel()), 1)
    return float(task.abs().kthvalue(task.numel() - kept + 1).values)


def merge_trimmed(seed: Tensor, branches: Sequence[Tensor], thresholds: Sequence[float], scale: float = 1.0) -> Tensor:
    """Elect and merge, of a parameter or a chunk of it [n], each branch being trimmed by its threshold: -> [n]."""
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
