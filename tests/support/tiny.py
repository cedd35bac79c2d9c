"""Tiny random models for tests, in memory or as Hugging Face folders."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from bam_ray.blobs import open_store
from bam_ray.checkpoint.tensors import TensorReader

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large enough for experts to differ visibly
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA_CONFIG: dict[str, Any] = {  # the content of a config.json, with few settings
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, Any] = {
    "cohere": CohereConfig(**SIZES, logit_scale=0.5),
    "cohere2": Cohere2Config(**SIZES, **SLIDING, logit_scale=0.5),
    "gpt_neox": GPTNeoXConfig(**{key: size for key, size in SIZES.items() if key != "num_key_value_heads"}),
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=5, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**SIZES),
    "qwen2": Qwen2Config(**SIZES, **SLIDING, use_sliding_window=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def dense(family: str | PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Return a random dense model whose norms and biases are random too.

    `family` is a key of `CONFIGS` or a configuration.
    """
    torch.manual_seed(seed)
    # A model changes its configuration, for example the dtype when it is saved
    config = copy.deepcopy(CONFIGS[family] if isinstance(family, str) else family)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def assert_recomputation_keeps_gradients(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Assert that every parameter has a gradient, and the same one if activations are recomputed."""
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None
        torch.testing.assert_close(plain, recomputed)


def with_random_counts(model: PreTrainedModel) -> PreTrainedModel:
    """Give the router prior of a mixture, if it has one, random counts; return the mixture."""
    prior: Any = model.model.prior
    if prior is not None:
        prior.experts.tokens.random_(0, 500)
        prior.experts.pairs.random_(0, 20)
    return model


def sources(folder: Path, models: dict[str, PreTrainedModel]) -> dict[str, TensorReader]:
    """Save each model in a folder of its name below `folder`; return a reader of each, by name."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: TensorReader(open_store(str(folder / name))) for name in models}


def tokens(batch: int = 2, length: int = 17, seed: int = 0) -> torch.Tensor:
    """Return random token ids [batch, length] that contain neither the padding nor the end-of-text id."""
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
