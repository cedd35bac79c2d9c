"""The results of an evaluation as data: the scores of every model on every domain, and the findings that follow.

The mean over domains is the arithmetic mean of perplexities, as in the tables of the paper. Intervals come from a
bootstrap over the held-out sequences. They cover the choice of the held-out text only, not the variation that another
training seed would cause.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, FiniteFloat

from bam_ray.evaluation.bootstrap import bootstrap_perplexity, interval_95
from bam_ray.evaluation.serving_cost import ServingCost
from bam_ray.settings import Strict

MEAN = "mean"  # the column of means, after the columns of the domains

ModelKind = Literal["seeds", "branches", "controls", "mixtures", "ensembles"]
FindingKind = Literal[
    "branch_beats_seed",
    "mixture_beats_seed",
    "mixture_beats_dense",
    "mixture_beats_dense_with_prior",
    "mixture_beats_ensemble",
    "kv_experts_beats_btx",
    "kv_shared_between",
]


class DomainScore(Strict):
    """The score of one model on one domain. All sequences have equal length and weight."""

    nll: FiniteFloat
    perplexity: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat]  # 95 % interval of the perplexity
    tokens: int  # number of predicted tokens: L - 1 per sequence
    sequence_nll: tuple[FiniteFloat, ...]  # mean NLL of each sequence, in nats per token

    @staticmethod
    def from_sequence_nll(sequence_nll: Sequence[float], tokens: int) -> "DomainScore":
        """Return the score of sequences of equal length with the given mean NLLs."""
        nll = math.fsum(sequence_nll) / len(sequence_nll)
        return DomainScore(
            nll=nll,
            perplexity=math.exp(nll),
            interval=interval_95(bootstrap_perplexity(sequence_nll)),
            tokens=tokens,
            sequence_nll=tuple(sequence_nll),
        )


class OracleScore(Strict):
    """The scores of a mixture on one domain whose tokens are all routed to the domain's expert."""

    expert: str  # "seed" or the name of the branch
    unmixed: DomainScore  # before the mixing phase
    mixed: DomainScore  # after it


class GapParts(Strict):
    """The gap in NLL between a mixture and a specialist, in nats per token; see `decomposition`."""

    model: str
    domain: str
    specialist: str  # label of the model that the domain's expert was made from
    averaging: FiniteFloat
    drift: FiniteFloat
    routing: FiniteFloat
    total: FiniteFloat  # the sum of the three


class LmEvalScore(Strict):
    """One metric of a model on one task of lm-eval."""

    task: str
    metric: str  # such as "acc", or "exact_match, strict-match" if the task filters the answers
    value: FiniteFloat
    stderr: FiniteFloat | None = None  # the standard error over the documents; None: lm-eval gives none


class LayerRouting(Strict):
    """The routing of one layer. Tuples have one number per expert; those of attention are empty if it is averaged."""

    ffn_share: tuple[FiniteFloat, ...]  # share of all top-k choices; sums to 1
    ffn_probability: tuple[FiniteFloat, ...]  # mean softmax over all experts; sums to 1
    ffn_entropy: FiniteFloat  # mean over tokens, in nats: 0 certain, ln N uniform
    load_imbalance: FiniteFloat  # largest share ÷ mean share: 1 balanced, N if one expert gets every token
    dead_experts: tuple[int, ...]  # experts that no token chose
    attention_gate: tuple[FiniteFloat, ...]  # mean gate; sums to 1 if all experts are active
    attention_entropy: FiniteFloat | None  # entropy of the softmax of the gates


class DomainRouting(Strict):
    """The routing of all layers on one domain, or on all domains together."""

    tokens: int
    layers: tuple[LayerRouting, ...]


class MixtureRouting(Strict):
    """The routing of one mixture."""

    expert_names: tuple[str, ...]
    domains: dict[str, DomainRouting]
    overall: DomainRouting  # over the tokens of all domains: an expert that is dead here is dead in every domain


class ModelScore(Strict):
    """The scores of one model on all domains, with its size and its cost.

    `tokens`, `steps`, `flops` and `worker_seconds` cover the training of the model itself. The `lineage_` fields
    include the models that it was made from.
    """

    id: str
    name: str
    kind: ModelKind
    attention_experts: Literal["kv_experts", "kv_shared", "averaged"] | None = None  # None: a dense model
    experts: int = 1
    experts_per_token: int = 1
    parameters: int
    active_parameters: int  # parameters that process one token
    tokens: int = 0
    lineage_tokens: int = 0
    flops: float = 0.0
    lineage_flops: float = 0.0
    steps: int = 0
    processes: int = 1  # that trained the model at the end
    worker_seconds: float = 0.0  # duration of all steps, summed over the processes; 0: not known
    branches: tuple[str, ...] = ()  # names of the branches that a mixture or an ensemble was made from
    domains: dict[str, DomainScore]
    routing: MixtureRouting | None = None
    serving: ServingCost | None = None
    oracle: dict[str, OracleScore] = Field(default={})  # by domain: of a mixture with an expert of the domain
    lm_eval: tuple[LmEvalScore, ...] = ()  # on the tasks of `evaluate.lm_eval_tasks`

    @property
    def label(self) -> str:
        """The name of the model in tables and figures."""
        return model_label(self.kind, self.name)

    @property
    def is_btx(self) -> bool:
        """True for a mixture without attention experts."""
        return self.attention_experts == "averaged"

    def perplexity(self, column: str) -> float:
        """Return the perplexity on a domain, or the mean over all domains for the column `MEAN`."""
        if column == MEAN:
            return math.fsum(score.perplexity for score in self.domains.values()) / len(self.domains)
        return self.domains[column].perplexity

    def interval(self, column: str) -> tuple[float, float]:
        """Return the 95 % interval of `perplexity(column)`."""
        return interval_95(self.bootstrap(MEAN)) if column == MEAN else self.domains[column].interval

    def bootstrap(self, column: str) -> np.ndarray:
        """Return `perplexity(column)` in each resample, [RESAMPLES]. Each domain has its own draws."""
        if column == MEAN:
            return np.asarray(np.mean([self.bootstrap(domain) for domain in self.domains], axis=0))
        return bootstrap_perplexity(self.domains[column].sequence_nll, seed=list(self.domains).index(column))


UNSURE = 0.025  # share of the resamples that may contradict a finding


class Finding(Strict):
    """The claim that the perplexities in `values` are strictly increasing, in their order."""

    about: FindingKind
    claim: str
    column: str  # a domain or "mean"
    values: dict[str, FiniteFloat]  # label of the model -> perplexity
    holds: bool  # True if the measured perplexities are in this order
    support: float = Field(ge=0.0, le=1.0)  # share of the resamples in which they are in this order

    @property
    def verdict(self) -> Literal["yes", "no", "?"]:
        """`yes` or `no` if at least 97.5 % of the resamples agree, else `?`: the difference may be chance."""
        if min(self.support, 1.0 - self.support) > UNSURE:
            return "?"
        return "yes" if self.holds else "no"


class Results(Strict):
    """All results of the evaluation of one run."""

    run: str
    domains: tuple[str, ...]
    models: tuple[ModelScore, ...]
    means: dict[str, FiniteFloat]  # model id -> mean perplexity over domains
    best: dict[str, str]  # column -> id of the model with the lowest perplexity
    findings: tuple[Finding, ...]
    gap_parts: tuple[GapParts, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The domains, followed by the mean."""
        return (*self.domains, MEAN)


def model_label(kind: ModelKind, name: str) -> str:
    """Return the name of a model in tables and figures: "seed", "branch code", "dense-2x", "mixture bam"."""
    words = {"seeds": "", "branches": "branch ", "controls": "", "mixtures": "mixture ", "ensembles": "ensemble "}
    return words[kind] + name
