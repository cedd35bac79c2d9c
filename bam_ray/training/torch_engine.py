"""The engine for one process and one device, in plain torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorSpec
from bam_ray.errors import LossNotFinite, TrainingError
from bam_ray.model.loading import stored_names
from bam_ray.training.devices import device_name, resolve_precision
from bam_ray.training.engine import NO_LIMITS, EngineSpec, LossLimits, StepResult
from bam_ray.training.gradient_accumulation import GradientAccumulator
from bam_ray.training.memory import HostMemory, memory_of
from bam_ray.training.micro_batch import updating_weights
from bam_ray.training.next_token import NextTokenLoss
from bam_ray.training.objective import BatchStatistics, Objective, as_mixture, objective, update_selection_biases
from bam_ray.training.param_groups import freeze, param_groups, set_learning_rates
from bam_ray.training.state import ADAM_STATES, STEP, TrainingState, load_weights, open_tensors, snapshot
from bam_ray.training.tensor_file import distinct_tensors, specs_of


class TorchEngine:
    """One process, one device and AdamW in fp32; bf16 is autocast, if the settings or the device ask for it."""

    rank = 0
    world_size = 1

    def __init__(self, spec: EngineSpec) -> None:
        model, settings, device = spec.model, spec.training, spec.device
        self.model = model.to(device).train()
        self.settings, self.mixing, self.device = settings, spec.mixing, device
        self.precision = resolve_precision(device, settings.precision)
        self.memory = memory_of(device, spec.memory_limit)
        self._host = HostMemory(spec.memory_limit)
        self._next_token = NextTokenLoss(model)
        self._mixture = as_mixture(model)
        self._accumulator = GradientAccumulator(self, device, settings.micro_batch_sequences)
        if settings.recompute:
            model.activation_checkpointing_enable()
        freeze(model, self.mixing)
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(
            param_groups(model, settings.weight_decay), lr=settings.peak_lr, betas=settings.betas, eps=1e-8, fused=True
        )
        # Adam's states exist from the start: memory is then measured with them, and an update cannot run out of memory
        self.reset_optimizer(0)

    @property
    def device_name(self) -> str:
        """See `Engine`."""
        return device_name(self.device)

    @property
    def micro_batch(self) -> int | None:
        """See `Engine`."""
        return self._accumulator.micro_batch

    def step(
        self, input_ids: Tensor, lr: float, limits: LossLimits = NO_LIMITS, domains: Tensor | None = None
    ) -> StepResult:
        """See `Engine`."""
        packed = self.average(self._accumulator.accumulate(input_ids, domains))
        statistics = BatchStatistics.unpack(packed, self._mixture)
        with updating_weights(self.memory):
            norm = self.average(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm))
        nll, load_balance, router_z = statistics.losses()
        try:
            if not torch.isfinite(norm + statistics.nll):
                raise LossNotFinite(f"the loss ({nll:.4g}) or its gradient ({norm:.4g}) is not finite")
            limits.check(nll, float(norm))
        except TrainingError:
            self.drop_gradients()
            raise
        set_learning_rates(self.optimizer.param_groups, lr, self.mixing, self._fraction_done)
        with updating_weights(self.memory):
            self.optimizer.step()
        self.drop_gradients()
        self.updates += 1
        update_selection_biases(self._mixture, statistics.load, self.mixing.losses.bias_rate)
        return StepResult(nll, load_balance, router_z, float(norm), statistics.load)

    def average(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over all processes, which is `x` itself if there is only this one."""
        return x

    def forward(self, input_ids: Tensor, domains: Tensor | None = None) -> Objective:
        """See `GradientBackend`."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.mixing.losses.at(self._fraction_done)
            return objective(self._next_token, input_ids, losses, self._mixture, domains=domains)

    def backward(self, loss: Tensor) -> None:
        """See `GradientBackend`."""
        loss.backward()

    def drop_gradients(self) -> None:
        """See `GradientBackend`."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def _fraction_done(self) -> float:
        """The fraction of all steps that is done."""
        return self.updates / self.settings.steps

    def evaluate(self, input_ids: Tensor) -> float:
        """See `Engine`."""
        return self._accumulator.evaluate(input_ids)

    def any_rank(self, flag: bool) -> bool:
        """See `Engine`."""
        return flag

    def gather(self, mine: Any) -> list[Any]:
        """See `Engine`."""
        return [mine]

    def mean(self, value: float) -> float:
        """See `Engine`."""
        return value

    def state(self) -> TrainingState | None:
        """See `Engine`. The whole state."""
        states = {
            f"{name}.{kind}": self.optimizer.state[parameter][kind]
            for name, parameter in self.parameters.items()
            for kind in ADAM_STATES
        }
        step, available = self.updates, self._host.available_bytes()
        return snapshot(self.model, self.model.state_dict(), states if step else {}, step, available)

    def whole_weights(self) -> tuple[list[TensorSpec], Iterator[Tensor]]:
        """See `Engine`."""
        weights, stored = distinct_tensors(self.model), stored_names(self.model)
        return specs_of({stored[name]: tensor for name, tensor in weights.items()}), iter(weights.values())

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        load_weights(folder, self.model)
        saved = open_tensors(folder, "optimizer")
        self.reset_optimizer(int(saved.read(STEP)))
        for name, parameter in self.parameters.items():
            for kind in ADAM_STATES:
                if f"{name}.{kind}" in saved.specs:
                    saved.copy_range(f"{name}.{kind}", 0, self.optimizer.state[parameter][kind].view(-1))

    def reset_optimizer(self, step: int) -> None:
        """Set Adam's states to zero, as if there had been `step` updates."""
        self.updates = step
        for parameter in self.parameters.values():
            state = self.optimizer.state[parameter]
            state["step"] = torch.tensor(float(step), device=self.device)
            for kind in ADAM_STATES:
                state[kind] = state[kind].zero_() if kind in state else torch.zeros_like(parameter)
