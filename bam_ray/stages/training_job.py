"""What a stage trains: the value that seeds, branches and mixtures hand to `train.train_to_artifact`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bam_ray.settings import Blend, DynamicBlend, MetricsSettings, TrainingSettings
from bam_ray.training.events import Event


@dataclass(frozen=True)
class DynamicBlendSpec:
    """A blend that depends on held-out losses.

    `reference(domain, rows)` returns the reference loss of a domain: the mean NLL on rows [S, L], in nats per token.
    """

    settings: DynamicBlend
    reference: Callable[[str, np.ndarray], float]


@dataclass(frozen=True)
class TrainingJob:
    """The data and the settings of one training, and what the artifact records besides them."""

    corpus_folder: Path
    blend: Blend
    training: TrainingSettings
    metrics: MetricsSettings
    dynamic_blend: DynamicBlendSpec | None = None
    initial_folder: Path | None = None  # a mixture's folder at step 0
    extra_files: tuple[Path, ...] = ()  # copied to the folders of the artifact and its checkpoints
    extra_parents: tuple[str, ...] = ()  # ids of parents of the artifact that the task does not have
    extra_facts: Mapping[str, Any] = field(default_factory=dict)  # further facts of the manifest
    events: Sequence[Event] = ()  # events of this attempt from before the training
    expert_history: Sequence[tuple[int, int]] = ()  # (step, experts): a mixture's smaller numbers of experts
