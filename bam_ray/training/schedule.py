"""The learning rate by step: linear warm-up, then a cosine down to a fraction of the peak (the paper's recipe)."""

import math

from bam_ray.settings import TrainingSettings


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """Return the learning rate of update number `step`, counted from 0."""
    warmup = max(1, round(settings.steps * settings.warmup_fraction))
    if step < warmup:
        return settings.peak_lr * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    floor = settings.final_lr_fraction
    return settings.peak_lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
