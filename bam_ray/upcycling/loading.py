"""Loading of whole models into memory from any store, in fp32 on the CPU."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import bam_ray.model  # noqa: F401 (registers the mixture with the Auto classes)
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError


def model_of(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a model with these weights, in evaluation mode.

    Args:
        config: The configuration of a dense model or a mixture.
        weights: The tensors by their names in checkpoints, which transformers may map to other parameter names.

    Raises:
        CheckpointError: Weights are missing or left over.
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
            raise CheckpointError(
                f"the weights do not fit a {config.model_type} model: {problem.replace('_keys', '')} "
                f"{min(info[problem])}; use the config.json that was saved with them"
            )
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_model(reader: TensorReader) -> PreTrainedModel:
    """Return the dense model or mixture of a folder, in evaluation mode."""
    return model_of(AutoConfig.for_model(**reader.config), {name: reader.read(name).float() for name in reader.specs})
