"""Settings of the controls: dense models that a mixture is compared with."""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from bam_ray.settings.methods import BtxSettings, RouterSettings
from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Count, Identity, Positive, Strict
from bam_ray.settings.training import Momentum

MAX_MULTIPLE = 1000.0

Multiple = Annotated[float, Field(gt=0.0, le=MAX_MULTIPLE)]
PriorForm = Literal["tables", "vectors"]
PRIOR_CONTROLS: dict[str, PriorForm] = {f"dense-prior-{form}": form for form in get_args(PriorForm)}
"""The names of the controls with a prior."""

DILOCO = "dense-diloco"  # the name of the control of `compare.diloco`


def control_name(multiple: float) -> str:
    """Return the name of the control that trains on `multiple` times the tokens: `dense`, `dense-0.25x`, `dense-2x`."""
    return "dense" if multiple == 1.0 else f"dense-{multiple:g}x"


def dense_multiple(name: str) -> float | None:
    """Return the multiple of a control with a name of `control_name`; None for any other name."""
    found = re.fullmatch(r"dense(?:-([0-9.e+-]+)x)?", name)
    return None if found is None else float(found.group(1) or 1.0)


def domain_tables(layers: int) -> BtxSettings:
    """Return the method that makes a dense model with one table for each domain, gated by the prior of the domains.

    Its models are as many copies of the seed as there are domains. All `layers` layers are those of the seed.
    """
    return BtxSettings(
        method="btx",
        seed_expert=False,
        embeddings="experts",
        dense_layers=tuple(range(layers)),
        router=RouterSettings(init="zero", input="prefix", prior="bigram"),
    )


class DiLoCoSettings(Strict):
    """DiLoCo (arXiv 2311.08105): workers train copies of a model, which are averaged only every few steps."""

    workers: Count
    """Number of workers, each with its own copy. They share every batch equally. The number is part of what the control
    learns, so it never changes while the control trains."""
    every: Count = 100
    """Number of steps between two outer steps, in which all copies become one model."""
    outer_lr: Positive = 0.7
    """Learning rate of the outer steps."""
    outer_momentum: Momentum = 0.9
    """Nesterov momentum of the outer steps."""


class CompareSettings(Strict):
    """Controls: the seed, trained further as one dense model on the blend of the mixing phase.

    The settings of their training are those of `mix.training`. Only the number of tokens differs, and the learning rate
    if `peak_lr` is given. The blend is `mix.blend`, which stays constant.
    """

    dense: Annotated[list[Multiple], Identity.EXCLUDED] = Field(default=[1.0], min_length=1)
    """One control for each number, which is a multiple of the tokens that all branches and the mixing phase of one
    mixture train on together. (The identity of a control contains its own number of tokens only.)"""
    prior: Annotated[tuple[PriorForm, ...], Identity.EXCLUDED] = ()
    """Controls that have the prior of `router.prior: bigram` over all domains, so that the gain from this knowledge is
    not mistaken for that of experts. They train on the tokens of the multiple 1. `tables` (the control
    `dense-prior-tables`): an embedding and an output head for each domain, weighted as in `embeddings: experts`.
    `vectors` (`dense-prior-vectors`): for each domain a vector that is added to the input, one that is added to the
    last hidden state, and a bias of the logits, weighted by the prior."""
    diloco: Annotated[DiLoCoSettings | None, Identity.EXCLUDED] = None
    """The control `dense-diloco`, which is trained on the tokens of the multiple 1 by workers that rarely communicate,
    as branches are. `null` means that there is none. (The identity of this control contains these settings.)"""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Identity.EXCLUDED] = Field(
        default=(0, 1, 2), min_length=1
    )
    """Training seeds of `bam compare`, which makes the models of the recipe once for each of them. Other commands use
    the seeds of the recipe."""
    nodes: Annotated[Count, Identity.EXCLUDED] = 4
    """Number of equal nodes for which `bam compare` computes, from measured speeds, the quality in equal time."""
    network_gbit_per_s: Annotated[Positive, Identity.EXCLUDED] = 10.0
    """Speed of the network of each of these nodes, in Gbit/s."""
    peak_lr: Positive | None = None
    """Learning rate of the controls after warm-up. `null` means that of `mix.training`."""
    workers: Annotated[Count, Identity.EXCLUDED] = 1
    """Number of processes that train each control together, except `dense-diloco`."""
    min_workers: Annotated[Count | None, Identity.EXCLUDED] = None
    """If nodes are lost for good, continue with at least this many workers. `null` means to wait for all."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of each worker."""
    max_attempts: Annotated[Count, Identity.EXCLUDED] = 4
    """Number of attempts in a row without a new checkpoint after which a control fails."""

    @property
    def prior_controls(self) -> dict[str, PriorForm]:
        """The controls with a prior, by name."""
        return {name: form for name, form in PRIOR_CONTROLS.items() if form in self.prior}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [control_name(multiple) for multiple in self.dense]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"compare.dense has two controls named {twice}: give each multiple once")
        return self

    @model_validator(mode="after")
    def _forms_differ(self) -> Self:
        if len(set(self.prior)) < len(self.prior):
            raise ValueError("compare.prior contains a form twice: give each form once")
        return self

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        twice = next((seed for seed in self.seeds if self.seeds.count(seed) > 1), None)
        if twice is not None:
            raise ValueError(f"compare.seeds contains {twice} twice: give each training seed once")
        return self
