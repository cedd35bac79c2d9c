"""A mixture before its weights: on the meta device, where it costs nothing, until it is known which are this rank's.

    outline       the folder's model, with the shapes of its parameters alone
    materialise   memory for those that it still has, once experts of other ranks are cut away

Whoever materialises it reads the weights, parameter by parameter: so no process holds a whole mixture.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

import bam_ray.model  # noqa: F401 (registers the mixture with the Auto classes)
from bam_ray.model.attention_bam import BamRotaryEmbedding

NOISE = "noise_weight"
"""What a gate has that became noisy: it begins at zero, and no folder at step 0 has it."""


def outline(folder: Path, **changes: Any) -> PreTrainedModel:
    """The mixture of `folder`, its configuration changed by `changes`: fp32, whatever the folder has, without memory.

    But for that it is what `from_pretrained` gives.
    """
    config = AutoConfig.from_pretrained(folder, **changes)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def materialise(model: PreTrainedModel) -> None:
    """Give an outline memory on the CPU: parameters are to be read, buffers are zero or functions of the configuration.

    Tied parameters stay one, and all keep their attributes.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, outlined in list(module.named_parameters(recurse=False)):
            if outlined not in made:
                like = torch.zeros_like if name == NOISE else torch.empty_like  # empty: no page of it is there yet
                made[outlined] = nn.Parameter(like(outlined, device="cpu"), outlined.requires_grad)
                vars(made[outlined]).update(vars(outlined))  # such as ZeRO's marks of experts
            setattr(module, name, made[outlined])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
        if isinstance(module, BamRotaryEmbedding):
            module.inv_freq = module.frequencies(module.config)[0]
