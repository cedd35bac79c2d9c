"""Loading of whole models into memory from any store, in fp32 on the CPU."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError
from bam_ray.families import check_weights, family_of
from bam_ray.model import is_mixture
from bam_ray.upcycling.dense import mixture_config_of


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
    """Return the dense model or mixture of a folder, in evaluation mode.

    Raises:
        FamilyError: The architecture is not supported, or the weights are not those of the configuration.
        CheckpointError: The weights are not those of a mixture with its configuration.
    """
    if is_mixture(reader.config):
        config, names = mixture_config_of(reader), list(reader.specs)
    else:
        family = family_of(reader.config, reader.uri)
        check_weights(reader, family)
        config = AutoConfig.for_model(**reader.config)
        names = [name for name in reader.specs if not family.ignores(name)]
    return model_of(config, {name: widened(reader.read(name)) for name in names})


def widened(tensor: Tensor) -> Tensor:
    """Return weights in fp32, and the counts of a router prior as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor
