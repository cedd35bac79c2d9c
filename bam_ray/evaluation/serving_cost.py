"""The cost of serving one token with a model, computed from its configuration."""

from collections.abc import Sequence

import torch
from pydantic import FiniteFloat
from transformers import PreTrainedConfig

from bam_ray.model import is_mixture
from bam_ray.settings import Strict
from bam_ray.training.flops import forward_flops_per_token


class ServingCost(Strict):
    """The cost of one token that is generated alone, with the context of a training sequence."""

    parameters: int  # that are read: those that process the token
    flops: FiniteFloat
    cache_bytes: int  # of keys and values that the cache gains, in all layers

    @staticmethod
    def of(config: PreTrainedConfig, active_parameters: int, context: int) -> "ServingCost":
        """Return the cost of a model.

        Args:
            config: The configuration of the model, whose dtype is that of the cache.
            active_parameters: The parameters that process one token.
            context: The length of the sequences, over which the operations of attention are averaged.
        """
        return ServingCost(
            parameters=active_parameters,
            flops=forward_flops_per_token(config, context),
            cache_bytes=cache_bytes_per_token(config),
        )

    @staticmethod
    def of_all(costs: Sequence["ServingCost"]) -> "ServingCost":
        """Return the cost of several models that all compute each token."""
        return ServingCost(
            parameters=sum(cost.parameters for cost in costs),
            flops=sum(cost.flops for cost in costs),
            cache_bytes=sum(cost.cache_bytes for cost in costs),
        )


def cache_bytes_per_token(config: PreTrainedConfig) -> int:
    """Return the bytes of the keys and values of one token in all layers. Sliding windows later drop some of them."""
    dtype = getattr(torch, str(config.dtype or torch.float32).removeprefix("torch."))
    config, values = config.get_text_config(), 0  # the model itself, unless it wraps one
    dense_layers = (config.dense_layers or ()) if is_mixture(config) else ()
    for layer in range(config.num_hidden_layers):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if layer in dense_layers:
            heads = config.dense_num_key_value_heads or config.expert_num_key_value_heads
        values += 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return values * int(dtype.itemsize)
