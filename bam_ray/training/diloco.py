"""DiLoCo: processes train copies of one model, which become equal only every few steps (arXiv 2311.08105).

Each process updates its own copy with AdamW on its part of every batch. After every H steps, and after the last one, an
outer step follows. Its gradient is how far the mean of all copies has moved from the shared model, and its optimizer is
SGD with Nesterov momentum. All copies then continue from the shared model, each with its own Adam states:

    g = shared - mean(copies)        v = μ v + g        shared = shared - η (g + μ v)

Losses and gradient norms are averaged in every step, so that all processes react to them in the same way. These are
a few numbers. A checkpoint has all copies, so a run resumes exactly, but only with the same number of processes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError
from bam_ray.settings import DiLoCoSettings
from bam_ray.training.engine import NO_LIMITS, EngineSpec, LossLimits, StepResult
from bam_ray.training.state import ADAM_STATES, STEP, TrainingState, open_tensors
from bam_ray.training.torch_engine import TorchEngine

COPIES, SHARED, MOMENTUM = "copies", "shared", "momentum"
"""Tensors of a checkpoint, fp32: the weights and Adam's states of each copy [W, 3P], the shared model [P] and its
momentum [P], for W processes and P parameters."""


class DiLoCoEngine(TorchEngine):
    """One of the processes. Without a process group it is the only one."""

    def __init__(self, spec: EngineSpec, settings: DiLoCoSettings) -> None:
        if dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        super().__init__(spec)
        self._outer = settings
        self._shared = [parameter.detach().clone() for parameter in self.parameters.values()]
        self._momentum = [torch.zeros_like(each) for each in self._shared]

    def step(
        self, input_ids: Tensor, lr: float, limits: LossLimits = NO_LIMITS, domains: Tensor | None = None
    ) -> StepResult:
        """See `Engine`. The gradient norm is the mean of all copies' norms."""
        result = super().step(input_ids, lr, limits, domains)
        if self.updates % self._outer.every == 0 or self.updates == self.settings.steps:
            self._outer_step()
        return result

    @torch.no_grad()
    def _outer_step(self) -> None:
        rate, inertia = self._outer.outer_lr, self._outer.outer_momentum
        for copy, shared, momentum in zip(self.parameters.values(), self._shared, self._momentum, strict=True):
            gradient = shared - self.average(copy.clone())
            momentum.mul_(inertia).add_(gradient)
            shared.sub_(gradient.add_(momentum, alpha=inertia), alpha=rate)
            copy.copy_(shared)

    def average(self, x: Tensor) -> Tensor:
        """Average `x` over all processes, in place. A collective."""
        if self.world_size > 1:
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def any_rank(self, flag: bool) -> bool:
        """See `Engine`. A collective."""
        return self.mean(float(flag)) > 0.0

    def gather(self, mine: Any) -> list[Any]:
        """See `Engine`. A collective."""
        found = [mine] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, mine)
        return found

    def mean(self, value: float) -> float:
        """See `Engine`. A collective."""
        return self.average(torch.tensor(value, dtype=torch.double, device=self.device)).item()

    def evaluate(self, input_ids: Tensor) -> float:
        """See `Engine`. Each process evaluates its own copy."""
        return self.mean(super().evaluate(input_ids))

    def state(self) -> TrainingState | None:
        """See `Engine`. A collective: rank 0 saves the whole state, which is live. Its model is the copy of rank 0."""
        mine = _flat(self._copy())
        copies = [torch.empty_like(mine) for _ in range(self.world_size)]
        if self.world_size > 1:
            dist.all_gather(copies, mine)
        else:
            copies = [mine]
        states = {
            COPIES: torch.stack(copies),
            SHARED: _flat(self._shared),
            MOMENTUM: _flat(self._momentum),
        }
        weights = self.model.state_dict()
        return TrainingState(self.model, weights, states, self.updates, live=True) if self.rank == 0 else None

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """See `Engine`.

        Raises:
            CheckpointError: The checkpoint was written by another number of processes.
        """
        saved = open_tensors(folder, "optimizer")
        processes, size = saved.specs[COPIES].shape
        if processes != self.world_size:
            raise CheckpointError(
                f"{folder} is a DiLoCo checkpoint of {processes} processes, but there are {self.world_size}: use as "
                "many processes"
            )
        self.updates = int(saved.read(STEP))
        for state in self.optimizer.state.values():
            state["step"].fill_(self.updates)
        _fill(self._copy(), saved, COPIES, self.rank * size)  # the copies of all processes may not fit into memory
        _fill(self._shared, saved, SHARED)
        _fill(self._momentum, saved, MOMENTUM)

    def _copy(self) -> list[Tensor]:
        """Return the weights of this process's copy and its Adam states."""
        parameters = list(self.parameters.values())
        return [*parameters, *(self.optimizer.state[each][kind] for kind in ADAM_STATES for each in parameters)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


def _fill(tensors: Sequence[Tensor], saved: TensorReader, name: str, first: int = 0) -> None:
    """Fill tensors one after the other with the elements of a saved tensor from `first` on."""
    for tensor in tensors:
        saved.copy_range(name, first, tensor.detach().view(-1))
        first += tensor.numel()
