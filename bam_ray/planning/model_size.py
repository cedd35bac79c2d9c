"""How large models are, by their configuration alone: parameters, operations, bytes. No torch.

Parameters of a layer: attention 2dq + 2dc (query width q, key/value width c), FFN 3df, or 2df where it is not gated,
norms; biases, where a family has only some, are left out (less than one in a thousand). Bytes are estimates for full
training with AdamW in fp32: 4 each for weight and gradient, 8 for Adam's two states.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from bam_ray.blobs import open_store
from bam_ray.errors import StoreError
from bam_ray.settings import MixtureSettings, Operation, Recipe, RoutedMixture, Scratch, TrainingSettings

TRAINING_BYTES = 16  # a parameter: weight, gradient, two states of Adam
CHECKPOINT_BYTES = 12  # weight and Adam's states
WEIGHT_BYTES = 4
CHUNK_TOKENS = 256  # the loss is computed of so many at once, or as many as hidden states are wide (next_token)


@dataclass(frozen=True)
class ModelSize:
    """A dense model, or a mixture of `experts` such models."""

    hidden: int
    ffn: int
    layers: int
    query: int  # heads × head_dim
    key: int  # key/value heads × head_dim
    vocabulary: int
    tied: bool
    vectors: int  # of hidden size in a layer: norms, and biases where everything has one
    ffn_matrices: int = 3  # gate, up and down; 2 without a gate
    experts: int = 1
    ffn_active: int = 1
    attention: int = 1  # attention experts
    keys: int = 1  # of them with keys and values of their own
    routers: int = 0

    @property
    def parameters(self) -> int:
        """In all."""
        return self.shared_parameters + self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        """Those that expert parallelism divides among processes."""
        if self.experts == 1:
            return 0
        layer = self.experts * self.ffn_matrices * self.hidden * self.ffn
        if self.attention > 1:
            layer += self.attention * 2 * self.hidden * self.query
            layer += self.keys * 2 * self.hidden * self.key if self.keys > 1 else 0
        return self.layers * layer

    @property
    def shared_parameters(self) -> int:
        """Those that every process has."""
        layer = self.vectors * self.hidden + self.routers * self.experts * self.hidden
        if self.experts == 1:
            layer += self.ffn_matrices * self.hidden * self.ffn
        if self.attention == 1:
            layer += 2 * self.hidden * self.query
        if self.keys == 1:
            layer += 2 * self.hidden * self.key
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden

    def training_flops(self, context: int) -> float:
        """Operations of training on one token of a sequence of `context`: three times the forward pass."""
        matrices = (
            self.attention * 2 * self.hidden * self.query
            + self.keys * 2 * self.hidden * self.key
            + self.ffn_active * self.ffn_matrices * self.hidden * self.ffn
            + self.routers * self.experts * self.hidden
        )
        scores = self.attention * context * self.query
        return 6.0 * (self.layers * (matrices + scores) + self.vocabulary * self.hidden)

    def training_bytes(self, training: TrainingSettings, context: int, expert_parallel: int = 1) -> int:
        """Memory of one process: weights, gradients, Adam and what one micro batch keeps for the backward pass.

        A micro batch that is fitted to the memory needs room for one sequence at least.
        """
        sequences = 1 if training.micro_batch_sequences == "auto" else training.micro_batch_sequences
        number = 2 if training.precision == "bf16" else 4
        layer = 2 * self.hidden + 3 * self.attention * self.query + 3 * self.keys * self.key
        layer += self.ffn_matrices * self.ffn_active * self.ffn
        kept = self.hidden * self.layers + layer if training.recompute else self.layers * layer
        tokens = sequences * context
        # Of the scores over the vocabulary two copies in fp32 of one chunk, and a gradient of the head
        head = self.vocabulary * (8 * min(tokens, max(CHUNK_TOKENS, self.hidden)) + 4 * self.hidden)
        weights = TRAINING_BYTES * (self.shared_parameters + self.expert_parameters // expert_parallel)
        return weights + tokens * number * kept + head

    def mixed(self, mixture: MixtureSettings, models: int) -> "ModelSize":
        """The mixture of `models` models of this size, or of one where the method takes the seed alone."""
        if not isinstance(mixture, RoutedMixture):
            return self
        experts = mixture.expert_count(models)
        attends = mixture.attention != "averaged"
        heads_are_split = mixture.query is Operation.PARTITION
        return replace(
            self,
            ffn=self.ffn // experts if mixture.ffn is Operation.PARTITION else self.ffn,
            query=self.query // experts if heads_are_split else self.query,
            key=self.key // experts if heads_are_split else self.key,
            experts=experts,
            ffn_active=mixture.num_experts_per_tok,
            attention=experts if attends else 1,
            keys=experts if mixture.attention == "kv_experts" else 1,
            routers=2 if attends else 1,
        )


def seed_size(recipe: Recipe) -> ModelSize | None:
    """The size of the seed and of each branch; None where it cannot be known before the run."""
    if recipe.seed.scratch is not None:
        tokenizer = recipe.data.tokenizer
        config = _config_of(tokenizer.folder, recipe) if tokenizer.folder else {"vocab_size": tokenizer.vocab_size}
        return _of_scratch(recipe.seed.scratch, config["vocab_size"]) if "vocab_size" in config else None
    assert recipe.seed.folder is not None
    return _of_config(_config_of(recipe.seed.folder, recipe))


def _config_of(folder: str, recipe: Recipe) -> dict[str, Any]:
    """A folder's config.json; empty where there is none to be read."""
    try:
        plain = json.loads(open_store(folder, recipe.store.endpoint).get("config.json"))
    except (StoreError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _of_scratch(scratch: Scratch, vocabulary: int) -> ModelSize:
    head = scratch.hidden_size // scratch.heads
    return ModelSize(
        hidden=scratch.hidden_size,
        ffn=scratch.intermediate_size,
        layers=scratch.layers,
        query=scratch.hidden_size,
        key=scratch.kv_heads * head,
        vocabulary=vocabulary,
        tied=scratch.tie_embeddings,
        vectors=1,
    )


def _of_config(config: dict[str, Any]) -> ModelSize | None:
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head = config.get("head_dim") or hidden // heads
        family, ffn = config["model_type"], config["intermediate_size"]
        cohere, neox = family in ("cohere", "cohere2"), family == "gpt_neox"
        return ModelSize(
            hidden=hidden,
            ffn=ffn,
            layers=config["num_hidden_layers"],
            query=heads * head,
            key=config.get("num_key_value_heads", heads) * head,
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", cohere),
            # GPT-NeoX: two norms of two vectors, biases of q, k, v, o and the FFN's down; those of its up are ffn wide
            vectors=9 + ffn // hidden if neox else 1 if cohere else 2,
            ffn_matrices=2 if neox else 3,
        )
    except KeyError:
        return None
