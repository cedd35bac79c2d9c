"""k-means with clusters of exactly equal size.

Lloyd's iteration with one change: points go to centres by the cheapest assignment that fills every cluster exactly,
found as a minimum-cost flow. Points of one cluster are alike to the flow, so it runs over the k clusters alone: the
edge c -> j costs what moving the best point of c to j costs, and one shortest path from a cluster with too many points
to one with too few moves one point along every edge. The clusters' prices (the flow's potentials) carry over to the
next iteration, where hardly a point has to move.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bam_ray.errors import UpcycleError

MOST_ITERATIONS = 50

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def require_divisible(count: int, parts: int, what: str, kind: str) -> None:
    """Raise `UpcycleError` where `count` things (`what`) do not make `parts` equal parts (`kind`)."""
    if parts >= 1 and count >= parts and count % parts == 0:
        return
    divisors = [part for part in range(1, min(count, 1024) + 1) if count % part == 0]
    below = [part for part in divisors if part < parts][-2:]
    above = [part for part in divisors if part > parts][:2]
    nearest = ", ".join(map(str, below + above))
    raise UpcycleError(
        f"{count} {what} do not make {parts} {kind} of equal size: use a number that divides ({nearest})"
    )


def balanced_kmeans(x: Tensor, k: int, seed: int) -> Tensor:
    """Clusters of exactly n/k points: x [n, d] -> each point's cluster [n], int64.

    Starts from k-means++ and stops when no point moves, or after `MOST_ITERATIONS`. Its squared error falls with every
    iteration. The result depends on x, k and seed alone. Raises `UpcycleError` where k does not divide n.
    """
    n = x.shape[0]
    require_divisible(n, k, "points", "clusters")
    x = x.detach().float()
    x = x - x.mean(0)  # distances are differences of products: keep those small
    centres = _spread_centres(x, k, torch.Generator().manual_seed(seed))
    prices = np.zeros(k)
    labels = np.full(n, -1, dtype=np.int64)
    for _ in range(MOST_ITERATIONS):
        moved, prices = balanced_assignment(_costs(x, centres), prices)
        if (moved == labels).all():
            break
        labels = moved
        members = torch.nn.functional.one_hot(torch.from_numpy(labels), k).to(x.dtype)  # [n, k]
        centres = members.T @ x / (n // k)
    return torch.from_numpy(labels)


def balanced_assignment(costs: Floats, prices: Floats) -> tuple[Ints, Floats]:
    """The cheapest assignment of n points to k clusters of n/k each: costs [n, k] -> clusters [n], prices [k].

    `prices` are where the search starts: any will do, those of a similar problem make it short. The result is optimal:
    in the end every point lies where cost + price is least.
    """
    n, k = costs.shape
    size = n // k
    prices = prices.copy()
    labels: Ints = (costs + prices).argmin(1)
    counts = np.bincount(labels, minlength=k)
    edges = np.empty((k, k))  # what moving the best point of c to j costs
    best = np.empty((k, k), dtype=np.int64)  # that point
    stale = set(range(k))
    while (counts > size).any():
        for cluster in stale:
            edges[cluster], best[cluster] = _moves(costs, labels, cluster)
        reduced = np.maximum(edges + prices - prices[:, None], 0.0)  # below 0 by rounding alone
        distances, before, end = _nearest_with_room(reduced, counts, size)
        prices -= np.minimum(distances, distances[end])
        stale = {end}
        counts[end] += 1
        while before[end] >= 0:
            start = before[end]
            labels[best[start, end]] = end
            stale.add(start)
            end = start
        counts[end] -= 1
    return labels, prices


def _moves(costs: Floats, labels: Ints, cluster: int) -> tuple[Floats, Ints]:
    """What moving the best point of a cluster to each other one costs [k], and the points [k]."""
    members = np.flatnonzero(labels == cluster)
    if len(members) == 0:
        return np.full(costs.shape[1], np.inf), np.zeros(costs.shape[1], dtype=np.int64)
    moves = costs[members] - costs[members, cluster, None]
    chosen = moves.argmin(0)
    return moves[chosen, np.arange(costs.shape[1])], members[chosen]


def _nearest_with_room(reduced: Floats, counts: Ints, size: int) -> tuple[Floats, Ints, int]:
    """Dijkstra from all clusters with too many points to the nearest with too few.

    Returns distances [k] (those beyond the end are upper bounds), each cluster's predecessor [k] (-1 at a start), and
    the end.
    """
    distances = np.where(counts > size, 0.0, np.inf)
    before = np.full(len(counts), -1, dtype=np.int64)
    waiting = distances.copy()
    while True:
        here = int(waiting.argmin())
        if counts[here] < size:
            return distances, before, here
        waiting[here] = np.inf
        through = distances[here] + reduced[here]
        shorter = through < distances
        distances[shorter] = waiting[shorter] = through[shorter]
        before[shorter] = here


def _costs(x: Tensor, centres: Tensor) -> Floats:
    """Squared distances [n, k] less |x|², which no choice changes."""
    costs: Floats = (centres.square().sum(1) - 2.0 * (x @ centres.T)).double().numpy()
    return costs


def _spread_centres(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a point drawn by its squared distance to the nearest so far. [k, d]."""
    chosen = [int(torch.randint(x.shape[0], (), generator=generator))]
    nearest = torch.full((x.shape[0],), math.inf)
    while len(chosen) < k:
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
        total = nearest.cumsum(0, dtype=torch.double)
        draw = torch.rand((), generator=generator, dtype=torch.double) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, draw, right=True)), x.shape[0] - 1))
    return x[chosen].clone()
