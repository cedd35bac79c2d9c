"""The engine protocol: one model and its optimizer, on one process or on many.

The training loop decides which data to train on and at which learning rate. An engine does one step of it exactly.
`torch_engine.TorchEngine` runs on one device, `on_deepspeed.DeepSpeedEngine` over many processes with expert
parallelism. Both compute the same numbers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.checkpoint.tensors import TensorSpec
from bam_ray.errors import LossSpiked
from bam_ray.settings import Mixing, TrainingSettings
from bam_ray.training.devices import Precision
from bam_ray.training.memory import Memory
from bam_ray.training.objective import ExpertLoad
from bam_ray.training.state import SavableState


@dataclass(frozen=True)
class EngineSpec:
    """Everything that an engine is made from."""

    model: PreTrainedModel  # equal on all ranks; on the meta device (`training.meta_init`) with a `weights_folder`
    training: TrainingSettings
    mixing: Mixing = field(default_factory=Mixing)
    expert_parallel: int = 1  # number of processes that share the experts of a mixture
    weights_folder: Path | None = None  # the weights of a model on the meta device: each process reads its own part
    memory_limit: int | None = None  # bytes of host memory that this process may use; None: no limit
    device: str = "cpu"  # "cuda" for a task that requested GPUs (`training.devices.requested_device`)


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step: means over the global batch, and the gradient norm before clipping."""

    nll: float  # nats per token, without the auxiliary losses
    load_balance: float
    router_z: float
    grad_norm: float
    expert_load: ExpertLoad | None = field(default=None, compare=False)  # None: the model has no experts
    exchange_seconds: float | None = field(default=None, compare=False)  # None: no tokens travel between processes


@dataclass(frozen=True)
class LossLimits:
    """The largest loss and gradient norm that are not a spike."""

    nll: float = math.inf
    grad_norm: float = math.inf

    def check(self, nll: float, grad_norm: float = 0.0) -> None:
        """Raise `LossSpiked` if the loss or the gradient norm is above its limit."""
        if nll > self.nll:
            raise LossSpiked(f"the loss ({nll:.4g}) is above {self.nll:.4g}")
        if grad_norm > self.grad_norm:
            raise LossSpiked(f"the gradient's norm ({grad_norm:.4g}) is above {self.grad_norm:.4g}")


NO_LIMITS = LossLimits()


class Engine(Protocol):
    """One model and its optimizer."""

    rank: int
    world_size: int
    precision: Precision
    memory: Memory
    model: PreTrainedModel

    @property
    def device_name(self) -> str:
        """The name of the device, for people."""
        ...

    @property
    def micro_batch(self) -> int | None:
        """The number of sequences that pass through the model at once; None: not known before the first step."""
        ...

    def step(
        self, input_ids: Tensor, lr: float, limits: LossLimits = NO_LIMITS, domains: Tensor | None = None
    ) -> StepResult:
        """Do one step: forward and backward in micro batches, clip the gradient, update the weights.

        Args:
            input_ids: This rank's share of the global batch, int64 [B, L].
            lr: The learning rate.
            limits: Limits above which nothing is updated.
            domains: [B, D], 1 if a sequence belongs to a domain, else 0, for the expert load by domain. None: all
                sequences belong to a single domain.

        Raises:
            LossNotFinite: If the loss or the gradient is not finite; nothing is updated.
            LossSpiked: If the loss or the gradient norm is above `limits`; nothing is updated.
        """
        ...

    def evaluate(self, input_ids: Tensor) -> float:
        """Return the mean NLL of all ranks' rows, in nats per token; every rank passes equally many rows [B, L]."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Return True on all ranks if `flag` is True on any rank. A collective."""
        ...

    def gather(self, mine: Any) -> list[Any]:
        """Return the plain values of all ranks in the order of ranks, on all ranks. A collective."""
        ...

    def mean(self, value: float) -> float:
        """Return the mean of `value` over all ranks, on all ranks. A collective."""
        ...

    def state(self) -> SavableState | None:
        """Return the part of the state that this rank saves, or None if other ranks save all of it.

        It is a copy in host memory if the host has space for that. Otherwise it is live.
        """
        ...

    def whole_weights(self) -> tuple[list[TensorSpec], Iterator[Tensor]]:
        """Return the names, dtypes and shapes of all weights, and their values in the same order.

        Every rank must iterate over all values before the next step, because each may be gathered by a collective. Only
        those of rank 0 are whole. They are live, and only one of them is gathered at a time.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read a canonical state, which any number of ranks may have written."""
        ...


EngineFactory = Callable[[EngineSpec], Engine]
"""Makes an engine. Every rank of a process group calls it with an equal spec."""
