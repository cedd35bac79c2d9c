"""The mixture model, registered with transformers' Auto classes. torch and transformers only.

The files `*_bam.py` are also copied into every saved mixture, so that it loads with
`trust_remote_code=True` where this package is not installed.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from bam_ray.model.configuration_bam import BamConfig
from bam_ray.model.modeling_bam import BamCausalLMOutput, BamForCausalLM
from bam_ray.model.routing_bam import RoutingLosses, choose, dropped_share, routing_losses

__all__ = [
    "BamCausalLMOutput",
    "BamConfig",
    "BamForCausalLM",
    "RoutingLosses",
    "choose",
    "dropped_share",
    "routing_losses",
]

AutoConfig.register("bam", BamConfig, exist_ok=True)
AutoModelForCausalLM.register(BamConfig, BamForCausalLM, exist_ok=True)
BamConfig.register_for_auto_class()
BamForCausalLM.register_for_auto_class("AutoModelForCausalLM")
