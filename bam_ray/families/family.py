"""What a family is: a table from a dense model's parameter names to roles, and from its configuration to a mixture's.

Dense names and the mixture's names for averaged parameters are the same here (both follow the Llama layout), so a
table needs one name a parameter; stacked parameters are named by their role (`upcycling.methods`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bam_ray.errors import FamilyError


class Role(StrEnum):
    """What a parameter does in a dense transformer."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True)
class Weight:
    """One row: a parameter's name, `{layer}` standing for the layer's number, and its role."""

    name: str
    role: Role


@dataclass(frozen=True)
class Family:
    """One dense architecture. `refused` maps settings that are not supported to their only supported value."""

    model_type: str
    weights: tuple[Weight, ...]
    configure: Callable[[dict[str, Any]], dict[str, Any]]
    refused: dict[str, Any]

    def check(self, config: dict[str, Any], where: str) -> None:
        """Raise `FamilyError` where a setting of `config` is not supported."""
        for key, value in self.refused.items():
            if config.get(key, value) not in (value, None):
                raise FamilyError(f"{where}: {key} is {config[key]!r}; only {value!r} is supported")

    def expected(self, config: dict[str, Any]) -> dict[str, Weight]:
        """Every parameter that a checkpoint of this configuration has, by name."""
        layers = range(config["num_hidden_layers"])
        tied = config.get("tie_word_embeddings", self.configure(config)["tie_word_embeddings"])
        return {
            weight.name.format(layer=layer): weight
            for weight in self.weights
            if not (tied and weight.role is Role.HEAD)
            for layer in (layers if "{layer}" in weight.name else (0,))
        }


LAYER = "model.layers.{layer}."

LLAMA_LAYOUT = (
    Weight("model.embed_tokens.weight", Role.EMBEDDING),
    Weight(LAYER + "input_layernorm.weight", Role.NORM),
    Weight(LAYER + "self_attn.q_proj.weight", Role.QUERY),
    Weight(LAYER + "self_attn.k_proj.weight", Role.KEY),
    Weight(LAYER + "self_attn.v_proj.weight", Role.VALUE),
    Weight(LAYER + "self_attn.o_proj.weight", Role.OUTPUT),
    Weight(LAYER + "mlp.gate_proj.weight", Role.GATE),
    Weight(LAYER + "mlp.up_proj.weight", Role.UP),
    Weight(LAYER + "mlp.down_proj.weight", Role.DOWN),
    Weight("model.norm.weight", Role.NORM),
    Weight("lm_head.weight", Role.HEAD),
)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that every family names alike, those that `config` has."""
    return {key: config[key] for key in SIZES if key in config}
