"""An engine: one model and its optimizer, on one process or many, behind three verbs.

The loop decides what to train on and how fast; an engine does one step of it exactly. `TorchEngine` is the plain one,
on one device; `on_deepspeed` has the expert-parallel one. Both give the same numbers.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import LossNotFinite, LossSpiked, TrainingError
from bam_ray.settings import Mixing, TrainingSettings
from bam_ray.training.memory import Memory, memory_of
from bam_ray.training.micro_batch import halved_to_fit, largest_that_fits
from bam_ray.training.next_token import NextTokenLoss
from bam_ray.training.objective import (
    Load,
    Objective,
    all_of_one,
    as_mixture,
    balance,
    held_out_nll,
    load_of,
    objective,
    parts_of,
)
from bam_ray.training.param_groups import freeze, groups, set_rates
from bam_ray.training.state import ADAM_STATES, State, read_optimizer, read_weights, snapshot

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepResult:
    """Means over the global batch: nats per token, the auxiliary losses apart, and the norm before clipping."""

    nll: float
    load_balance: float
    router_z: float
    grad_norm: float


@dataclass(frozen=True)
class Limits:
    """What the loss and the norm of its gradient must not be above."""

    nll: float = math.inf
    grad_norm: float = math.inf

    def check(self, nll: float, grad_norm: float = 0.0) -> None:
        """Raise `LossSpiked` where one is."""
        if nll > self.nll:
            raise LossSpiked(f"the loss ({nll:.4g}) is above {self.nll:.4g}")
        if grad_norm > self.grad_norm:
            raise LossSpiked(f"the gradient's norm ({grad_norm:.4g}) is above {self.grad_norm:.4g}")


NO_LIMITS = Limits()


class Engine(Protocol):
    """One model and its optimizer."""

    rank: int
    world_size: int
    precision: Precision
    micro_batch: int | None  # sequences that go through the model at once; None: not known before the first step
    memory: Memory
    model: PreTrainedModel
    last_load: Load | None  # of the global batch of the last step; None for dense models
    last_exchange: float | None  # seconds of the last step that tokens were on their way; None: all experts are here

    @property
    def device_name(self) -> str:
        """What it computes on, for people."""
        ...

    def step(
        self, input_ids: Tensor, lr: float, limits: Limits = NO_LIMITS, domains: Tensor | None = None
    ) -> StepResult:
        """Forward, backward in micro batches, clip, update; on this rank's share [B, L] int64 of the global batch.

        `domains` [B, D]: 1 where a sequence is of a domain, else 0, for the load by domain; None: all are of one.
        Raises `LossNotFinite` where the loss or the gradient is not finite, `LossSpiked` where one is above `limits`;
        nothing is updated then.
        """
        ...

    def evaluate(self, input_ids: Tensor) -> float:
        """The mean NLL of all ranks' rows, in nats a token; this one's are [B, L] int64, as many as every rank's."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; the same answer on all, when all have asked."""
        ...

    def gather(self, mine: Any) -> list[Any]:
        """What all ranks give, plain values in the order of ranks; the same on all, when all have given theirs."""
        ...

    def mean(self, value: float) -> float:
        """The mean over ranks; the same on all, when all have given theirs."""
        ...

    def state(self) -> State | None:
        """The canonical state, on rank 0; None elsewhere. Called on all ranks."""
        ...

    def load(self, folder: Path) -> None:
        """Read a canonical state, whatever the number of ranks that wrote it."""
        ...


def precision_on(device: str, precision: Literal["fp32", "bf16", "auto"]) -> Precision:
    """What `auto` is on a device: bf16 on GPUs that compute in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def name_of(device: str) -> str:
    """The device's own name for people: `NVIDIA H100 80GB HBM3`, `cpu`."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


class TorchEngine:
    """One process, one device, fp32 AdamW; bf16 by autocast where the settings or the device say so.

    `memory_gib` (0: not said) is what the task asked for on the host.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TrainingSettings,
        mixing: Mixing | None = None,
        device: str = "cpu",
        memory_gib: float = 0.0,
    ) -> None:
        self.model = model.to(device).train()
        self._next_token = NextTokenLoss(model)
        self.settings = settings
        self.mixing = mixing or Mixing()
        self.device = device
        self.precision = precision_on(device, settings.precision)
        self.memory = memory_of(device, memory_gib)
        self._host = memory_of("cpu", memory_gib)
        self.micro_batch = None if settings.micro_batch_sequences == "auto" else settings.micro_batch_sequences
        self.mixture = as_mixture(model)
        self.last_load: Load | None = None
        self.last_exchange: float | None = None
        if settings.recompute:
            model.activation_checkpointing_enable()
        freeze(model, self.mixing)
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(
            groups(model, settings.weight_decay), lr=settings.peak_lr, betas=settings.betas, eps=1e-8, fused=True
        )
        # Adam's states from the start: memory is then measured with them, and an update can never run out of it
        self._set_states({}, 0)

    @property
    def device_name(self) -> str:
        return name_of(self.device)

    def step(
        self, input_ids: Tensor, lr: float, limits: Limits = NO_LIMITS, domains: Tensor | None = None
    ) -> StepResult:
        domains = all_of_one(input_ids) if domains is None else domains
        sums = self._accumulate(input_ids.to(self.device), domains.to(self.device))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm)
        nll, load_balance, router_z = sums[:3].tolist()
        try:
            if not torch.isfinite(norm + sums[0]):
                raise LossNotFinite(f"the loss ({nll:.4g}) or its gradient ({norm:.4g}) is not finite")
            limits.check(nll, float(norm))
        except TrainingError:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        set_rates(self.optimizer.param_groups, lr, self.mixing, self._done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._updates += 1
        self.last_load = load_of(sums, self.mixture)
        balance(self.mixture, self.last_load, self.mixing.losses.bias_rate)
        return StepResult(nll, load_balance, router_z, float(norm))

    def _accumulate(self, input_ids: Tensor, domains: Tensor) -> Tensor:
        """Gradients of the mean over `input_ids`, and its `Objective.parts`, in micro batches that fit memory.

        One that does not is halved, and the whole share begun again: nothing of it was used yet. Random numbers are
        taken up again too, so a model with dropout sees those of an undisturbed step of that micro batch.
        """
        random = _random_state(self.device)
        if self.micro_batch is None:
            self.micro_batch = self._fit(input_ids)
        sums = torch.zeros(parts_of(self.mixture, domains.shape[1]), device=self.device)

        def work(micro_batch: int) -> None:
            _set_random_state(self.device, random)
            self.optimizer.zero_grad(set_to_none=True)
            sums.zero_()
            for micro, of in zip(input_ids.split(micro_batch), domains.split(micro_batch), strict=True):
                share = micro.shape[0] / input_ids.shape[0]  # of tokens: rows are all of one length
                loss = self._forward(micro, of)
                (loss.total * share).backward()
                sums.add_(loss.parts * share)

        self.micro_batch = halved_to_fit(work, self.micro_batch, self.memory)
        return sums

    def _fit(self, input_ids: Tensor) -> int:
        """The micro batch for shares like `input_ids`, by passes over some of it; gradients are dropped after them."""
        try:
            return largest_that_fits(
                lambda size: self._forward(input_ids[:size]).total.backward(), len(input_ids), self.memory
            )
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _forward(self, micro: Tensor, domains: Tensor | None = None) -> Objective:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            return objective(self._next_token, micro, self.mixing.losses.at(self._done), self.mixture, domains=domains)

    @property
    def _done(self) -> float:
        """The fraction of all steps that is done."""
        return self._updates / self.settings.steps

    def evaluate(self, input_ids: Tensor) -> float:
        return held_out_nll(self.model, self._forward, input_ids.to(self.device), self.micro_batch)

    def any_rank(self, flag: bool) -> bool:
        return flag

    def gather(self, mine: Any) -> list[Any]:
        return [mine]

    def mean(self, value: float) -> float:
        return value

    def state(self) -> State:
        states = {
            f"{name}.{kind}": self.optimizer.state[parameter][kind]
            for name, parameter in self.parameters.items()
            for kind in ADAM_STATES
        }
        step = self._updates
        return snapshot(self.model, self.model.state_dict(), states if step else {}, step, self._host.room())

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(read_weights(folder), strict=False)
        self._set_states(*read_optimizer(folder))

    def _set_states(self, states: dict[str, Tensor], step: int) -> None:
        """Adam's after `step` updates, those not given being zero."""
        self._updates = step
        for name, parameter in self.parameters.items():
            given = {kind: states.get(f"{name}.{kind}") for kind in ADAM_STATES}
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=self.device),
                **{
                    kind: torch.zeros_like(parameter) if state is None else state.to(self.device)
                    for kind, state in given.items()
                },
            }


def _random_state(device: str) -> Tensor:
    """Where the generator of `device` stands."""
    return torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.get_rng_state()


def _set_random_state(device: str, state: Tensor) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
