"""A tokenizer, and tiny random models with its vocabulary."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.model import BamConfig
from bam_ray.serving import DecodeEngine
from tests.support.tiny import SIZES, with_random_counts

LINES = ["the cat sat on the mat", "user: what is a mixture?", "assistant: many experts in one model", "naïve café ☕"]
END = "<|end|>"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 300 tokens: all bytes and a few merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    bpe.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


@pytest.fixture(scope="session")
def models_by_family(tokenizer: PreTrainedTokenizerFast) -> dict[str, PreTrainedModel]:
    """Return random models that rarely generate the end token."""
    sizes: dict[str, Any] = {**SIZES, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 0}
    configs = {
        "cohere": CohereConfig(**sizes, logit_scale=0.5),
        "llama": LlamaConfig(**sizes, tie_word_embeddings=False),
        "bam": BamConfig(**sizes, num_experts=3, attention_experts="kv_experts"),
        "bam-prefix": BamConfig(
            **sizes,
            num_experts=3,
            embeddings="experts",
            router_input="prefix",
            router_prior="bigram",
            router_prior_buckets=1000,
            router_forgetting=0.9,
        ),
        "bam-shared": BamConfig(**sizes, num_experts=3, attention_experts="kv_shared", num_experts_per_tok=2),
    }
    models_by_name = {}
    for name, config in configs.items():
        torch.manual_seed(1)
        models_by_name[name] = AutoModelForCausalLM.from_config(config).eval()
    with_random_counts(models_by_name["bam-prefix"])
    return models_by_name


@pytest.fixture
def engine(models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> DecodeEngine:
    """Return an engine with three slots for a Cohere model."""
    return DecodeEngine(models_by_family["cohere"], tokenizer, slots=3, max_length=64)
