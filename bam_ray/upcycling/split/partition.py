"""Partitions of the neurons of one dense FFN into experts (LLaMA-MoE, arXiv 2406.16554).

| construction | function | experts |
| --- | --- | --- |
| independent, random | `random_partition` | disjoint, complete, equal |
| independent, clustering | `clustering_partition` | disjoint, complete, equal |
| sharing, inner | `inner_partition` | each has the most important neurons of its group; they may overlap |
| sharing, inter | `inter_partition` | a shared expert, which processes every token, and routed experts |

Shapes: f neurons, N experts. Every row of indices is ascending.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bam_ray.errors import UpcycleError
from bam_ray.upcycling.split.balanced_kmeans import balanced_kmeans, require_divisible


@dataclass(frozen=True)
class Partition:
    """The partition of one layer's FFN.

    Attributes:
        experts: The neurons of each expert, ascending.
        shared: The neurons of the shared expert, ascending; empty if there is none.
    """

    experts: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...] = ()

    @classmethod
    def of(cls, experts: Tensor, shared: Tensor | None = None) -> "Partition":
        """Return the partition of index tensors: experts [N, size], shared [neurons]."""
        return cls(tuple(tuple(row) for row in experts.tolist()), () if shared is None else tuple(shared.tolist()))


def random_partition(neurons: int, experts: int, seed: int) -> Tensor:
    """Cut a seeded shuffle into N equal parts: [N, f/N], int64. Raise `UpcycleError` if N does not divide f."""
    require_divisible(neurons, experts, "neurons", "experts")
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    return order.view(experts, -1).sort(1).values


def clustering_partition(up_rows: Tensor, experts: int, seed: int) -> Tensor:
    """Group neurons whose rows of the up projection have similar directions: up_rows [f, d] -> [N, f/N], int64.

    Raises:
        UpcycleError: N does not divide f.
    """
    require_divisible(up_rows.shape[0], experts, "neurons", "experts")
    labels = balanced_kmeans(F.normalize(up_rows.float(), dim=1), experts, seed)
    return labels.argsort(stable=True).view(experts, -1)


def inner_partition(importance: Tensor, size: int) -> Tensor:
    """Give each expert the `size` most important neurons of its group: importance [N, f] -> [N, size], int64.

    Raises:
        UpcycleError: There are fewer than `size` neurons.
    """
    neurons = importance.shape[1]
    if not 1 <= size <= neurons:
        raise UpcycleError(
            f"experts of {size} neurons cannot be cut from an FFN of {neurons} neurons: use 1 to {neurons}"
        )
    return _most_important(importance, size)


def inter_partition(importance: Tensor, shared: int, size: int) -> tuple[Tensor, Tensor]:
    """Choose the neurons of a shared expert and of N routed ones: importance [N, f] -> [shared] and [N, size], int64.

    Every group picks its `shared + size` most important neurons. The neurons that most groups picked form the shared
    expert; ties are resolved by the mean importance, for which the importance of each group is scaled to sum to 1. Each
    routed expert has the most important of the remaining neurons. Routed experts may overlap with each other, but not
    with the shared expert.

    Raises:
        UpcycleError: The FFN has fewer than `shared + size` neurons.
    """
    neurons = importance.shape[1]
    if shared < 1 or size < 1 or shared + size > neurons:
        raise UpcycleError(
            f"a shared expert of {shared} neurons and experts of {size} cannot be cut from an FFN of {neurons}: "
            f"use at least 1 for each and at most {neurons} for both together"
        )
    picks = torch.zeros_like(importance).scatter(1, _most_important(importance, shared + size), 1.0).sum(0)
    weight = F.normalize(importance.double(), p=1.0, dim=1).mean(0)
    by_weight = weight.argsort(descending=True, stable=True)
    common = by_weight[picks[by_weight].argsort(descending=True, stable=True)[:shared]].sort().values
    rest = torch.ones(neurons, dtype=torch.bool)
    rest[common] = False
    remaining = rest.nonzero().squeeze(1)
    return common, remaining[_most_important(importance[:, remaining], size)]


def _most_important(importance: Tensor, size: int) -> Tensor:
    """Return the most important neurons, ascending; the first ones of equal importance: [N, f] -> [N, size]."""
    return importance.argsort(dim=1, descending=True, stable=True)[:, :size].sort(1).values
