"""The dense curve: the mean NLL of the dense controls over the tokens that they are trained on after the seed.

Between two neighboring controls, the NLL is linear in the logarithm of the tokens. Outside the measured controls there
is no value: nothing is extrapolated. All controls have the same model, so their FLOPs are proportional to their tokens,
and the curve over FLOPs is the same.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import FiniteFloat

from bam_ray.evaluation.bootstrap import interval_95
from bam_ray.evaluation.samples import IntervalEstimate, Samples, SeedSamples, Verdict
from bam_ray.evaluation.wall_clock import STEP_SECONDS
from bam_ray.settings import Strict

Place = Literal["between", "below", "above"]

TOLERANCE = 1e-9  # relative; tokens that follow from FLOPs have rounding errors


class DenseMatch(Strict):
    """A model, compared with a dense control that is trained at the same cost."""

    model: str
    cost: str  # what is equal: "tokens", "FLOPs", or time with one of the `STEP_SECONDS` of dense training
    tokens: FiniteFloat  # tokens after the seed on which the dense control is trained
    place: Place  # of the tokens, relative to those of the measured controls
    nll: IntervalEstimate | None = None  # negative if the model is better; None unless the place is "between"
    percent: IntervalEstimate | None = None  # the same as a change of perplexity
    by_seed: tuple[FiniteFloat, ...] = ()  # nats per token, one for each training seed
    verdict: Verdict | None = None
    add_multiple: FiniteFloat | None = None  # for `compare.dense`, so that the tokens are in the measured range

    @property
    def condition(self) -> str:
        """The condition of the comparison: `at equal FLOPs`, `in equal time, data parallel`."""
        return f"in equal time, {self.cost}" if self.cost in STEP_SECONDS else f"at equal {self.cost}"


class DenseEquivalent(Strict):
    """The tokens after the seed with which a dense control has the mean NLL of a model."""

    model: str
    place: Place  # relative to the tokens of the controls
    tokens: FiniteFloat | None  # None unless the place is "between"
    interval: tuple[FiniteFloat, FiniteFloat]  # 95 %, limited to the measured range
    measured: tuple[int, int]  # tokens of the smallest and of the largest control
    used: int  # tokens that the model, its branches and its mixing phase were trained on
    share: FiniteFloat | None  # tokens ÷ used


class DenseCurve:
    """The dense curve of several training seeds.

    Args:
        points: (tokens, mean NLL) of each control, at least one.
        largest_multiple: The multiple in `compare.dense` of the control with the most tokens.
    """

    def __init__(self, points: Sequence[tuple[int, SeedSamples]], largest_multiple: float) -> None:
        self._points = sorted(points, key=lambda point: point[0])
        self._largest_multiple = largest_multiple

    @property
    def measured(self) -> tuple[int, int]:
        """The tokens of the smallest and of the largest control."""
        return self._points[0][0], self._points[-1][0]

    def place(self, tokens: float) -> Place:
        """Return the place of a number of tokens relative to the controls."""
        lowest, highest = self.measured
        if tokens < lowest * (1 - TOLERANCE):
            return "below"
        return "above" if tokens > highest * (1 + TOLERANCE) else "between"

    def nll(self, tokens: float) -> SeedSamples:
        """Return the mean NLL of a dense control with `tokens` tokens, whose place must be "between"."""
        assert self.place(tokens) == "between"
        tokens = min(max(tokens, self.measured[0]), self.measured[1])
        for (start, before), (end, after) in pairwise(self._points):
            if tokens <= end:
                return before.interpolated(after, math.log(tokens / start) / math.log(end / start))
        return self._points[-1][1]

    def match(self, model: str, nll: SeedSamples, cost: str, tokens: float, samples: Samples) -> DenseMatch:
        """Return the paired difference between a model and a dense control with `tokens` tokens."""
        place = self.place(tokens)
        if place != "between":
            multiple = tokens / self.measured[1] * self._largest_multiple
            add = two_digits(multiple, up=place == "above")
            return DenseMatch(model=model, cost=cost, tokens=tokens, place=place, add_multiple=add)
        difference = samples.difference(nll - self.nll(tokens))
        return DenseMatch(model=model, cost=cost, tokens=tokens, place=place, **difference)

    def equivalent(self, model: str, nll: SeedSamples, used: int, samples: Samples) -> DenseEquivalent:
        """Return the dense-equivalent tokens of a model that was trained on `used` tokens, with their interval."""
        tokens = [point[0] for point in self._points]
        measured = [point[1].measured.mean() for point in self._points]
        place, found = crossing(list(zip(tokens, measured, strict=True)), float(nll.measured.mean()))
        curve = np.stack([samples.seed_means(point[1]) for point in self._points], axis=1)  # [B, controls]
        drawn = [
            crossing(list(zip(tokens, levels, strict=True)), level)
            for levels, level in zip(curve.tolist(), samples.seed_means(nll).tolist(), strict=True)
        ]
        lowest, highest = self.measured
        values = [each or (lowest if where == "below" else highest) for where, each in drawn]
        return DenseEquivalent(
            model=model,
            place=place,
            tokens=found,
            interval=interval_95(np.array(values)),
            measured=self.measured,
            used=used,
            share=found / used if found is not None and used else None,
        )


def crossing(curve: Sequence[tuple[float, float]], nll: float) -> tuple[Place, float | None]:
    """Return where the dense curve reaches `nll`: the place relative to its points, and the tokens if it is between.

    If the curve is not monotone, the crossing with the fewest tokens counts.

    Args:
        curve: (tokens, mean NLL) of at least one dense control, by increasing tokens.
        nll: The mean NLL to reach, in nats per token.
    """
    if nll > curve[0][1]:
        return "below", None
    for (tokens, before), (next_tokens, after) in pairwise(curve):
        if before >= nll >= after:
            part = (before - nll) / (before - after) if before > after else 0.0
            return "between", math.exp((1 - part) * math.log(tokens) + part * math.log(next_tokens))
    return "above", None


def two_digits(number: float, up: bool) -> float:
    """Round a positive number up or down to two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    whole = math.ceil(number / unit - TOLERANCE) if up else math.floor(number / unit + TOLERANCE)
    return float(f"{whole * unit:.2g}")
