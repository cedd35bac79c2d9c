"""An engine: one model and its optimizer, on one process or many, behind three verbs.

The loop decides what to train on and how fast; an engine does one step of it exactly. `TorchEngine` is the plain one,
on one device; `on_deepspeed` has the expert-parallel one. Both give the same numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import LossNotFinite
from bam_ray.settings import Losses, TrainingSettings
from bam_ray.training.fitting import halved_to_fit, largest_that_fits
from bam_ray.training.memory import Memory, memory_of
from bam_ray.training.objective import Objective, objective
from bam_ray.training.state import ADAM_STATES, State, read_optimizer, read_weights, snapshot

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepResult:
    """Means over the global batch: nats per token, the auxiliary losses apart, and the norm before clipping."""

    nll: float
    load_balance: float
    router_z: float
    grad_norm: float


class Engine(Protocol):
    """One model and its optimizer."""

    rank: int
    world_size: int
    precision: Precision
    micro_batch: int | None  # sequences that go through the model at once; None: not known before the first step
    memory: Memory
    model: PreTrainedModel

    @property
    def device_name(self) -> str:
        """What it computes on, for people."""
        ...

    def step(self, input_ids: Tensor, lr: float) -> StepResult:
        """Forward, backward in micro batches, clip, update; on this rank's share [B, L] int64 of the global batch.

        Raises `LossNotFinite` where the loss or the gradient is not finite; nothing is updated then.
        """
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; the same answer on all, when all have asked."""
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


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases, stacked ones included."""
    return parameter.ndim > 1 and "norm" not in name and not name.endswith("bias")


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
        losses: Losses | None = None,
        device: str = "cpu",
        memory_gib: float = 0.0,
    ) -> None:
        self.model = model.to(device).train()
        self.settings = settings
        self.losses = losses or Losses()
        self.device = device
        self.precision = precision_on(device, settings.precision)
        self.memory = memory_of(device, memory_gib)
        self._host = memory_of("cpu", memory_gib)
        self.micro_batch = None if settings.micro_batch_sequences == "auto" else settings.micro_batch_sequences
        self.top_k: int | None = getattr(model.config, "num_experts_per_tok", None)
        self.parameters = dict(model.named_parameters())  # tied weights once
        groups = [
            {"params": [p for n, p in self.parameters.items() if decayed(n, p)], "weight_decay": settings.weight_decay},
            {"params": [p for n, p in self.parameters.items() if not decayed(n, p)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=settings.betas, eps=1e-8, fused=True)
        # Adam's states from the start: memory is then measured with them, and an update can never run out of it
        self._set_states({}, 0)

    @property
    def device_name(self) -> str:
        return name_of(self.device)

    def step(self, input_ids: Tensor, lr: float) -> StepResult:
        sums = self._accumulate(input_ids.to(self.device))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm)
        nll, load_balance, router_z = sums.tolist()
        if not torch.isfinite(norm + sums[0]):
            self.optimizer.zero_grad(set_to_none=True)
            raise LossNotFinite(f"the loss ({nll:.4g}) or its gradient ({norm:.4g}) is not finite")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(nll, load_balance, router_z, float(norm))

    def _accumulate(self, input_ids: Tensor) -> Tensor:
        """Gradients of the mean over `input_ids`, and its three losses [3], in micro batches that fit memory.

        One that does not is halved, and the whole share begun again: nothing of it was used yet. Random numbers are
        taken up again too, so a model with dropout sees those of an undisturbed step of that micro batch.
        """
        random = _random_state(self.device)
        if self.micro_batch is None:
            self.micro_batch = self._fit(input_ids)
        sums = torch.zeros(3, device=self.device)

        def work(micro_batch: int) -> None:
            _set_random_state(self.device, random)
            self.optimizer.zero_grad(set_to_none=True)
            sums.zero_()
            for micro in input_ids.split(micro_batch):
                share = micro.shape[0] / input_ids.shape[0]  # of tokens: rows are all of one length
                loss = self._forward(micro)
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

    def _forward(self, micro: Tensor) -> Objective:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            return objective(self.model, micro, self.losses, self.top_k)

    def any_rank(self, flag: bool) -> bool:
        return flag

    def state(self) -> State:
        states = {
            f"{name}.{kind}": self.optimizer.state[parameter][kind]
            for name, parameter in self.parameters.items()
            for kind in ADAM_STATES
        }
        step = max(int(state["step"]) for state in self.optimizer.state.values())
        return snapshot(self.model, self.model.state_dict(), states if step else {}, step, self._host.room())

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(read_weights(folder), strict=False)
        self._set_states(*read_optimizer(folder))

    def _set_states(self, states: dict[str, Tensor], step: int) -> None:
        """Adam's, those not given being zero."""
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
