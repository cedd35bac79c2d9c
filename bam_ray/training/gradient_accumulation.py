"""The gradients of a rank's share of a batch, added up over micro batches that fit the memory.

Both engines use this module. An engine says how to compute a loss and how to differentiate it (`GradientBackend`).
"""

from functools import reduce
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import SettingsError
from bam_ray.settings import TrainingSettings
from bam_ray.training.devices import random_state, set_random_state
from bam_ray.training.memory import Memory
from bam_ray.training.micro_batch import find_largest_micro_batch, halve_until_it_fits, runs_out_of_memory
from bam_ray.training.objective import Objective, as_mixture, single_domain


class GradientBackend(Protocol):
    """The parts of an engine that gradient accumulation calls."""

    world_size: int
    model: PreTrainedModel
    settings: TrainingSettings
    memory: Memory

    def forward(self, input_ids: Tensor, domains: Tensor | None = None) -> Objective:
        """Compute the loss of a micro batch [b, L], whose sequences belong to `domains` [b, D]."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        ...

    def drop_gradients(self) -> None:
        """Discard all gradients that have been added."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Return True on all ranks if `flag` is True on any rank."""
        ...


class GradientAccumulator:
    """An accumulator of gradients over the micro batches of a batch's share, which remembers the size that fits."""

    def __init__(
        self,
        backend: GradientBackend,
        device: str,
        micro_batch: int | Literal["auto"],
        ranks_are_independent: bool = True,
    ) -> None:
        """Create the accumulator of one engine.

        Args:
            backend: The engine.
            device: The device of the model.
            micro_batch: Sequences that pass through the model at once; auto: the size is found in the first step.
            ranks_are_independent: True if no rank waits for another within a micro batch. Only then a size that does
                not fit can be halved; otherwise the other ranks would wait for the rank that ran out of memory.
        """
        self.micro_batch = None if micro_batch == "auto" else micro_batch
        self._found_by_trial = micro_batch == "auto"
        self._backend, self._device, self._can_halve = backend, device, ranks_are_independent

    def accumulate(self, input_ids: Tensor, domains: Tensor | None = None) -> Tensor:
        """Add the gradients of the mean loss over `input_ids` [B, L]; returns its packed `BatchStatistics`.

        A micro batch that does not fit is halved, and the whole share starts again: none of its gradients have been
        used yet. The random number generator is reset for this, so that a model with dropout computes what an
        undisturbed step with that micro batch computes.
        """
        backend = self._backend
        input_ids = input_ids.to(self._device)
        domains = single_domain(input_ids) if domains is None else domains.to(self._device)
        generator = random_state(self._device)
        if self.micro_batch is None:
            self.micro_batch = self._find_micro_batch(input_ids)
        packed: list[Tensor] = []

        def run_all(micro_batch: int) -> None:
            set_random_state(self._device, generator)
            backend.drop_gradients()
            packed.clear()
            for micro, micro_domains in zip(input_ids.split(micro_batch), domains.split(micro_batch), strict=True):
                share = micro.shape[0] / input_ids.shape[0]  # of the tokens: all rows have the same length
                loss = backend.forward(micro, micro_domains)
                backend.backward(loss.total * share)
                packed.append(loss.statistics.pack() * share)

        if self._can_halve:
            self.micro_batch = halve_until_it_fits(run_all, self.micro_batch, backend.memory, backend.any_rank)
        elif runs_out_of_memory(run_all, self.micro_batch):
            raise self._does_not_fit()
        return reduce(torch.add, packed)

    def evaluate(self, input_ids: Tensor) -> float:
        """Return the mean NLL of `input_ids` [B, L] on this rank, without router noise and dropout."""
        model = self._backend.model
        model.eval()
        try:
            with torch.no_grad():
                micro_batches = input_ids.to(self._device).split(self.micro_batch or 1)
                sums = [self._backend.forward(micro).statistics.nll * len(micro) for micro in micro_batches]
        finally:
            model.train()
        return float(torch.stack(sums).sum() / len(input_ids))

    def _does_not_fit(self) -> SettingsError:
        """Return the error for a micro batch that does not fit and cannot be halved."""
        size = self.micro_batch or 1
        # Of a mixture, the micro batch is a part of the objective
        adjustable = size > 1 and not self._found_by_trial and as_mixture(self._backend.model) is None
        options = ["set a smaller micro_batch_sequences"] if adjustable else []
        if not self._backend.settings.recompute:
            options.append("set recompute: true")
        return SettingsError(
            f"out of memory with {size} {'sequences' if size > 1 else 'sequence'} at once on each of "
            f"{self._backend.world_size} processes: {', '.join([*options, 'use more processes'])} or use devices with "
            "more memory"
        )

    def _find_micro_batch(self, input_ids: Tensor) -> int:
        """Return the micro batch for shares like `input_ids`; the gradients of the trials are dropped."""
        backend = self._backend

        def trial(size: int) -> None:
            backend.backward(backend.forward(input_ids[:size]).total)

        try:
            return find_largest_micro_batch(trial, len(input_ids), backend.memory, backend.any_rank)
        finally:
            backend.drop_gradients()
