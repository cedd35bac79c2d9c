"""Which neurons of one dense FFN go to which expert (LLaMA-MoE, arXiv 2406.16554).

| construction | function | experts |
| --- | --- | --- |
| independent, random | `random_partition` | disjoint, complete, equal |
| independent, clustering | `clustering_partition` | disjoint, complete, equal |
| sharing, inner | `inner_partition` | each its group's most important neurons; they may overlap |
| sharing, inter | `inter_partition` | one shared expert, always on, beside the experts |

f neurons, N experts, m neurons an expert. Every row of indices is ascending.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bam_ray.errors import UpcycleError
from bam_ray.upcycling.split.balanced_kmeans import balanced_kmeans, require_divisible


def random_partition(neurons: int, experts: int, seed: int) -> Tensor:
    """A seeded shuffle cut in N equal parts: [N, f/N], int64. Raises `UpcycleError` where N does not divide f."""
    require_divisible(neurons, experts, "neurons", "experts")
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    return order.view(experts, -1).sort(1).values


def clustering_partition(up_rows: Tensor, experts: int, seed: int) -> Tensor:
    """Neurons whose rows of the up projection point the same way go together: up_rows [f, d] -> [N, f/N], int64.

    Raises `UpcycleError` where N does not divide f.
    """
    require_divisible(up_rows.shape[0], experts, "neurons", "experts")
    labels = balanced_kmeans(F.normalize(up_rows.float(), dim=1), experts, seed)
    return labels.argsort(stable=True).view(experts, -1)


def inner_partition(importance: Tensor, size: int) -> Tensor:
    """Each expert takes the `size` neurons that matter most to its group: importance [N, f] -> [N, size], int64.

    Raises `UpcycleError` where there are fewer than `size` neurons.
    """
    neurons = importance.shape[1]
    if not 1 <= size <= neurons:
        raise UpcycleError(f"experts of {size} neurons cannot come from an FFN of {neurons}: use 1 to {neurons}")
    return _most_important(importance, size)


def inter_partition(importance: Tensor, shared: int, size: int) -> tuple[Tensor, Tensor]:
    """One shared expert and N others: importance [N, f] -> neurons [shared] and [N, size], int64.

    Every group picks the `shared + size` neurons a token of it is to meet. Those picked by most groups form the shared
    expert, of equally often picked ones those of the greatest mean importance (every group's scaled to sum to 1). Each
    expert then takes the most important of the rest: experts may overlap with each other, never with the shared one.
    Raises `UpcycleError` where the FFN has fewer than `shared + size` neurons.
    """
    neurons = importance.shape[1]
    if shared < 1 or size < 1 or shared + size > neurons:
        raise UpcycleError(
            f"a shared expert of {shared} neurons and experts of {size} cannot come from an FFN of {neurons}: "
            f"use at least 1 for each and at most {neurons} for both together"
        )
    picks = torch.zeros_like(importance).scatter(1, _most_important(importance, shared + size), 1.0).sum(0)
    weight = F.normalize(importance.double(), p=1.0, dim=1).mean(0)
    by_weight = weight.argsort(descending=True, stable=True)
    common = by_weight[picks[by_weight].argsort(descending=True, stable=True)[:shared]].sort().values
    rest = torch.ones(neurons, dtype=torch.bool)
    rest[common] = False
    left = rest.nonzero().squeeze(1)
    return common, left[_most_important(importance[:, left], size)]


def _most_important(importance: Tensor, size: int) -> Tensor:
    """[N, f] -> [N, size], ascending; of equal ones the first."""
    return importance.argsort(dim=1, descending=True, stable=True)[:, :size].sort(1).values
