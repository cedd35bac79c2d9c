"""Results as data: the scores of every model on every domain, and what follows from them.

The mean over domains is the arithmetic mean of perplexities, as in the paper's tables. Intervals and the support of a
finding come from one bootstrap over held-out sequences. Two models are resampled with the same draws, so a comparison
is paired: text that is hard for both does not blur it.

A finding is an ordering of perplexities. `holds` says whether the measured numbers have it, `support` in which share of
the resamples it was seen: a finding that holds with a support of 0.6 is not much of one. The intervals and the support
know of the held-out text alone, not of what another training seed would have given.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.settings import Strict

RESAMPLES = 1000
MEAN = "mean"  # the column of means, beside those of the domains

ModelKind = Literal["seeds", "branches", "mixtures"]
About = Literal["branch_beats_seed", "mixture_beats_seed", "kv_experts_beats_btx", "kv_shared_between"]


class DomainScore(Strict):
    """One model on one domain. `sequence_nll` has each sequence's mean NLL in nats a token; all count alike."""

    nll: FiniteFloat
    perplexity: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat]  # 95 % of the perplexity
    tokens: int  # predicted: L - 1 of every sequence
    sequence_nll: tuple[FiniteFloat, ...]

    @staticmethod
    def of(sequence_nll: Sequence[float], tokens: int) -> "DomainScore":
        """The score of sequences of equal length with these mean NLLs."""
        nll = math.fsum(sequence_nll) / len(sequence_nll)
        return DomainScore(
            nll=nll,
            perplexity=math.exp(nll),
            interval=middle_95(resampled(sequence_nll)),
            tokens=tokens,
            sequence_nll=tuple(sequence_nll),
        )


class LayerRouting(Strict):
    """The routing of one layer. Lists have one number an expert; attention's are empty where attention is averaged."""

    ffn_share: tuple[FiniteFloat, ...]  # of all top-k choices; sums to 1
    ffn_probability: tuple[FiniteFloat, ...]  # mean softmax over all experts; sums to 1
    ffn_entropy: FiniteFloat  # mean of tokens, nats: 0 certain, ln N undecided
    load_imbalance: FiniteFloat  # largest share ÷ mean share: 1 balanced, N all on one
    dead_experts: tuple[int, ...]  # that no token chose
    attention_gate: tuple[FiniteFloat, ...]  # mean gate; sums to 1 where routing is soft
    attention_entropy: FiniteFloat | None  # of the gates' softmax


class DomainRouting(Strict):
    """The routing of all layers on one domain, or on all of them together."""

    tokens: int
    layers: tuple[LayerRouting, ...]


class Routing(Strict):
    """The routing of one mixture."""

    expert_names: tuple[str, ...]
    domains: dict[str, DomainRouting]
    overall: DomainRouting  # all domains' tokens together: an expert dead here is dead


class ModelScore(Strict):
    """One model on all domains, and what it is. `flops`, `tokens`: its own training; `lineage_`: its ancestors' too."""

    id: str
    name: str
    kind: ModelKind
    attention_experts: Literal["kv_experts", "kv_shared", "averaged"] | None = None  # of mixtures
    experts: int = 1
    experts_per_token: int = 1
    parameters: int
    active_parameters: int  # met by one token
    tokens: int = 0
    lineage_tokens: int = 0
    flops: float = 0.0
    lineage_flops: float = 0.0
    domains: dict[str, DomainScore]
    routing: Routing | None = None

    @property
    def label(self) -> str:
        """What people call it."""
        return label(self.kind, self.name)

    @property
    def is_btx(self) -> bool:
        """Whether it is a mixture without attention experts."""
        return self.attention_experts == "averaged"

    def perplexity(self, column: str) -> float:
        """On a domain, or the `MEAN` of all."""
        if column == MEAN:
            return math.fsum(score.perplexity for score in self.domains.values()) / len(self.domains)
        return self.domains[column].perplexity

    def interval(self, column: str) -> tuple[float, float]:
        """95 % interval of `perplexity(column)`."""
        return middle_95(self.resampled(MEAN)) if column == MEAN else self.domains[column].interval

    def resampled(self, column: str) -> np.ndarray:
        """`perplexity(column)` in every resample: [RESAMPLES]. Each domain has draws of its own."""
        if column == MEAN:
            return np.asarray(np.mean([self.resampled(domain) for domain in self.domains], axis=0))
        return resampled(self.domains[column].sequence_nll, draw=list(self.domains).index(column))


class Finding(Strict):
    """The claim that the perplexities `values`, in their order, rise strictly."""

    about: About
    claim: str
    column: str  # a domain or "mean"
    values: dict[str, FiniteFloat]  # label of the model -> perplexity
    holds: bool
    support: float = Field(ge=0.0, le=1.0)  # share of resamples in which it holds


class Results(Strict):
    """Everything the evaluation of a run says."""

    run: str
    domains: tuple[str, ...]
    models: tuple[ModelScore, ...]
    means: dict[str, FiniteFloat]  # model id -> mean perplexity over domains
    best: dict[str, str]  # column -> model id
    findings: tuple[Finding, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The domains, then the mean."""
        return (*self.domains, MEAN)

    @staticmethod
    def of(run: str, models: Sequence[ModelScore]) -> "Results":
        """The results of `models`, all scored on the same domains."""
        domains = tuple(models[0].domains)
        assert all(tuple(model.domains) == domains for model in models)
        return Results(
            run=run,
            domains=domains,
            models=tuple(models),
            means={model.id: model.perplexity(MEAN) for model in models},
            best={
                column: min(models, key=lambda model, column=column: model.perplexity(column)).id  # type: ignore[misc]
                for column in (*domains, MEAN)
            },
            findings=tuple(findings(models)),
        )


def label(kind: ModelKind, name: str) -> str:
    """What people call a model: "seed", "branch code", "mixture bam"."""
    return name if kind == "seeds" else f"{ArtifactKind(kind).label} {name}"


def resampled(sequence_nll: Sequence[float], draw: int = 0) -> np.ndarray:
    """Perplexity in every bootstrap resample of the sequences: [RESAMPLES]. The same draws for the same arguments."""
    values = np.asarray(sequence_nll)
    picks = np.random.default_rng(draw).integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(np.exp(values[picks].mean(axis=1)))


def middle_95(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of samples."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


def findings(models: Sequence[ModelScore]) -> list[Finding]:
    """What the paper's claims come to with these models. A claim whose models are missing is left out."""
    seeds = [model for model in models if model.kind == "seeds"]
    branches = [model for model in models if model.kind == "branches"]
    mixtures = [model for model in models if model.kind == "mixtures"]
    kv_experts = [model for model in mixtures if model.attention_experts == "kv_experts"]
    kv_shared = [model for model in mixtures if model.attention_experts == "kv_shared"]
    btx = [model for model in mixtures if model.is_btx]
    found: list[Finding] = []
    for seed in seeds:
        found += [
            _finding(
                "branch_beats_seed",
                f"{branch.label} beats the seed on {branch.name}",
                branch.name,
                branch,
                seed,
            )
            for branch in branches
            if branch.name in branch.domains
        ]
        found += [
            _finding("mixture_beats_seed", f"{mixture.label} beats the seed in mean perplexity", MEAN, mixture, seed)
            for mixture in mixtures
        ]
    for bam in kv_experts:
        for baseline in btx:
            claim = f"{bam.label} (kv_experts) beats {baseline.label} (BTX) in mean perplexity"
            found.append(_finding("kv_experts_beats_btx", claim, MEAN, bam, baseline))
            for shared in kv_shared:
                claim = f"{shared.label} (kv_shared) lies between {bam.label} (kv_experts) and {baseline.label} (BTX)"
                found.append(_finding("kv_shared_between", claim, MEAN, bam, shared, baseline))
    return found


def _finding(about: About, claim: str, column: str, *models: ModelScore) -> Finding:
    """Whether the perplexities of `models` rise in the order given."""
    values = {model.label: model.perplexity(column) for model in models}
    rises = np.diff(np.stack([model.resampled(column) for model in models]), axis=0) > 0  # [models - 1, RESAMPLES]
    measured: Any = np.diff(list(values.values())) > 0
    return Finding(
        about=about,
        claim=claim,
        column=column,
        values=values,
        holds=bool(measured.all()),
        support=float(rises.all(axis=0).mean()),
    )
