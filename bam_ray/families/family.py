"""What a family is: a table of a dense model's parameters and their roles, and its configuration as a mixture's.

The table reads both ways: a role and a layer say which rows of which dense tensor hold a parameter. What the mixture
calls it is said once for all families (`names`).

Configurations are read as transformers reads them: a `config.json` leaves out defaults, and older ones lay out some
settings differently (`rope_theta` and `rope_scaling` for `rope_parameters`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from transformers import CONFIG_MAPPING

from bam_ray.errors import FamilyError

Rows = list[tuple[int, int]]


class Role(StrEnum):
    """What a parameter does in a dense transformer; unique within a layer."""

    EMBEDDING = "embedding"
    HEAD = "head"
    FINAL_NORM = "final_norm"
    FINAL_NORM_BIAS = "final_norm_bias"
    INPUT_NORM = "input_norm"
    INPUT_NORM_BIAS = "input_norm_bias"
    POST_ATTENTION_NORM = "post_attention_norm"
    POST_ATTENTION_NORM_BIAS = "post_attention_norm_bias"
    POST_FFN_NORM = "post_ffn_norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    QUERY_BIAS = "query_bias"
    KEY_BIAS = "key_bias"
    VALUE_BIAS = "value_bias"
    OUTPUT_BIAS = "output_bias"
    QUERY_NORM = "query_norm"
    KEY_NORM = "key_norm"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_BIAS = "gate_bias"
    UP_BIAS = "up_bias"
    DOWN_BIAS = "down_bias"


@dataclass(frozen=True)
class Weight:
    """One row: a dense parameter's name, `{layer}` standing for the layer's number, and its role.

    `rows(config)` gives the ranges of rows (dimension 0, half-open) of the dense tensor that, one after the other, are
    the role's tensor; None: all of it. Several rows of the table may name one dense tensor.
    """

    name: str
    role: Role
    rows: Callable[[dict[str, Any]], Rows] | None = None


@dataclass(frozen=True)
class Place:
    """Where a dense checkpoint holds the parameter of a role: `rows` of the tensor `name` (None: all of it)."""

    role: Role
    layer: int | None
    name: str
    rows: Rows | None = None


# The setting of the mixture without which a dense model has no such parameter
NEEDED = {
    Role.QUERY_BIAS: "attention_bias",
    Role.KEY_BIAS: "attention_bias",
    Role.VALUE_BIAS: "attention_bias",
    Role.OUTPUT_BIAS: "attention_output_bias",
    Role.QUERY_NORM: "qk_norm",
    Role.KEY_NORM: "qk_norm",
    Role.GATE_BIAS: "mlp_bias",
    Role.UP_BIAS: "mlp_bias",
    Role.DOWN_BIAS: "mlp_bias",
}
HIDDEN_ACTS = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """One dense architecture.

    `block` gives the settings of `BamConfig` that are its own, from a configuration as transformers reads it. `refused`
    maps settings that are not supported to their only supported value. `ignored` are patterns of tensors that old
    checkpoints hold and nothing reads.
    """

    model_type: str
    weights: tuple[Weight, ...]
    block: Callable[[dict[str, Any]], dict[str, Any]]
    refused: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    partial_rotary: bool = False

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration as transformers reads it: defaults filled in, one layout whatever version wrote it."""
        settings: dict[str, Any] = CONFIG_MAPPING[self.model_type].from_dict(dict(config)).to_dict()
        return settings

    def configure(self, config: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `BamConfig` for the dense model of this configuration: its sizes and its block."""
        config = self.read(config)
        shared = {key: config[key] for key in SHARED if key in config}
        dropout = float(config.get("attention_dropout") or 0.0)
        return {**shared, "attention_dropout": dropout, **self.block(config)}

    def places(self, config: dict[str, Any]) -> list[Place]:
        """Every parameter that a dense model of this configuration has, in the order of its layers."""
        config = self.read(config)
        settings = self.configure(config)
        present = [
            weight
            for weight in self.weights
            if (weight.role not in NEEDED or settings.get(NEEDED[weight.role]))
            and not (weight.role is Role.HEAD and settings["tie_word_embeddings"])
        ]
        layered = [weight for weight in present if "{layer}" in weight.name]
        first, last = present.index(layered[0]), present.index(layered[-1])

        def place(weight: Weight, layer: int | None) -> Place:
            rows = None if weight.rows is None else weight.rows(config)
            return Place(weight.role, layer, weight.name.format(layer=layer), rows)

        return [
            *(place(weight, None) for weight in present[:first]),
            *(place(weight, layer) for layer in range(config["num_hidden_layers"]) for weight in layered),
            *(place(weight, None) for weight in present[last + 1 :]),
        ]

    def expected(self, config: dict[str, Any]) -> list[str]:
        """The names of the tensors that a dense checkpoint of this configuration must have, each once."""
        return list(dict.fromkeys(place.name for place in self.places(config)))

    def ignores(self, name: str, config: dict[str, Any]) -> bool:
        """Whether a tensor that is not expected does no harm: a buffer of old versions, or a tied head written out."""
        heads = [weight.name for weight in self.weights if weight.role is Role.HEAD]
        if name in heads:
            return bool(self.configure(config)["tie_word_embeddings"])
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)

    def check(self, config: dict[str, Any], where: str) -> None:
        """Raise `FamilyError` where a setting of `config` is not supported, naming it and what is."""
        try:
            config = self.read(config)
        except Exception as error:  # of many kinds, from transformers' own checks
            reason = " ".join(str(error).split())
            raise FamilyError(f"{where} is no {self.model_type} configuration: {reason}") from None
        rope = config.get("rope_parameters") or {}
        for key, value, supported in (
            ("quantization_config", config.get("quantization_config"), (None,)),
            *((key, config.get(key), (only, None)) for key, only in self.refused.items()),
            ("hidden_act", config["hidden_act"], HIDDEN_ACTS),
            ("rope_type", rope.get("rope_type", "default" if "rope_theta" in rope else rope), ROPE_TYPES),
            ("partial_rotary_factor", 1.0 if self.partial_rotary else rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ):
            if value not in supported:
                only = " or ".join(repr(choice) for choice in supported if choice is not None or len(supported) == 1)
                raise FamilyError(f"{where}: {key} is {value!r}; only {only} is supported")


SHARED = (
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
    "tie_word_embeddings",
)
"""The settings that transformers' families and the mixture name alike."""
