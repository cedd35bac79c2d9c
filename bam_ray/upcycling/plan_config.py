"""The configuration of a planned mixture, from the seed's `config.json` and the settings of the method."""

from collections.abc import Sequence
from typing import Any

import torch

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import UpcycleError
from bam_ray.families import Family
from bam_ray.model import BamConfig
from bam_ray.settings import Losses, Operation, RoutedMixture, divisors
from bam_ray.upcycling.methods import Expert
from bam_ray.upcycling.routers.counts import TokenCounts
from bam_ray.upcycling.split.partition import Partition


def mixture_config(
    family: Family,
    seed: TensorReader,
    experts: Sequence[Expert],
    settings: RoutedMixture,
    losses: Losses,
    partitions: Sequence[Partition] = (),
    counts: TokenCounts | None = None,
) -> BamConfig:
    """Return the configuration of a mixture.

    Args:
        family: The family of the seed.
        seed: The seed, whose `config.json` is converted.
        experts: The experts of the mixture.
        settings: The method and its settings.
        losses: The losses of the routers. The configuration states their coefficients at the end of training.
        partitions: The partition of each layer, for a split.
        counts: The counts of any expert's text, for a router prior.

    Raises:
        UpcycleError: The settings do not fit the seed.
    """
    dense = family.convert_config(seed.config)
    count = len(experts)
    _check_counts(settings, dense["num_hidden_layers"], count)
    scale = settings.ffn_output_scale
    sliced: dict[str, Any] = {}
    if settings.ffn is Operation.PARTITION:
        scale = scale or count / settings.num_experts_per_tok
        sliced = {
            "intermediate_size": len(partitions[0].experts[0]),
            "dense_intermediate_size": dense["intermediate_size"],
            "shared_expert_intermediate_size": len(partitions[0].shared) or None,
        }
        if settings.attention != "averaged":
            sliced |= _sliced_attention(dense, count)
    final = losses.at(1.0)
    counted = (
        {}
        if counts is None
        else {"router_prior_vocab_size": len(counts.tokens), "router_prior_buckets": len(counts.pairs)}
    )
    return BamConfig(
        **dense
        | sliced
        | {
            "dtype": str(checkpoint_dtype(seed)).removeprefix("torch."),
            "architectures": ["BamForCausalLM"],
            "num_experts": count,
            "num_experts_per_tok": settings.num_experts_per_tok,
            "norm_topk_prob": settings.norm_topk_prob,
            "ffn_output_scale": scale or 1.0,
            "attention_experts": settings.attention,
            "num_attention_experts_per_tok": _attention_top_k(settings),
            "embeddings": "experts" if settings.embedding is Operation.STACK else "averaged",
            "router_input": settings.router.input,
            "router_prior": settings.router.prior,
            "router_prior_scale": settings.router.prior_scale,
            "router_forgetting": settings.router.forgetting,
            **counted,
            "dense_layers": sorted(set(settings.dense_layers)) or None,
            "router_aux_loss_coef": final.load_balance,
            "router_z_loss_coef": final.router_z,
            "expert_names": [expert.name for expert in experts],
            "seed_config": seed.config,
        }
    )


def checkpoint_dtype(reader: TensorReader) -> torch.dtype:
    """Return the dtype of a checkpoint, which is the dtype of its largest tensor that is no mask."""
    return max(
        (each for each in reader.specs.values() if each.dtype.is_floating_point), key=lambda each: each.elements
    ).dtype


def _attention_top_k(settings: RoutedMixture) -> int:
    """Return the number of attention experts per token; 0 for methods that do not have this setting."""
    return getattr(settings, "num_attention_experts_per_tok", 0)


def _check_counts(settings: RoutedMixture, layers: int, experts: int) -> None:
    """Raise `UpcycleError` if a setting names a layer or a number of experts that does not exist."""
    invalid = [layer for layer in settings.dense_layers if layer >= layers]
    if invalid:
        raise UpcycleError(
            f"dense_layers names layer {invalid[0]}: the model has layers 0 to {layers - 1}, use one of these"
        )
    for key, value in (
        ("num_experts_per_tok", settings.num_experts_per_tok),
        ("num_attention_experts_per_tok", _attention_top_k(settings)),
    ):
        if value > experts:
            raise UpcycleError(f"{key} is {value}: there are {experts} experts, use at most {experts}")


def _sliced_attention(dense: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the attention settings of one expert of a split: whole key/value groups with their query heads."""
    heads = dense["num_attention_heads"]
    groups = dense.get("num_key_value_heads") or heads
    if groups % count:
        raise UpcycleError(
            f"attention has {groups} groups of key/value heads, which cannot be divided equally among {count} experts: "
            f"use num_experts of {divisors(groups)}, or split.attention=kept"
        )
    if dense.get("qk_norm") == "full":
        raise UpcycleError("query/key norms span all heads, so attention cannot be split: use split.attention=kept")
    return {
        "num_attention_heads": heads // count,
        "num_key_value_heads": groups // count,
        "head_dim": dense.get("head_dim") or dense["hidden_size"] // heads,
        "dense_num_attention_heads": heads,
        "dense_num_key_value_heads": groups,
        "attention_output_scale": float(count),
    }
