"""The cost of serving a token."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from bam_ray.evaluation.serving_cost import cache_bytes_per_token
from bam_ray.model import BamConfig, BamForCausalLM
from tests.support.tiny import CONFIGS, SIZES

SETTINGS: dict[str, dict[str, Any]] = {
    "kv_experts": {},
    "kv_shared": {"attention_experts": "kv_shared"},
    "averaged": {"attention_experts": "averaged"},
    "dense layer": {"dense_layers": [0]},
    "half": {"dtype": "bfloat16"},
}
MIXTURES = {name: BamConfig(**{**SIZES, "num_experts": 3, **changes}) for name, changes in SETTINGS.items()}
EVERY_MODEL: dict[str, PreTrainedConfig] = {**MIXTURES, **CONFIGS}


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_the_cache_has_the_counted_bytes(name: str) -> None:
    """The keys and values of a real cache, for a text that is shorter than every window."""
    config = EVERY_MODEL[name]
    dtype = torch.bfloat16 if name == "half" else torch.float32
    model = BamForCausalLM(config) if name in MIXTURES else AutoModelForCausalLM.from_config(config)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model.to(dtype)(torch.tensor([[2, 3, 4]]), cache=cache, use_cache=True)
    tensors = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    assert sum(each.numel() * each.element_size() for each in tensors) == 3 * cache_bytes_per_token(config)
