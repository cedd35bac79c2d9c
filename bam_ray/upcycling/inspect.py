"""What a model folder holds: architecture, sizes, parameters, and for a mixture its experts and its lineage."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.families import SIZE_SETTINGS, family_of
from bam_ray.model import BamForCausalLM, is_mixture
from bam_ray.model.parameters import count_parameters
from bam_ray.upcycling.dense import mixture_config_of, seed_config
from bam_ray.upcycling.write import LINEAGE


@dataclass(frozen=True)
class Facts:
    """Of one model folder. `parameters`: all, and those that a token meets; `history`: what was done, oldest first."""

    uri: str
    architecture: str
    sizes: dict[str, Any]
    parameters: tuple[int, int]
    bytes: int
    files: list[str]
    mixture: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


MIXTURE = (
    "expert_names",
    "num_experts_per_tok",
    "norm_topk_prob",
    "ffn_output_scale",
    "shared_expert_intermediate_size",
    "attention_experts",
    "num_attention_experts_per_tok",
    "attention_output_scale",
    "dense_layers",
)


def inspect(reader: TensorReader) -> Facts:
    """Facts of a dense model of a supported family, or of a mixture; raises `FamilyError` for others."""
    total = sum(spec.bytes for spec in reader.specs.values())
    with torch.device("meta"):
        if is_mixture(reader.config):
            config: Any = mixture_config_of(reader)
            architecture = f"mixture of {config.num_experts} × {seed_config(config)['model_type']}"
            model = BamForCausalLM(config)
        else:
            architecture = family_of(reader.config, reader.uri).model_type
            config = AutoConfig.for_model(**reader.config)
            model = AutoModelForCausalLM.from_config(config)
    lineage = reader.read_file(LINEAGE)
    return Facts(
        uri=reader.uri,
        architecture=architecture,
        sizes={key: getattr(config, key, None) for key in SIZE_SETTINGS},
        parameters=count_parameters(model),
        bytes=total,
        files=list(reader.shards),
        mixture={key: getattr(config, key) for key in MIXTURE} if is_mixture(config) else {},
        history=json.loads(lineage)["history"] if lineage else [],
    )
