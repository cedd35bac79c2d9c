"""Router rows in closed form from the inputs that each domain's tokens bring to a router.

Let μ_c be the mean input of domain c, μ the mean of these, and δ_c = μ_c − μ. A router has no bias, so only what
differs between domains may make its logits:

- means: w_c = δ_c without its component along μ, which would add the same to every token's logit.
- ridge: least squares on centred one-hot labels. All domains counting alike, the solution is w_c ∝ (G + λI)⁻¹ δ_c with
  G the mean of x·xᵀ: the means, whitened (arXiv 2603.29765 fits routers so).

Least squares says nothing of how sure a softmax should be, and neither do means: one factor a router makes its
probabilities as good as they can be. That factor and λ are chosen by cross-entropy on tokens the rows have not seen:
where text is short for the width, rows know their own tokens by heart, and on these any certainty would look right.

Shapes: C domains, N experts, T tokens (of one domain), d hidden.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bam_ray.upcycling.routers.separation import Initialisation, RouterScore

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # λ to choose from, in units of the mean squared input
TUNING_SHARE = 4  # one in so many tokens is kept from the rows, for the factor and λ
COPY_NOISE = 1e-2  # of a copy's row, in units of that row's standard deviation around 0
SPREADS = (1e-2, 30.0)  # the standard deviation of logits between which the best factor is sought
CHUNK = 8192  # tokens in double precision at a time


def generator(seed: int, *label: str) -> torch.Generator:
    """Random numbers for one purpose, whatever else was drawn before."""
    digest = hashlib.sha256("\0".join(label).encode()).digest()
    return torch.Generator().manual_seed(seed + int.from_bytes(digest[:6], "big"))


@dataclass(frozen=True)
class Assignment:
    """Which experts are right for which domain: `right` [C, N], bool; `originals` are the experts with text."""

    domains: tuple[str, ...]
    originals: Tensor  # [C], int64
    right: Tensor

    def expand(self, rows: Tensor, noise: torch.Generator) -> Tensor:
        """A row a domain [C, d] to a row an expert [N, d].

        Copies get their original's row and a little noise, so that training can tell them apart. Experts without
        text get a zero row: a logit of 0, which is the mean over domains of the others' logits.
        """
        weight = self.right.to(rows.dtype).T @ rows
        copies = self.right.any(0)
        copies[self.originals] = False
        spread = weight.square().mean(1, keepdim=True).sqrt() * COPY_NOISE
        drawn = torch.randn(weight.shape, generator=noise, dtype=torch.double).to(weight.dtype)
        return weight + drawn * spread * copies.unsqueeze(1)

    def score(self, logits: list[Tensor]) -> RouterScore:
        """Of every domain's router logits [T, N]."""
        totals = torch.zeros(3, dtype=torch.double)
        for right, part in zip(self.right, logits, strict=True):
            log_probability = _log_probability(part, right)
            parts = (right[part.argmax(-1)], log_probability.exp(), -log_probability)
            totals += torch.stack([value.mean(dtype=torch.double) for value in parts])
        accuracy, probability, cross_entropy = (totals / len(logits)).tolist()
        return RouterScore(accuracy=accuracy, probability=probability, cross_entropy=cross_entropy)

    def chance(self) -> RouterScore:
        """Of equal logits; the accuracy is that of a random choice."""
        share = self.right.double().mean(1)  # [C]
        return RouterScore(
            accuracy=share.mean().item(), probability=share.mean().item(), cross_entropy=-share.log().mean().item()
        )

    def calibrated(self, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        """`weight` [N, d] times the factor with which the domains' tokens [T, d] have the least cross-entropy."""
        logits = [router_logits(part, weight) for part in inputs]
        spread = math.sqrt(sum(part.square().mean().item() for part in logits) / len(logits))
        if spread == 0.0:
            return weight  # domains that do not differ at all

        def cross_entropy(log_factor: float) -> float:
            factor = math.exp(log_factor)
            parts = zip(self.right, logits, strict=True)
            return -sum(_log_probability(part * factor, right).mean().item() for right, part in parts)

        low, high = (math.log(limit / spread) for limit in SPREADS)
        return weight * math.exp(_minimum(cross_entropy, low, high))


def router_logits(inputs: Tensor, weight: Tensor) -> Tensor:
    """As `BamRouter` computes them, in fp32: inputs [T, d], weight [N, d] -> [T, N]."""
    return torch.cat([part.float() @ weight.float().T for part in inputs.split(CHUNK)])


def fit_router(
    assignment: Assignment, inputs: list[Tensor], noise: Callable[[], torch.Generator]
) -> dict[Initialisation, Tensor]:
    """A router by "means" and by "ridge" [N, d] in double precision, from each domain's inputs [T, d].

    `noise` gives the generator of the copies' noise, the same each time.
    """
    tuned = [len(part) // TUNING_SHARE for part in inputs]
    if min(tuned) == 0:  # next to no text: nothing to keep
        learn = tune = inputs
    else:
        learn = [part[: len(part) - count] for part, count in zip(inputs, tuned, strict=True)]
        tune = [part[len(part) - count :] for part, count in zip(inputs, tuned, strict=True)]

    def cross_entropy(weight: Tensor) -> float:
        return assignment.score([router_logits(part, weight) for part in tune]).cross_entropy

    return {
        kind: min(
            (assignment.calibrated(assignment.expand(rows, noise()), tune) for rows in choices), key=cross_entropy
        )
        for kind, choices in domain_rows(learn).items()
    }


def domain_rows(inputs: list[Tensor]) -> dict[Initialisation, list[Tensor]]:
    """Rows [C, d] in double precision from each domain's inputs [T, d]: by "means", and by "ridge" for each λ."""
    means = torch.stack([_mean(part) for part in inputs])  # [C, d]
    centre = means.mean(0)
    differences = means - centre
    along = differences @ centre / centre.square().sum().clamp_min(torch.finfo(torch.double).tiny)
    moments = _second_moment(inputs)
    size = moments.diagonal().mean()
    identity = torch.eye(len(moments), dtype=torch.double)
    factors = (torch.linalg.cholesky(moments + ridge * size * identity) for ridge in RIDGES)
    return {
        "means": [differences - along.unsqueeze(1) * centre],
        "ridge": [torch.cholesky_solve(differences.T, factor).T for factor in factors],
    }


def _mean(inputs: Tensor) -> Tensor:
    return torch.stack([part.double().sum(0) for part in inputs.split(CHUNK)]).sum(0) / len(inputs)


def _second_moment(inputs: list[Tensor]) -> Tensor:
    """The mean over domains of their mean x·xᵀ: [d, d], double."""
    width = inputs[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.double)
    for domain in inputs:
        for part in domain.split(CHUNK):
            wide = part.double()
            total.addmm_(wide.T, wide, alpha=1.0 / (len(domain) * len(inputs)))
    return total


def _log_probability(logits: Tensor, right: Tensor) -> Tensor:
    """Of the right experts [N] together: logits [T, N] -> [T]."""
    return logits[:, right].logsumexp(-1) - logits.logsumexp(-1)


def _minimum(f: Callable[[float], float], low: float, high: float) -> float:
    """Where f, which falls and then rises, is least between `low` and `high`: golden section, to 1e-3."""
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
