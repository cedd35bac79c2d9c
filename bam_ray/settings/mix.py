"""Settings of the mixing phase: the training of the mixtures."""

from math import ceil, gcd
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.blends import DynamicBlend, with_preset
from bam_ray.settings.mixing import Mixing
from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Blend, Count, Identity
from bam_ray.settings.training import TrainingSettings

AUTO_BALANCE_SEQUENCES = 16


class MixSettings(Mixing):
    """Training of the mixtures. All mixtures are trained with the same settings, so that they can be compared.

    Only the number of tokens may depend on the method (`without_branches`).
    """

    _preset = model_validator(mode="before")(with_preset)

    training: TrainingSettings
    """Training of each mixture."""
    without_branches: Annotated[Literal["mix_tokens", "all_tokens"], Identity.EXCLUDED] = "mix_tokens"
    """Number of tokens of mixtures that are made from the seed alone (methods `sparse` and `split`). `mix_tokens`:
    `training.tokens`, as all other mixtures. `all_tokens`: as many as all branches and the mixing phase of one other
    mixture together, which is fair in a comparison. (The identity of a mixture contains its own number of tokens
    only.)"""
    expert_parallel: Annotated[Count, Identity.EXCLUDED] = 2
    """Number of processes over which the experts are distributed."""
    workers: Annotated[Count | None, Identity.EXCLUDED] = None
    """Number of processes in total. `null` means `expert_parallel`."""
    min_workers: Annotated[Count | None, Identity.EXCLUDED] = None
    """If nodes are lost for good, continue with at least this many workers. The experts are then distributed over the
    largest possible part of them. `null` means to wait for all."""
    at_once: Annotated[Count | None, Identity.EXCLUDED] = None
    """Number of mixtures that are trained at the same time. `null` means as many as fit on the cluster."""
    blend: Blend | None = None
    """Sampling weights over domains, or the name of a preset: `static_llama`, `static_sheared`, `dynamic_llama`,
    `dynamic_uniform` (LLaMA-MoE's). `null` means equal weights, as in the BAM paper."""
    dynamic_blend: DynamicBlend | None = None
    """Make the blend follow held-out losses. `null` means that it stays constant."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of each process."""
    max_failures: Annotated[int, Field(ge=0), Identity.EXCLUDED] = 3
    """Number of failed attempts in a row without a new checkpoint that are tolerated."""

    @property
    def processes(self) -> int:
        """Number of processes that train a mixture when all nodes are available."""
        return self.workers or self.expert_parallel

    @property
    def balance_sequences(self) -> int:
        """Number of sequences that all processes together compute in one forward pass.

        The losses of the routers are computed over that many sequences, so the number is part of the objective. It
        stays the same when the number of processes changes. It is `micro_batch_sequences` times the number of
        processes. With `auto` it is 16, or the next larger number that the processes can share equally.
        """
        chosen = self.training.micro_batch_sequences
        return (ceil(AUTO_BALANCE_SEQUENCES / self.processes) if chosen == "auto" else chosen) * self.processes

    def process_multiple(self, sequences: int) -> int:
        """Return the number that the process count must divide for a global batch of `sequences`.

        If it does, all processes get equally many sequences of the batch and of each forward pass, and
        `balance_sequences` stays the same.
        """
        together = self.balance_sequences
        return sequences if together >= sequences else gcd(sequences, together)

    def micro_batch(self, processes: int) -> int:
        """Return the number of sequences per forward pass on each of `processes`."""
        return max(1, self.balance_sequences // processes)

    @model_validator(mode="after")
    def _router_warmup_ends(self) -> Self:
        steps, warmup = self.training.steps, self.router_warmup_fraction
        if warmup > (steps - 1) / steps:
            raise ValueError(
                f"router_warmup_fraction {warmup} of {steps} steps is all of them, so that only the routers are ever "
                "trained: make it smaller, or use train: routers"
            )
        return self

    @model_validator(mode="after")
    def _experts_are_sharded_once(self) -> Self:
        if self.training.zero_stage == 3 and self.expert_parallel > 1:
            raise ValueError(
                "mix.training.zero_stage 3 shards all weights, but mix.expert_parallel already distributes those of "
                "the experts: use zero_stage 1 or 2"
            )
        return self
