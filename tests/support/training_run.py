"""One attempt at a tiny training run, for tests of the training loop and of its checkpoints."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.model import BamConfig
from bam_ray.settings import Mixing, TrainingSettings
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.engine import EngineSpec
from bam_ray.training.events import Event
from bam_ray.training.listener import TrainingListener
from bam_ray.training.loop import Training
from bam_ray.training.torch_engine import TorchEngine
from tests.support import tiny
from tests.support.leases import next_lease

LENGTH = 16
RETENTION = Retention(last=2, every=None)
SETTINGS = TrainingSettings(tokens=12 * 4 * LENGTH, batch_tokens=4 * LENGTH, peak_lr=1e-2, checkpoint_every=4)
DENSE = tiny.CONFIGS["cohere"]
BAM = BamConfig(**{**tiny.SIZES, "num_experts_per_tok": 2})


class CountingSampler:
    """A sampler of sequences of two domains that are a function of its position alone."""

    position = 0

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` sequences [count, LENGTH] and the domains that they come from, one-hot [count, 2]."""
        generators = [np.random.default_rng(self.position + i) for i in range(count)]
        rows = np.stack([generator.integers(2, 96, LENGTH) for generator in generators])
        self.position += count
        return rows, np.eye(2, dtype=np.int64)[rows[:, 0] % 2]

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position in `state`."""
        self.position = state["position"]


class RecordingListener(TrainingListener):
    """A listener that records all events, and asks to stop after the steps for which `stop_after` is true."""

    def __init__(self, stop_after: Callable[[int], bool] = lambda step: False) -> None:
        self.events: list[Event] = []
        self._stop_after = stop_after
        self._step = 0

    def emit(self, event: Event) -> None:
        """Record an event."""
        self.events.append(event)

    def on_step(self, metrics: Any, result: Any, seconds: Any) -> None:
        """Remember the step."""
        self._step = metrics.step

    def should_stop(self) -> bool:
        """Return True if training is to stop after the last step."""
        return self._stop_after(self._step)


def engine(config: Any = DENSE, settings: TrainingSettings = SETTINGS, mixing: Mixing | None = None) -> TorchEngine:
    """Return an engine over a model of `config` with the same initial weights every time."""
    torch.manual_seed(0)
    return TorchEngine(EngineSpec(AutoModelForCausalLM.from_config(config), settings, mixing or Mixing()))


def checkpoints_of(store: BlobStore, lease: Lease | None, retention: Retention = RETENTION, **more: Any) -> Checkpoints:
    """Return the checkpoints of the artifact `branches/x` of `store`."""
    return Checkpoints(Artifact(store, ArtifactKind.BRANCHES, "x"), lease, retention, **more)


def run(
    store: BlobStore,
    should_stop: Callable[[int], bool] = lambda step: False,
    settings: TrainingSettings = SETTINGS,
    config: Any = DENSE,
    model: PreTrainedModel | None = None,
    events: list[Event] | None = None,
    mixing: Mixing | None = None,
) -> list[float]:
    """Make one attempt at the artifact `branches/x` of `store`; return the NLL of every step since step 1.

    The events of the attempt are added to `events`.
    """
    listener = RecordingListener(should_stop)
    if events is not None:
        listener.events = events
    training = Training(
        engine(config, settings, mixing) if model is None else TorchEngine(EngineSpec(model, settings)),
        CountingSampler(),
        LENGTH,
        settings,
        checkpoints_of(store, next_lease(store, "branches/x"), emit=listener.emit),
        listener,
    )
    training.resume()
    return [metrics.nll for metrics in training.run().curve]
