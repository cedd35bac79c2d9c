"""A family of dense architectures: a table of its parameters, and the conversion of its configuration to a mixture's.

Problem: dense families name and lay out the same parameters differently, and their configurations differ too. Code
that builds a mixture, or turns one back into a dense model, must not know any family.

Design choice: each family is a table of parameter names and their roles. For a role and a layer, it gives the dense
tensor, and the rows of it, that contain the parameter, so it can be read in both directions. The names in the mixture
are the same for all families (see `names`).

Limits: a configuration is normalized by transformers before it is read, because a `config.json` omits defaults and old
ones name some settings differently (`rope_theta` and `rope_scaling` instead of `rope_parameters`). Settings that the
mixture cannot express are refused, and never approximated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from transformers import CONFIG_MAPPING

from bam_ray.errors import FamilyError, one_line

RowRanges = list[tuple[int, int]]
"""Half-open ranges of rows (dimension 0) of a tensor."""


class Role(StrEnum):
    """The role of a parameter in a dense transformer, unique within a layer."""

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
class ParameterTemplate:
    """One row of a family's table: the name of a dense tensor and the role of the parameter in it.

    Attributes:
        name: The name of the tensor, in which `{layer}` stands for the number of the layer.
        role: The role of the parameter.
        rows: A function of the configuration that returns the ranges of rows which form the parameter when they are
            concatenated; None means the whole tensor. Several templates may name one tensor.
    """

    name: str
    role: Role
    rows: Callable[[dict[str, Any]], RowRanges] | None = None


@dataclass(frozen=True)
class DenseParameter:
    """A parameter of a dense checkpoint: its role, its layer (None outside of layers), and its place in a tensor.

    It consists of the `rows` of the tensor `name`; None means the whole tensor.
    """

    role: Role
    layer: int | None
    name: str
    rows: RowRanges | None = None


# The setting of the mixture that must be true for a dense model to have a parameter of the role
REQUIRED_SETTING = {
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
# Also in bam_ray.model.configuration_bam, which this package must not import: model files are copied into every
# exported folder and stand alone. tests/families checks that both are equal.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

SIZE_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
"""The settings that determine the sizes of a model, in the order in which people read them."""

SHARED_SETTINGS = (
    *SIZE_SETTINGS,
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""The settings that have the same name in every family of transformers and in the mixture."""

# Settings that may differ between copies of one model, because they do not affect the meaning of its weights
MEANINGLESS_SETTINGS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
)
EQUAL_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
ROTARY_BUFFERS = ("*.rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached")
"""Patterns of names of buffers that old checkpoints of all families may contain and that nothing reads."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that only quantized models have; the last one is MLX's."""


@dataclass(frozen=True)
class Family:
    """One dense architecture.

    Attributes:
        model_type: The name of the architecture in transformers.
        templates: The table of parameters. Those of a layer are adjacent.
        convert_block: A function from a normalized configuration to the family's own settings of `BamConfig`.
        required_values: Settings of which only one value is supported, with that value.
        ignored_tensors: Patterns of names of buffers that old checkpoints of this family contain, besides those of
            rotary embeddings.
        partial_rotary: True if the family supports rotary embeddings on a part of each head.
    """

    model_type: str
    templates: tuple[ParameterTemplate, ...]
    convert_block: Callable[[dict[str, Any]], dict[str, Any]]
    required_values: dict[str, Any] = field(default_factory=dict)
    ignored_tensors: tuple[str, ...] = ()
    partial_rotary: bool = False

    def normalize_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration as transformers reads it, with all defaults and in the layout of this version."""
        settings: dict[str, Any] = CONFIG_MAPPING[self.model_type].from_dict(dict(config)).to_dict()
        return settings

    def convert_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of `BamConfig` for a dense model: its sizes and its block."""
        config = self.normalize_config(config)
        shared = {key: config[key] for key in SHARED_SETTINGS if key in config}
        dropout = float(config.get("attention_dropout") or 0.0)
        return {**shared, "attention_dropout": dropout, **self.convert_block(config)}

    def meaning(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that determine the function of given weights.

        Two configurations of a family have the same meaning if and only if these settings are equal.
        """
        settings = self.convert_config(config)
        heads, positions = settings["num_attention_heads"], settings["max_position_embeddings"]
        settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // heads
        settings["num_key_value_heads"] = settings.get("num_key_value_heads") or heads
        settings["hidden_act"] = EQUAL_ACTIVATIONS.get(settings["hidden_act"], settings["hidden_act"])
        rope = {"partial_rotary_factor": 1.0, **settings["rope_parameters"]}
        rope.pop("type", None)  # an old name of rope_type
        settings["rope_parameters"] = rope
        window, kinds = settings.get("sliding_window"), settings.get("layer_types")
        if window is None or window >= positions or (kinds and "sliding_attention" not in kinds):
            settings["sliding_window"], settings["layer_types"] = None, None
        meaningless = set(MEANINGLESS_SETTINGS)
        if rope.get("rope_type") == "yarn":  # its frequencies may depend on the number of positions
            meaningless.remove("max_position_embeddings")
        return {key: value for key, value in settings.items() if key not in meaningless}

    def present_templates(self, settings: dict[str, Any]) -> list[ParameterTemplate]:
        """Return the templates of the parameters that a model has, from its converted configuration."""
        return [
            template
            for template in self.templates
            if (template.role not in REQUIRED_SETTING or settings.get(REQUIRED_SETTING[template.role]))
            and not (template.role is Role.HEAD and settings["tie_word_embeddings"])
        ]

    def parameters(self, config: dict[str, Any]) -> list[DenseParameter]:
        """Return all parameters of a dense model with this configuration, in the order of its layers."""
        config = self.normalize_config(config)
        present = self.present_templates(self.convert_config(config))
        layered = [template for template in present if "{layer}" in template.name]
        first, last = present.index(layered[0]), present.index(layered[-1])

        def parameter(template: ParameterTemplate, layer: int | None) -> DenseParameter:
            rows = None if template.rows is None else template.rows(config)
            return DenseParameter(template.role, layer, template.name.format(layer=layer), rows)

        return [
            *(parameter(template, None) for template in present[:first]),
            *(parameter(template, layer) for layer in range(config["num_hidden_layers"]) for template in layered),
            *(parameter(template, None) for template in present[last + 1 :]),
        ]

    def tensor_names(self, config: dict[str, Any]) -> list[str]:
        """Return the distinct names of the tensors that a dense checkpoint with this configuration must have."""
        return list(dict.fromkeys(parameter.name for parameter in self.parameters(config)))

    def name_of(self, role: Role) -> str:
        """Return the name of the tensor of a role that a model has once, such as the embedding or the output head."""
        return next(template.name for template in self.templates if template.role is role)

    def ignores(self, name: str) -> bool:
        """Return True if a tensor is a buffer of old versions, which no version of transformers reads any more."""
        return any(fnmatchcase(name, pattern) for pattern in (*ROTARY_BUFFERS, *self.ignored_tensors))

    def check(self, config: dict[str, Any], uri: str) -> None:
        """Raise a `FamilyError` that names `uri` and the setting if a setting of `config` is not supported."""
        for key in QUANTIZATION_KEYS:
            if config.get(key) is not None:
                raise FamilyError(
                    f"{uri} is quantized ({key} in its config.json): load it with transformers, call dequantize() and "
                    "save it, or use the model that it was made from"
                )
        try:
            normalized = self.normalize_config(config)
            self._check_supported(normalized, uri)
            self.meaning(config)
        except FamilyError:
            raise
        except Exception as error:  # the checks of transformers raise many types
            raise FamilyError(
                f"{uri} is not a valid {self.model_type} configuration: {one_line(error, all_lines=True)}"
            ) from None

    def _check_supported(self, config: dict[str, Any], uri: str) -> None:
        for key in SIZE_SETTINGS:
            size = config.get(key)
            if key != "tie_word_embeddings" and size is not None and not (type(size) is int and size > 0):
                raise FamilyError(f"{uri}: {key} is {size!r}: use the config.json that was saved with the weights")
        rope = config.get("rope_parameters") or {}
        for key, value, supported in (
            *((key, config.get(key), (only, None)) for key, only in self.required_values.items()),
            ("hidden_act", config["hidden_act"], HIDDEN_ACTS),
            ("rope_type", rope.get("rope_type", "default" if "rope_theta" in rope else rope), ROPE_TYPES),
            ("partial_rotary_factor", 1.0 if self.partial_rotary else rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ):
            if value not in supported:
                only = " or ".join(repr(choice) for choice in supported if choice is not None or len(supported) == 1)
                raise FamilyError(f"{uri}: {key} is {value!r}, but only {only} is supported: use another model")
