"""Loading of a model folder, which must have all weights of the model."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.errors import CheckpointError


def load_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal language model in a folder, on the CPU.

    transformers gives random values to weights that a folder lacks, and only warns.

    Args:
        folder: A folder that `save_pretrained` could have written.
        dtype: The precision of the weights.

    Raises:
        CheckpointError: Weights are missing.
    """
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]} ({len(missing)} weights of the model are missing): it was written by another "
            "version of bam-ray or is damaged, so make it again"
        )
    loaded: PreTrainedModel = model
    return loaded
