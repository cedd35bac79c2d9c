"""The comparison of the models of a recipe over several training seeds, as data.

The models of all training seeds are scored on the same held-out sequences, and are paired by label. Intervals come from
a hierarchical bootstrap: each resample draws training seeds with replacement, and then held-out sequences of each
domain with replacement, the same for all models (see `bootstrap.Resamples`). So a difference between two models does
not contain the noise that they share: text that is hard for both, and a training seed that is bad for both.

Two models are compared by their mean NLL over the domains, because differences of NLL do not depend on how hard a
domain is. In percent, a difference d is e^d - 1, the change of the geometric mean of the perplexities. The column
`mean` of the table is the arithmetic mean of the perplexities, as in the report.
"""

from pydantic import FiniteFloat

from bam_ray.evaluation.dense_curve import DenseEquivalent, DenseMatch
from bam_ray.evaluation.results import MEAN, ModelKind
from bam_ray.evaluation.samples import IntervalEstimate, Verdict
from bam_ray.evaluation.serving_cost import ServingCost
from bam_ray.evaluation.wall_clock import WallClock
from bam_ray.settings import Strict, control_name

COMPARISON = "comparison.json"
PAGE = "index.html"
CLOSE_PERCENT = 5.0  # a mixture is close to a specialist if its perplexity is at most this much higher
DENSE_LABEL = control_name(1.0)
ONE_SEED = (
    "There is only one training seed. The intervals cover the choice of the held-out text, and no variation over "
    "training seeds: another seed may reverse these results."
)


class TrainedModel(Strict):
    """One model of one training seed."""

    training_seed: int
    id: str
    perplexity: dict[str, FiniteFloat]  # by column: the domains and their mean
    nll: FiniteFloat  # mean over the domains, in nats per token
    lineage_tokens: int
    lineage_flops: FiniteFloat


class ComparedTask(Strict):
    """One metric of a model on one task of lm-eval."""

    task: str
    metric: str
    mean: FiniteFloat  # over the training seeds
    by_seed: tuple[FiniteFloat, ...]


class ComparedModel(Strict):
    """The models of all training seeds that have the same label."""

    label: str
    kind: ModelKind
    perplexity: dict[str, IntervalEstimate]  # by column
    trained: tuple[TrainedModel, ...]  # one for each training seed
    serving: ServingCost | None = None
    lm_eval: tuple[ComparedTask, ...] = ()


class Difference(Strict):
    """The difference in mean NLL between a model and another one. It is negative if the model is better."""

    model: str
    other: str
    nll: IntervalEstimate  # nats per token
    percent: IntervalEstimate  # the same as a change of perplexity
    by_seed: tuple[FiniteFloat, ...]  # nats per token, one for each training seed
    verdict: Verdict

    @property
    def same_sign(self) -> int:
        """The number of training seeds in which the better model is the one that is better in the mean."""
        return sum((each < 0) == (self.nll.value < 0) and each != 0 for each in self.by_seed)


class SpecialistGap(Strict):
    """The difference in NLL between a model and the branch of a domain, on that domain."""

    model: str
    domain: str
    percent: IntervalEstimate  # of perplexity; positive if the branch is better
    close: bool  # True if the whole interval is at most `CLOSE_PERCENT`


class GapEstimate(Strict):
    """The gap in NLL between a mixture and a specialist on its domain, in nats per token; see `decomposition`."""

    model: str
    domain: str
    specialist: str  # label of the model that the domain's expert was made from
    averaging: IntervalEstimate
    drift: IntervalEstimate
    routing: IntervalEstimate
    total: IntervalEstimate


class Comparison(Strict):
    """The comparison of all models of a recipe."""

    run: str
    training_seeds: tuple[int, ...]
    reports: tuple[str, ...]  # their ids, one for each training seed
    domains: tuple[str, ...]
    sequences: dict[str, int]  # held-out sequences by domain
    resamples: int
    models: tuple[ComparedModel, ...]
    differences: tuple[Difference, ...]
    gaps: tuple[SpecialistGap, ...]
    gap_parts: tuple[GapEstimate, ...]
    undecomposed: tuple[str, ...]  # labels of the mixtures that have no parts of the gap
    equivalents: tuple[DenseEquivalent, ...]
    matches: tuple[DenseMatch, ...]  # with dense controls at equal cost
    clock: WallClock | None  # None: the time of a dense control is not known
    statements: tuple[str, ...]  # lines about each mixture and each ensemble

    @property
    def columns(self) -> tuple[str, ...]:
        """The domains, followed by the mean."""
        return (*self.domains, MEAN)

    @property
    def limits(self) -> tuple[str, ...]:
        """The lines that say which variation the comparison does not cover; empty if it covers several seeds."""
        return (ONE_SEED,) if len(self.training_seeds) == 1 else ()

    @property
    def losses(self) -> dict[str, list[str]]:
        """By label: what a mixture or an ensemble is behind of."""
        found: dict[str, list[str]] = {}
        for each in self.differences:
            if each.verdict == "behind":
                found.setdefault(each.model, []).append(each.other)
        for match in self.matches:
            if match.verdict == "behind":
                found.setdefault(match.model, []).append(f"{DENSE_LABEL} {match.condition}")
        return found
