"""The description of one training, which the stages that train pass to `train_to_artifact`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_ray.data import BlendedSampler, Corpus
from bam_ray.settings import Blend, MetricsSettings, TrainingSettings
from bam_ray.training.blending import DynamicBlendSampler
from bam_ray.training.events import Event


@dataclass(frozen=True)
class TrainingJob:
    """The data and the settings of one training, and what the artifact records besides them."""

    corpus: Corpus
    sampler: BlendedSampler | DynamicBlendSampler  # at its first step
    blend: Blend  # the sampler's initial weights, as the settings give them
    training: TrainingSettings
    metrics: MetricsSettings
    dtype: torch.dtype = torch.float32  # of the published weights: that of the seed
    initial_weights: Mapping[str, Tensor] | None = None  # a mixture's weights at step 0
    extra_files: tuple[Path, ...] = ()  # copied to the folders of the artifact and its checkpoints
    extra_parents: tuple[str, ...] = ()  # ids of parents of the artifact that the task does not have
    extra_facts: Mapping[str, Any] = field(default_factory=dict)  # further facts of the manifest
    events: Sequence[Event] = ()  # events of this attempt from before the training
    expert_history: Sequence[tuple[int, int]] = ()  # (step, experts): a mixture's smaller numbers of experts
