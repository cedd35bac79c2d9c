"""An engine: one model and its optimizer, on one process or many, behind three verbs.

The loop decides what to train on and how fast; an engine does one step of it exactly. `TorchEngine` is the plain one,
on one device; `on_deepspeed` has the expert-parallel one. Both give the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import TrainingError
from bam_ray.model import routing_losses
from bam_ray.settings import Losses, TrainingSettings
from bam_ray.training.state import ADAM_STATES, read_optimizer, read_weights, write_state


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

    def step(self, input_ids: Tensor, lr: float) -> StepResult:
        """Forward, backward in micro batches, clip, update; on this rank's share [B, L] int64 of the global batch.

        Raises `TrainingError` where the loss or the gradient is not finite; nothing is updated then.
        """
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; the same answer on all."""
        ...

    def save(self, folder: Path) -> None:
        """Write the canonical state (`training.state`); called on all ranks, rank 0 writes."""
        ...

    def load(self, folder: Path) -> None:
        """Read a canonical state, whatever the number of ranks that wrote it."""
        ...


@dataclass
class Objective:
    """NLL plus the weighted auxiliary losses of one micro batch; tensors, NLL and auxiliaries detached."""

    total: Tensor
    parts: Tensor  # [3]: nll, load balance, router z


def objective(
    model: torch.nn.Module,
    input_ids: Tensor,
    losses: Losses,
    top_k: int | None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """The training loss of `input_ids` [B, L]: next-token NLL, and for mixtures (`top_k` given) the routers' losses.

    `reduce` averages routing statistics over data-parallel ranks (`model.routing_losses`).
    """
    out = model(input_ids=input_ids, use_cache=False, **({} if top_k is None else {"output_router_logits": True}))
    nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
    if top_k is None or not out.router_logits:
        zero = torch.zeros((), device=nll.device)
        return Objective(nll, torch.stack((nll.detach(), zero, zero)))
    routing = routing_losses(out.router_logits, top_k, reduce)
    total = nll + losses.load_balance * routing.load_balance + losses.router_z * routing.router_z
    return Objective(total, torch.stack((nll, routing.load_balance, routing.router_z)).detach())


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases, stacked ones included."""
    return parameter.ndim > 1 and "norm" not in name and not name.endswith("bias")


class TorchEngine:
    """One process, one device, fp32 AdamW; bf16 by autocast where the settings say so."""

    rank = 0
    world_size = 1

    def __init__(
        self, model: PreTrainedModel, settings: TrainingSettings, losses: Losses | None = None, device: str = "cpu"
    ) -> None:
        self.model = model.to(device).train()
        self.settings = settings
        self.losses = losses or Losses()
        self.device = device
        self.top_k: int | None = getattr(model.config, "num_experts_per_tok", None)
        self.parameters = dict(model.named_parameters())  # tied weights once
        groups = [
            {"params": [p for n, p in self.parameters.items() if decayed(n, p)], "weight_decay": settings.weight_decay},
            {"params": [p for n, p in self.parameters.items() if not decayed(n, p)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=settings.betas, eps=1e-8, fused=True)

    def step(self, input_ids: Tensor, lr: float) -> StepResult:
        micro_batches = input_ids.to(self.device).split(self.settings.micro_batch_sequences)
        sums = torch.zeros(3, device=self.device)
        for micro in micro_batches:
            share = micro.shape[0] / input_ids.shape[0]
            with torch.autocast(self.device, torch.bfloat16, enabled=self.settings.precision == "bf16"):
                loss = objective(self.model, micro, self.losses, self.top_k)
            (loss.total * share).backward()
            sums += loss.parts * share
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm)
        nll, load_balance, router_z = sums.tolist()
        if not torch.isfinite(norm + sums[0]):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(f"the loss ({nll}) or its gradient ({norm}) is not finite: lower peak_lr")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(nll, load_balance, router_z, float(norm))

    def any_rank(self, flag: bool) -> bool:
        return flag

    def save(self, folder: Path) -> None:
        states = {
            f"{name}.{kind}": self.optimizer.state[parameter][kind]
            for name, parameter in self.parameters.items()
            for kind in ADAM_STATES
            if parameter in self.optimizer.state
        }
        steps = [int(state["step"]) for state in self.optimizer.state.values()]
        write_state(folder, self.model, self.model.state_dict(), states, max(steps, default=0))

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(read_weights(folder), strict=False)
        states, step = read_optimizer(folder)
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=self.device),
                **{kind: states[f"{name}.{kind}"].to(self.device) for kind in ADAM_STATES},
            }
