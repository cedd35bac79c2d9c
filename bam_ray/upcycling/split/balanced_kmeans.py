"""k-means with clusters of exactly equal size.

Problem: the experts of a split must have equally many neurons, which plain k-means does not guarantee.

Design choice: Lloyd's iteration, in which points are assigned to centers by the cheapest assignment that fills every
cluster exactly. It is a minimum-cost flow. The flow does not distinguish the points of one cluster, so its graph has
only the k clusters as nodes: the cost of the edge c -> j is the smallest cost of moving a point of c to j. A shortest
path from a cluster with too many points to one with too few moves one point along each of its edges. The prices of the
clusters (the potentials of the flow) are reused in the next iteration, in which few points have to move.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bam_ray.errors import UpcycleError

MAX_ITERATIONS = 50

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def require_divisible(count: int, parts: int, what: str, kind: str) -> None:
    """Raise `UpcycleError` if `count` items (`what`) cannot be divided into `parts` equal parts (`kind`)."""
    if parts >= 1 and count >= parts and count % parts == 0:
        return
    divisors = [part for part in range(1, min(count, 1024) + 1) if count % part == 0]
    below = [part for part in divisors if part < parts][-2:]
    above = [part for part in divisors if part > parts][:2]
    nearest = ", ".join(map(str, below + above))
    raise UpcycleError(
        f"{count} {what} cannot be divided into {parts} {kind} of equal size: use a divisor, such as {nearest}"
    )


def balanced_kmeans(x: Tensor, k: int, seed: int) -> Tensor:
    """Assign points to clusters of exactly n/k points: x [n, d] -> the cluster of each point [n], int64.

    The iteration starts from k-means++ and stops when no point moves, or after `MAX_ITERATIONS`. The squared error
    decreases in every iteration. The result depends only on x, k and the seed.

    Raises:
        UpcycleError: k does not divide n.
    """
    n = x.shape[0]
    require_divisible(n, k, "points", "clusters")
    x = x.detach().float()
    x = x - x.mean(0)  # distances are computed as differences of products, which lose less precision if they are small
    centers = _initial_centers(x, k, torch.Generator().manual_seed(seed))
    prices = np.zeros(k)
    labels = np.full(n, -1, dtype=np.int64)
    for _ in range(MAX_ITERATIONS):
        moved, prices = balanced_assignment(_costs(x, centers), prices)
        if (moved == labels).all():
            break
        labels = moved
        members = torch.nn.functional.one_hot(torch.from_numpy(labels), k).to(x.dtype)  # [n, k]
        centers = members.T @ x / (n // k)
    return torch.from_numpy(labels)


def balanced_assignment(costs: Floats, prices: Floats) -> tuple[Ints, Floats]:
    """Return the cheapest assignment of n points to k clusters of n/k points: costs [n, k] -> clusters [n], prices [k].

    The search starts from `prices`. Any values are correct, and those of a similar problem make the search short. The
    result is optimal: at the end, cost + price of every point is smallest for its own cluster.
    """
    n, k = costs.shape
    size = n // k
    prices = prices.copy()
    labels: Ints = (costs + prices).argmin(1)
    counts = np.bincount(labels, minlength=k)
    edges = np.empty((k, k))  # the smallest cost of moving a point of c to j
    best = np.empty((k, k), dtype=np.int64)  # the point with this cost
    stale = set(range(k))
    while (counts > size).any():
        for cluster in stale:
            edges[cluster], best[cluster] = _moves(costs, labels, cluster)
        reduced = np.maximum(edges + prices - prices[:, None], 0.0)  # values below 0 are rounding errors
        distances, predecessors, end = _nearest_unfilled(reduced, counts, size)
        prices -= np.minimum(distances, distances[end])
        stale = {end}
        counts[end] += 1
        while predecessors[end] >= 0:
            start = predecessors[end]
            labels[best[start, end]] = end
            stale.add(start)
            end = start
        counts[end] -= 1
    return labels, prices


def _moves(costs: Floats, labels: Ints, cluster: int) -> tuple[Floats, Ints]:
    """Return the smallest cost of moving a point of a cluster to each cluster [k], and these points [k]."""
    members = np.flatnonzero(labels == cluster)
    if len(members) == 0:
        return np.full(costs.shape[1], np.inf), np.zeros(costs.shape[1], dtype=np.int64)
    moves = costs[members] - costs[members, cluster, None]
    chosen = moves.argmin(0)
    return moves[chosen, np.arange(costs.shape[1])], members[chosen]


def _nearest_unfilled(reduced: Floats, counts: Ints, size: int) -> tuple[Floats, Ints, int]:
    """Run Dijkstra's algorithm from all clusters with too many points to the nearest one with too few.

    Returns:
        The distances [k] (those larger than the end's are upper bounds), the predecessor of each cluster [k] (-1 at a
        start), and the end of the path.
    """
    distances = np.where(counts > size, 0.0, np.inf)
    predecessors = np.full(len(counts), -1, dtype=np.int64)
    waiting = distances.copy()
    while True:
        here = int(waiting.argmin())
        if counts[here] < size:
            return distances, predecessors, here
        waiting[here] = np.inf
        through = distances[here] + reduced[here]
        shorter = through < distances
        distances[shorter] = waiting[shorter] = through[shorter]
        predecessors[shorter] = here


def _costs(x: Tensor, centers: Tensor) -> Floats:
    """Return the squared distances [n, k] minus |x|², which does not depend on the choice of the cluster."""
    costs: Floats = (centers.square().sum(1) - 2.0 * (x @ centers.T)).double().numpy()
    return costs


def _initial_centers(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw centers [k, d] by k-means++: with probability proportional to the squared distance to the nearest center."""
    chosen = [int(torch.randint(x.shape[0], (), generator=generator))]
    nearest = torch.full((x.shape[0],), math.inf)
    while len(chosen) < k:
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
        total = nearest.cumsum(0, dtype=torch.double)
        draw = torch.rand((), generator=generator, dtype=torch.double) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, draw, right=True)), x.shape[0] - 1))
    return x[chosen].clone()
