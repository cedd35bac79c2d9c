"""Random LoRA adapters in peft's format."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel


def write_adapter(folder: Path, base: PreTrainedModel, seed: int = 0, **settings: Any) -> Path:
    """Write a random adapter of `base` that changes its output clearly. `settings` are those of `LoraConfig`."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})
    model: Any = get_peft_model(copy_of(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return a copy of `base` whose weights contain the adapter in `folder`, merged by peft."""
    model: PreTrainedModel = PeftModel.from_pretrained(copy_of(base), folder).merge_and_unload()
    return model.eval()


def copy_of(base: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model, which peft and the server change in place."""
    copy: PreTrainedModel = AutoModelForCausalLM.from_config(base.config).eval()
    copy.load_state_dict(base.state_dict())
    copy.generation_config = base.generation_config
    return copy
