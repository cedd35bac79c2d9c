"""Training of adapters, one after another, on one loaded model.

The result of an adapter depends on the settings and on the text of its topic, and on nothing that was trained before:
its factors and Adam's states are initialized again, and its random numbers and the order of its rows are functions of
the seed and of its name. So every process that trains an adapter makes the same one.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bam_ray.adapters.lora import LoraModel
from bam_ray.data.sampling import BlendedSampler, TrainingRows
from bam_ray.errors import LossNotFinite
from bam_ray.settings import TrainingSettings
from bam_ray.training.loop import random_seed
from bam_ray.training.schedule import learning_rate
from bam_ray.training.torch_engine import TorchEngine


@dataclass(frozen=True)
class TrainedAdapter:
    """The record of one training: the NLL of each step in nats per token, and the seconds of all steps."""

    nll: list[float]
    seconds: float


class AdapterTrainer:
    """Trains the adapter of a model for one topic after another.

    Args:
        lora: The model with its adapter.
        engine: The engine of the model, which was made after the adapter.
        rows: The rows of each topic.
        settings: The settings of each training.
    """

    def __init__(self, lora: LoraModel, engine: TorchEngine, rows: TrainingRows, settings: TrainingSettings) -> None:
        self._lora, self._engine, self._rows, self._settings = lora, engine, rows, settings
        self._order = zlib.crc32(f"adapters/{settings.seed}".encode())

    def train(self, topic: str, on_step: Callable[[int, float], None]) -> TrainedAdapter:
        """Train the adapter of `topic` from its start. The weights are then in the model.

        Args:
            topic: The name of the topic.
            on_step: Called after each step with the number of finished steps and the NLL. It may raise.

        Raises:
            LossNotFinite: A loss is not finite, and once more if the settings say so.
        """
        retries = 1 if self._settings.on_not_finite == "retry" else 0
        while True:
            try:
                return self._train(topic, on_step)
            except LossNotFinite as error:
                if not retries:
                    raise LossNotFinite(
                        f"{topic}: {error}: lower adapters.training.peak_lr or check its text"
                    ) from None
                retries -= 1

    def _train(self, topic: str, on_step: Callable[[int, float], None]) -> TrainedAdapter:
        engine, settings = self._engine, self._settings
        started = time.perf_counter()
        number = zlib.crc32(topic.encode())
        self._lora.reset(random_seed(settings.seed, number))
        engine.reset_optimizer(0)
        sampler = BlendedSampler(self._rows, {topic: 1.0}, self._order)
        sequences = settings.batch_tokens // self._rows.sequence_length
        nll: list[float] = []
        for step in range(settings.steps):
            torch.manual_seed(random_seed(settings.seed, number, step))  # for dropout
            batch, _ = sampler.take(sequences)
            nll.append(engine.step(torch.from_numpy(batch), learning_rate(settings, step)).nll)
            on_step(step + 1, nll[-1])
        return TrainedAdapter(nll, time.perf_counter() - started)
