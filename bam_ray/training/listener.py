"""The hooks of the training loop, and the values that it passes to them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bam_ray.training.engine import StepResult
from bam_ray.training.events import Event


@dataclass(frozen=True)
class StepMetrics:
    """One step of a training curve, as checkpoints and `curve.json` store it."""

    step: int
    nll: float
    load_balance: float
    router_z: float
    grad_norm: float
    lr: float
    tokens_per_second: float


class TrainingListener:
    """A listener of one run of the training loop.

    Every hook does nothing here; a subclass overrides those that it needs. All ranks call the hooks in the same order,
    except for `emit`.
    """

    def emit(self, event: Event) -> None:
        """Receive an event. The upload thread emits `CheckpointCommitted`, the training thread all other events."""

    def on_checkpoint_loaded(self, step: int) -> None:
        """Handle that the state after `step` has been loaded, to resume or after a rollback."""

    def on_training_start(self, step: int) -> None:
        """Handle the start of this attempt, before its first step; `step` steps are done."""

    def on_step(self, metrics: StepMetrics, result: StepResult, seconds: Mapping[str, float]) -> None:
        """Handle the end of a step.

        Args:
            metrics: The step, as the curve stores it.
            result: What the engine returned.
            seconds: Duration of the step's parts: `data`, `compute`, `checkpoint`, and `all_to_all` if tokens travel
                between processes.
        """

    def on_training_end(self) -> None:
        """Handle the end of this attempt, also if training is interrupted or fails."""

    def should_stop(self) -> bool:
        """Return True to write a checkpoint and interrupt training after this step."""
        return False

    def state_dict(self) -> dict[str, Any] | None:
        """Return what checkpoints store for this listener, as plain JSON, or None for nothing."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned; {} if the checkpoint has none."""
