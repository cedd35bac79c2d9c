"""Clustering of vectors of length 1 by cosine similarity, for a given number of clusters and for an unknown one.

Problem: an adapter needs enough text, and k-means makes clusters of very different sizes.

Design choice: spherical k-means in which each cluster has a price, and a point goes to the cluster with the largest
similarity minus price. The prices are those of an entropic transport problem, in which all clusters get equally many
points (Sinkhorn's iteration, arXiv 1306.0895). It considers only the `CANDIDATES` best clusters of a point, so its cost
does not grow with the number of clusters. Prices are used only to find centers. Afterwards, every text goes to the
nearest topic, in training as in serving. The sizes of topics are therefore similar, but not equal. If points have
weights, such as the lengths of texts, clusters of similar weights are found.

A result depends only on the arguments, for a given release of torch and a given number of threads.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ITERATIONS = 30
MAX_MOVED = 0.001  # the fraction of points that may still move at the end
CANDIDATES = 32
PRICE_ROUNDS = 10
TEMPERATURE = 0.02  # of the transport problem, in units of cosine similarity
DENSITY_POINTS = 1 << 14
DENSITY_DIMENSIONS = 16
CHUNK_PRODUCTS = 1 << 24  # similarities in memory at once: 64 MiB
INITIAL_POINTS = 4  # points for each center that k-means++ draws from, and at least this many thousand


def spherical_kmeans(x: Tensor, k: int, seed: int, *, balanced: bool, weights: Tensor | None = None) -> Tensor:
    """Return the centers of clusters, [k', d], of length 1; k' < k only if there are fewer different points.

    Args:
        x: The points, [n, d], of length 1.
        k: The number of clusters.
        seed: The random seed.
        balanced: Find clusters of similar sizes.
        weights: The weights of the points in the centers and in the sizes of clusters, [n]; None: equal ones.
    """
    weighted = x if weights is None else x * weights[:, None]
    centers = _initial_centers(x, k, torch.Generator().manual_seed(seed))
    prices = x.new_zeros(len(centers))
    labels = torch.full((len(x),), -1)
    for _ in range(MAX_ITERATIONS):
        scores, candidates = _candidates(x, centers, prices, CANDIDATES if balanced else 1)
        if balanced:
            prices = _balancing_prices(scores, candidates, prices, weights)
        best = (scores - prices[candidates]).argmax(1, keepdim=True)
        moved = candidates.gather(1, best)[:, 0]
        sums = torch.zeros_like(centers).index_add_(0, moved, weighted)
        is_used = torch.bincount(moved, minlength=len(centers)) > 0
        centers = torch.where(is_used[:, None], F.normalize(sums, dim=1), centers)
        if (moved != labels).float().mean() <= MAX_MOVED:
            break
        labels = moved
    return centers


def density_centers(x: Tensor, least: int, seed: int) -> Tensor:
    """Return the centers of the clusters that HDBSCAN finds, [k, d], of length 1; at least one.

    HDBSCAN needs few dimensions, so it clusters the first principal components of at most `DENSITY_POINTS` points.

    Args:
        x: The points, [n, d], of length 1.
        least: The fewest points of a cluster.
        seed: The random seed.
    """
    from sklearn.cluster import HDBSCAN

    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:DENSITY_POINTS]
    x, least = x[chosen], max(2, round(least * len(chosen) / len(x)))
    centered = x - x.mean(0)
    components = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -DENSITY_DIMENSIONS:]
    labels = torch.from_numpy(HDBSCAN(min_cluster_size=least, copy=True).fit_predict((centered @ components).numpy()))
    sums = [x[labels == label].sum(0) for label in range(int(labels.max()) + 1)]  # noise has the label -1
    return F.normalize(torch.stack(sums or [x.sum(0)]), dim=1)


def nearest_center(x: Tensor, centers: Tensor) -> Tensor:
    """Return the center with the largest product for each point: x [n, d], centers [k, d] -> [n], int64."""
    return _candidates(x, centers, centers.new_zeros(len(centers)), 1)[1][:, 0]


def _candidates(x: Tensor, centers: Tensor, prices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the similarities to the best centers of each point after prices, and these centers, each [n, count]."""
    count = min(count, len(centers))
    scores, candidates = x.new_empty(len(x), count), torch.empty(len(x), count, dtype=torch.int64)
    rows = max(1, CHUNK_PRODUCTS // len(centers))
    for start in range(0, len(x), rows):
        products = x[start : start + rows] @ centers.T
        best = (products - prices).topk(count, sorted=False).indices
        candidates[start : start + rows] = best
        scores[start : start + rows] = products.gather(1, best)
    return scores, candidates


def _balancing_prices(scores: Tensor, candidates: Tensor, prices: Tensor, weights: Tensor | None) -> Tensor:
    """Return the prices [k] at which all clusters get about equal weights. The search starts from `prices`."""
    target = (len(scores) if weights is None else float(weights.sum())) / len(prices)
    least = target * 1e-3  # the price of a cluster that is no candidate must stay finite
    for _ in range(PRICE_ROUNDS):
        shares = ((scores - prices[candidates]) / TEMPERATURE).softmax(1)
        if weights is not None:
            shares = shares * weights[:, None]
        loads = torch.zeros_like(prices).index_add_(0, candidates.view(-1), shares.view(-1))
        prices = prices + TEMPERATURE * (loads.clamp(min=least) / target).log()
    return prices - prices.mean()


def _initial_centers(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw centers by k-means++: with probability proportional to one minus the similarity to the nearest center."""
    count = min(len(x), INITIAL_POINTS * max(k, 1000))
    pool = x[torch.randperm(len(x), generator=generator)[:count]]
    chosen = [0]
    distances = 1.0 - pool @ pool[0]
    for _ in range(min(k, count) - 1):
        total = distances.clamp(min=0.0).double().cumsum(0)
        if total[-1] < 1e-5 * count:  # all points are centers
            break
        draw = torch.rand((), generator=generator, dtype=torch.double) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, draw, right=True)), count - 1))
        distances = torch.minimum(distances, 1.0 - pool @ pool[chosen[-1]])
    return pool[chosen].clone()
