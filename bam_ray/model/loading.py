"""Loading of a model folder, which must have all weights of the model, and the names of weights in folders."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

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


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the names of all weights and buffers of `model` in a folder, by their names in its state dict.

    transformers renames some of them when it loads and saves a model, for example the head of GPT-NeoX.
    """
    names = list(model.state_dict())
    # transformers returns new tensors, so the length of a tensor states the position of its name
    reverted = revert_weight_conversion(
        model, {name: torch.empty(number, device="meta") for number, name in enumerate(names)}
    )
    return {names[tensor.numel()]: stored for stored, tensor in reverted.items()}
