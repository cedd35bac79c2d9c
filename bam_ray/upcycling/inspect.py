"""A summary of a model folder: architecture, sizes and parameters, and the experts and the lineage of a mixture."""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.families import SIZE_SETTINGS, check_weights, family_of
from bam_ray.model import is_mixture
from bam_ray.model.parameters import count_parameters
from bam_ray.upcycling.dense import meta_model, mixture_config_of, seed_config
from bam_ray.upcycling.write import read_history


@dataclass(frozen=True)
class ModelSummary:
    """A summary of one model folder.

    Attributes:
        uri: The location of the folder.
        architecture: The architecture, for example "llama (dense)" or "mixture of 3 × llama".
        sizes: The sizes of the model, by the names of transformers' settings.
        parameters: The number of all parameters, and of those that process one token.
        bytes: The size of all weights.
        files: The names of the weight files.
        mixture: The settings of a mixture; empty for a dense model.
        history: The operations that made the model, oldest first; empty if it has no lineage.
    """

    uri: str
    architecture: str
    sizes: dict[str, Any]
    parameters: tuple[int, int]
    bytes: int
    files: list[str]
    mixture: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


MIXTURE_SETTINGS = (
    "expert_names",
    "num_experts_per_tok",
    "norm_topk_prob",
    "ffn_output_scale",
    "shared_expert_intermediate_size",
    "attention_experts",
    "num_attention_experts_per_tok",
    "attention_output_scale",
    "embeddings",
    "router_input",
    "router_prior",
    "router_prior_scale",
    "router_forgetting",
    "dense_layers",
)


def inspect(reader: TensorReader) -> ModelSummary:
    """Summarize a dense model of a supported family, or a mixture; raise `FamilyError` for other models."""
    total = sum(spec.bytes for spec in reader.specs.values())
    if is_mixture(reader.config):
        config: Any = mixture_config_of(reader)
        architecture = f"mixture of {config.num_experts} × {seed_config(config)['model_type']}"
    else:
        family = family_of(reader.config, reader.uri)
        check_weights(reader, family)
        config = AutoConfig.for_model(**reader.config)
        architecture = f"{family.model_type} (dense)"
    return ModelSummary(
        uri=reader.uri,
        architecture=architecture,
        sizes={key: getattr(config, f"expert_{key}", getattr(config, key, None)) for key in SIZE_SETTINGS},
        parameters=count_parameters(meta_model(config, reader.uri)),
        bytes=total,
        files=list(reader.shards),
        mixture={key: getattr(config, key) for key in MIXTURE_SETTINGS} if is_mixture(config) else {},
        history=read_history(reader),
    )
