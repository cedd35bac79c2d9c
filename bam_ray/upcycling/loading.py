"""Whole models in memory, from a folder in any store: fp32, on the CPU."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import bam_ray.model  # noqa: F401 (registers the mixture with the Auto classes)
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError


def model_of(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model for evaluation with these weights, by the names of its checkpoints, which transformers may map to others.

    Raises `CheckpointError` where some are missing or left over.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=torch.float32, output_loading_info=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            raise CheckpointError(f"{config.model_type} weights: {problem.replace('_keys', '')} {min(info[problem])}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_model(reader: TensorReader) -> PreTrainedModel:
    """The dense model or mixture of a folder."""
    return model_of(AutoConfig.for_model(**reader.config), {name: reader.read(name).float() for name in reader.specs})
