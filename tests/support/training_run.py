"""One attempt at a tiny training run, for tests of the training loop and of its checkpoints."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.leases import Lease
from bam_ray.model import BamConfig
from bam_ray.settings import Mixing, TrainingSettings
from bam_ray.training.checkpoints import Checkpoints, Retention, Tell
from bam_ray.training.engine import TorchEngine
from bam_ray.training.loop import Point, Training
from tests.support import tiny

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


def engine(config: Any = DENSE, settings: TrainingSettings = SETTINGS, mixing: Mixing | None = None) -> TorchEngine:
    """Return an engine over a model of `config` with the same initial weights every time."""
    torch.manual_seed(0)
    return TorchEngine(AutoModelForCausalLM.from_config(config), settings, mixing)


def run(
    store: BlobStore,
    should_stop: Callable[[int], bool] = lambda step: False,
    settings: TrainingSettings = SETTINGS,
    config: Any = DENSE,
    model: PreTrainedModel | None = None,
    tell: Tell = lambda what, **facts: None,
    mixing: Mixing | None = None,
) -> list[float]:
    """Make one attempt at the artifact `branches/x` of `store`; return the NLL of every step since step 1."""
    lease = Lease.take(store, "branches/x")
    points: list[Point] = []
    training = Training(
        engine(config, settings, mixing) if model is None else TorchEngine(model, settings),
        CountingSampler(),
        LENGTH,
        settings,
        Checkpoints(store, "branches", "x", lease, RETENTION, tell),
        points.append,
        tell,
        lambda: should_stop(points[-1].step),
    )
    training.resume()
    return [point.nll for point in training.run()]
