"""The mixture model, registered with transformers' Auto classes. This package imports torch and transformers only.

The files `*_bam.py` are also copied into every saved mixture, so that it can be loaded with `trust_remote_code=True`
on machines without this package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bam_ray.model.configuration_bam import BamConfig, is_mixture
from bam_ray.model.domain_vectors import DomainVectorsForCausalLM
from bam_ray.model.modeling_bam import BamCausalLMOutput, BamForCausalLM, BamModel
from bam_ray.model.routing_bam import (
    RouterOutput,
    RoutingLosses,
    dropped_share,
    keep_top,
    routing_losses,
    select_experts,
)

__all__ = [
    "BamCausalLMOutput",
    "BamConfig",
    "BamForCausalLM",
    "BamModel",
    "DomainVectorsForCausalLM",
    "RouterOutput",
    "RoutingLosses",
    "dropped_share",
    "is_mixture",
    "keep_top",
    "routing_losses",
    "select_experts",
]

AutoConfig.register("bam", BamConfig, exist_ok=True)
AutoModel.register(BamConfig, BamModel, exist_ok=True)
AutoModelForCausalLM.register(BamConfig, BamForCausalLM, exist_ok=True)
BamConfig.register_for_auto_class()
BamModel.register_for_auto_class("AutoModel")
BamForCausalLM.register_for_auto_class("AutoModelForCausalLM")
