"""A model on the meta device, which takes no memory until this rank's part of it is known.

    model_on_meta   the folder's model, which has only the shapes of its parameters
    materialize     allocates the parameters that are left when the experts of other ranks have been removed

The caller of `materialize` reads the weights parameter by parameter, so no process holds more than its part.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

import bam_ray.model  # noqa: F401 (registers the mixture with the Auto classes)

NOISE_WEIGHT = "noise_weight"
"""The parameter that a gate has in addition when it becomes noisy. It starts at zero and is in no folder at step 0."""


def model_on_meta(folder: Path, **changes: Any) -> PreTrainedModel:
    """Return the model of `folder` in fp32 on the meta device, with `changes` to its configuration.

    Apart from that it equals the result of `from_pretrained`. The precision of the folder does not matter.
    """
    config = AutoConfig.from_pretrained(folder, **changes)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def materialize(model: PreTrainedModel) -> None:
    """Allocate a model on the meta device on the CPU.

    Parameters are uninitialized and must be read. Buffers are zero or are computed from the configuration. Tied
    parameters stay tied, and all parameters keep their attributes.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, on_meta in list(module.named_parameters(recurse=False)):
            if on_meta not in made:
                like = torch.zeros_like if name == NOISE_WEIGHT else torch.empty_like  # empty: touches no page yet
                made[on_meta] = nn.Parameter(like(on_meta, device="cpu"), on_meta.requires_grad)
                vars(made[on_meta]).update(vars(on_meta))  # for example ZeRO's marks of experts
            setattr(module, name, made[on_meta])
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
        if buffers.keys() - module.state_dict().keys():  # the frequencies of rotary embeddings, which are not saved
            computed: Any = type(module)(module.config)
            for name, buffer in computed.named_buffers(recurse=False):
                setattr(module, name, buffer)
