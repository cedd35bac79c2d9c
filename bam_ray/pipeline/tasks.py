"""Tasks, and the interface between a stage and the process that runs it.

A task makes one artifact. It is finished if and only if the manifest of its artifact exists. While a stage runs, it
reports its `Progress` and asks whether it should stop; nothing else passes between a stage and the controller.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Protocol

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.settings import Needs


@dataclass(frozen=True)
class BranchQuorum:
    """The branches that a task can start without, and the number of them that it requires."""

    branches: tuple[tuple[str, str], ...]  # (task id, name) of each
    at_least: int
    deadline: float  # seconds to wait for the other branches; 0: do not wait; inf: wait for all that can still come


@dataclass(frozen=True)
class Task:
    """One artifact to make."""

    kind: ArtifactKind
    name: str  # "corpus", "seed", a domain, a control, a mixture, "report"
    id: str
    parents: tuple[str, ...]  # ids of the tasks that must be committed first
    needs: Needs  # of each worker; for a placed task, the resource request that was chosen
    workers: int = 1  # more than 1: a group of processes that train together
    fewer_workers: tuple[int, ...] = ()  # acceptable numbers of workers after nodes were lost for good, best first
    total_steps: int = 0
    max_attempts: int = 4
    at_once: int | None = None  # how many tasks of this kind may be active at the same time; None: no limit
    model: str = ""  # tasks with equal models and resource requests train equally fast on nodes of one kind
    step_tokens: int = 0  # tokens of a step; 0: the steps do not measure the work
    quorum: BranchQuorum | None = None  # None: all parents must be committed first
    gives_way: bool = False  # True: the other tasks do not wait for nodes that this task could leave to them

    @property
    def full_name(self) -> str:
        """The kind and name of the task for messages, such as `branches/law`."""
        return f"{self.kind}/{self.name}"

    @property
    def is_group(self) -> bool:
        """True if a group of processes runs the task; a mixture is trained by a group even if it has one process."""
        return self.workers > 1 or self.kind == "mixtures"

    @property
    def trains_alone(self) -> bool:
        """True if one actor trains the task step by step; such a task is placed by speed and can be moved."""
        return not self.is_group and self.step_tokens > 0 and self.total_steps > 0

    def remaining_steps(self, progress: "Progress | None") -> int:
        """Return the number of steps that are left, as far as `progress` shows."""
        return max(0, self.total_steps - (progress.step if progress else 0))


@dataclass(frozen=True)
class DamagedArtifact:
    """A committed artifact whose files an attempt found damaged, and which the attempt does without."""

    id: str
    generation: int  # see `checkpoint.manifest.ManifestGeneration`


@dataclass(frozen=True)
class Progress:
    """The progress that a running stage reports.

    The controller reads `step`, `total_steps`, `checkpoint_step` and `damaged`. The other fields are for status,
    metrics and drain policies.
    """

    step: int
    total_steps: int
    loss: float | None = None  # NLL in nats per token, without auxiliary losses
    tokens_per_second: float | None = None
    checkpoint_step: int | None = None  # step of the last committed checkpoint
    note: str = ""  # current activity, such as "tokenizing law"
    eta_seconds: float | None = None  # of the current activity, if its stage measures that itself
    load_imbalance: float | None = None  # largest over mean share of an expert, in the worst layer of a mixture
    dead_experts: int | None = None  # in all layers of a mixture
    experts: tuple[str, ...] = ()  # names of a mixture's experts
    left_out: tuple[str, ...] = ()  # committed branches that this attempt could not turn into experts
    damaged: tuple[DamagedArtifact, ...] = ()  # those of them whose files are damaged
    curves: Mapping[str, float] = field(default_factory=dict)  # last value of each training curve, by TensorBoard tag


class StageContext(Protocol):
    """The connection of a stage to the process that runs it."""

    @property
    def node(self) -> str:
        """The name of the node that the stage runs on, as `bam status` shows it."""
        ...

    def report(self, progress: Progress) -> None:
        """Report progress. The call is cheap enough for every step."""
        ...

    def should_stop(self) -> bool:
        """Return True if the stage should write a checkpoint and raise `errors.Interrupted`; ask between steps."""
        ...


def fewer_workers(workers: int, least: int | None, sequences: int, expert_parallel: int = 1) -> tuple[int, ...]:
    """Return the numbers of workers that can replace `workers`, best first.

    Each number divides `sequences`, so that all workers get equally many sequences. Experts are sharded over the
    greatest common divisor of the number and `expert_parallel`. Numbers with a larger divisor come first, because the
    memory of a worker was requested for its share of the experts.

    Args:
        workers: The configured number of workers.
        least: The smallest acceptable number; None allows no smaller number.
        sequences: The global batch, or `MixSettings.process_multiple` for a mixture.
        expert_parallel: The configured size of expert parallelism.
    """
    numbers = [number for number in range(least or workers, workers) if sequences % number == 0]
    return tuple(sorted(numbers, key=lambda number: (gcd(number, expert_parallel), number), reverse=True))
