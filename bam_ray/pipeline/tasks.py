"""What is to be made, and how the code that makes it speaks with the controller.

A task makes one artifact. It is finished exactly when its artifact's manifest exists. While it runs it says how far it
is (`Progress`) and is asked whether it should stop; nothing else passes between a task and the controller.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Protocol

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.settings import Needs


@dataclass(frozen=True)
class Quorum:
    """The branches that a task need not wait for, and how many of them are enough."""

    branches: tuple[tuple[str, str], ...]  # id and name
    at_least: int
    deadline: float  # seconds for which those that are still to come are waited for; inf: for all that can come


@dataclass(frozen=True)
class Task:
    """One artifact to make."""

    kind: ArtifactKind
    name: str  # "corpus", "seed", a domain, a mixture, "report"
    id: str
    parents: tuple[str, ...]  # ids of tasks that must be committed first
    needs: Needs  # of each worker; once placed, the demand that was taken
    workers: int = 1  # more than 1: a group of processes that train together
    fewer_workers: tuple[int, ...] = ()  # what will do where nodes are gone for good, best first
    total_steps: int = 0
    max_attempts: int = 4
    at_once: int | None = None  # how many tasks of this kind may be worked on together; None: as many as fit
    model: str = ""  # tasks of one model and one demand go at the same speed on nodes of one kind
    step_tokens: int = 0  # tokens of a step; 0: the steps are no measure of work
    quorum: Quorum | None = None  # None: all parents must be committed first

    @property
    def where(self) -> str:
        """For people: `branches/law`."""
        return f"{self.kind}/{self.name}"

    @property
    def is_group(self) -> bool:
        """Whether processes that train together do it; a mixture's are a group even where they are one."""
        return self.workers > 1 or self.kind == "mixtures"

    @property
    def trains_alone(self) -> bool:
        """Whether one actor trains it, step by step: such a task is placed by speed, and moved."""
        return not self.is_group and self.step_tokens > 0 and self.total_steps > 0

    def remaining_steps(self, progress: "Progress | None") -> int:
        """Return the number of steps that are still to do, as far as `progress` tells."""
        return max(0, self.total_steps - (progress.step if progress else 0))


@dataclass(frozen=True)
class Progress:
    """What a running task says of itself."""

    step: int
    total_steps: int
    loss: float | None = None  # NLL in nats a token, auxiliary losses not counted
    tokens_per_second: float | None = None
    checkpoint_step: int | None = None  # the last committed
    note: str = ""  # what it does now: "tokenising law"
    load_imbalance: float | None = None  # of a mixture's experts: largest over mean share, in the worst layer
    dead_experts: int | None = None  # of all layers
    experts: tuple[str, ...] = ()  # of a mixture: their names
    left_out: tuple[str, ...] = ()  # branches that this attempt could not make experts of
    curves: Mapping[str, float] = field(default_factory=dict)  # the last value of each, by TensorBoard's names


class StageContext(Protocol):
    """A stage's line to whoever runs it."""

    @property
    def node(self) -> str:
        """The name of the node that the stage runs on, as `bam status` shows it."""
        ...

    def report(self, progress: Progress) -> None:
        """Say how far the stage is; cheap enough for every step."""
        ...

    def should_stop(self) -> bool:
        """Whether to write a checkpoint and raise `errors.Interrupted`; asked between steps."""
        ...


def fewer_workers(workers: int, least: int | None, sequences: int, expert_parallel: int = 1) -> tuple[int, ...]:
    """Numbers of workers that will do in place of `workers`, best first; none where `least` is None.

    They share `sequences` alike: the global batch, or of mixtures `MixSettings.alike`. Experts are spread over the
    greatest common divisor of their number and `expert_parallel`, which is taken as large as can be: a worker's memory
    was meant for its part of the experts.
    """
    numbers = [number for number in range(least or workers, workers) if sequences % number == 0]
    return tuple(sorted(numbers, key=lambda number: (gcd(number, expert_parallel), number), reverse=True))
