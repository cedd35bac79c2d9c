"""Router rows in closed form, from the inputs of a router for the tokens of each domain.

Let μ_c be the mean input of domain c, μ the mean of all μ_c, and δ_c = μ_c − μ. A router has no bias, so its logits may
depend only on what differs between domains:

- means: w_c = δ_c without its component along μ, which would add the same value to the logits of every token.
- ridge: least squares on centered one-hot labels. With equal weights of all domains, the solution is
  w_c ∝ (G + λI)⁻¹ δ_c, in which G is the mean of x·xᵀ: whitened means (arXiv 2603.29765 fits routers in this way).

Neither method determines the temperature of the softmax. Therefore one factor per router is chosen that minimizes the
cross-entropy. This factor and λ are chosen on tokens that the rows were not fitted to: if there is little text for the
hidden size, the rows separate their own tokens perfectly, and any confidence would look right on these.

Shapes: C domains, N experts, T tokens (of one domain), d hidden size.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bam_ray.upcycling.routers.separation import Initialization, RouterScore

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for λ, in units of the mean squared input."""
TUNING_DIVISOR = 4
"""One in this many tokens is not used for the rows, but to choose the factor and λ."""
COPY_NOISE = 1e-2
"""Standard deviation of the noise in a copy's row, relative to the root mean square of that row."""
SPREADS = (1e-2, 30.0)
"""Range of the logits' root mean square in which the factor is searched."""
CHUNK = 8192
"""Number of tokens that are processed in double precision at the same time."""


def generator(seed: int, *label: str) -> torch.Generator:
    """Return a random generator for one purpose, which does not depend on what else was drawn."""
    digest = hashlib.sha256("\0".join(label).encode()).digest()
    return torch.Generator().manual_seed(seed + int.from_bytes(digest[:6], "big"))


@dataclass(frozen=True)
class Assignment:
    """The experts that are right for each domain.

    Attributes:
        domains: The names of the domains.
        originals: The number of the expert that has the domain's text, int64 [C].
        right: True for experts that are right for a domain, bool [C, N].
    """

    domains: tuple[str, ...]
    originals: Tensor
    right: Tensor

    def expand(self, rows: Tensor, noise: torch.Generator) -> Tensor:
        """Expand one row per domain [C, d] to one row per expert [N, d].

        Copies get the row of their original plus a little noise, so that training can separate them. Experts without
        text get a row of zeros: their logit is 0, which is the mean over domains of the other logits.
        """
        weight = self.right.to(rows.dtype).T @ rows
        copies = self.right.any(0)
        copies[self.originals] = False
        spread = weight.square().mean(1, keepdim=True).sqrt() * COPY_NOISE
        drawn = torch.randn(weight.shape, generator=noise, dtype=torch.double).to(weight.dtype)
        return weight + drawn * spread * copies.unsqueeze(1)

    def score(self, logits: list[Tensor]) -> RouterScore:
        """Return the scores of the router logits of each domain, [T, N] each."""
        totals = torch.zeros(3, dtype=torch.double)
        for right, part in zip(self.right, logits, strict=True):
            log_probability = _log_probability(part, right)
            parts = (right[part.argmax(-1)], log_probability.exp(), -log_probability)
            totals += torch.stack([value.mean(dtype=torch.double) for value in parts])
        accuracy, probability, cross_entropy = (totals / len(logits)).tolist()
        return RouterScore(accuracy=accuracy, probability=probability, cross_entropy=cross_entropy)

    def chance(self) -> RouterScore:
        """Return the scores of equal logits. The accuracy is that of a random choice."""
        share = self.right.double().mean(1)  # [C]
        return RouterScore(
            accuracy=share.mean().item(), probability=share.mean().item(), cross_entropy=-share.log().mean().item()
        )

    def calibrated(self, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        """Return `weight` [N, d] times the factor that minimizes the cross-entropy on the domains' tokens [T, d]."""
        logits = [router_logits(part, weight) for part in inputs]
        spread = math.sqrt(sum(part.square().mean().item() for part in logits) / len(logits))
        if spread == 0.0:
            return weight  # the domains do not differ

        def cross_entropy(log_factor: float) -> float:
            factor = math.exp(log_factor)
            parts = zip(self.right, logits, strict=True)
            return -sum(_log_probability(part * factor, right).mean().item() for right, part in parts)

        low, high = (math.log(limit / spread) for limit in SPREADS)
        return weight * math.exp(_minimum(cross_entropy, low, high))


def router_logits(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return the logits as `BamRouter` computes them, in fp32: inputs [T, d], weight [N, d] -> [T, N]."""
    return torch.cat([part.float() @ weight.float().T for part in inputs.split(CHUNK)])


def fit_router(
    assignment: Assignment, inputs: list[Tensor], noise: Callable[[], torch.Generator]
) -> dict[Initialization, Tensor]:
    """Fit a router by "means" and by "ridge", [N, d] in double precision each.

    Args:
        assignment: The experts that are right for each domain.
        inputs: The inputs of the router for each domain, [T, d].
        noise: Returns the generator of the noise in the rows of copies, with the same state at every call.
    """
    tuned = [len(part) // TUNING_DIVISOR for part in inputs]
    if min(tuned) == 0:  # too little text to hold back a part of it
        fit = tune = inputs
    else:
        fit = [part[: len(part) - count] for part, count in zip(inputs, tuned, strict=True)]
        tune = [part[len(part) - count :] for part, count in zip(inputs, tuned, strict=True)]

    def cross_entropy(weight: Tensor) -> float:
        return assignment.score([router_logits(part, weight) for part in tune]).cross_entropy

    return {
        kind: min(
            (assignment.calibrated(assignment.expand(rows, noise()), tune) for rows in choices), key=cross_entropy
        )
        for kind, choices in domain_rows(fit).items()
    }


def domain_rows(inputs: list[Tensor]) -> dict[Initialization, list[Tensor]]:
    """Return rows [C, d] in double precision by "means", and by "ridge" for each λ, from inputs [T, d] per domain."""
    means = torch.stack([_mean(part) for part in inputs])  # [C, d]
    center = means.mean(0)
    differences = means - center
    along = differences @ center / center.square().sum().clamp_min(torch.finfo(torch.double).tiny)
    moments = _second_moment(inputs)
    size = moments.diagonal().mean()
    identity = torch.eye(len(moments), dtype=torch.double)
    factors = (torch.linalg.cholesky(moments + ridge * size * identity) for ridge in RIDGES)
    return {
        "means": [differences - along.unsqueeze(1) * center],
        "ridge": [torch.cholesky_solve(differences.T, factor).T for factor in factors],
    }


def _mean(inputs: Tensor) -> Tensor:
    return torch.stack([part.double().sum(0) for part in inputs.split(CHUNK)]).sum(0) / len(inputs)


def _second_moment(inputs: list[Tensor]) -> Tensor:
    """Return the mean over domains of their mean x·xᵀ: [d, d], double."""
    width = inputs[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.double)
    for domain in inputs:
        for part in domain.split(CHUNK):
            wide = part.double()
            total.addmm_(wide.T, wide, alpha=1.0 / (len(domain) * len(inputs)))
    return total


def _log_probability(logits: Tensor, right: Tensor) -> Tensor:
    """Return the log of the total probability of the right experts [N]: logits [T, N] -> [T]."""
    return logits[:, right].logsumexp(-1) - logits.logsumexp(-1)


def _minimum(f: Callable[[float], float], low: float, high: float) -> float:
    """Return the minimum of a unimodal function between `low` and `high`, by golden-section search to 1e-3."""
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = f(left), f(right)
    while high - low > 1e-3:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = f(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = f(right)
    return (low + high) / 2.0
