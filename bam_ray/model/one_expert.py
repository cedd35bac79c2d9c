"""Routing of all tokens of a mixture to one expert."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.model.attention_bam import BamAttention
from bam_ray.model.layers_bam import BamMoE
from bam_ray.model.routing_bam import BamRouter

EXCLUDED = -1e4
"""A logit with which an expert gets probability 0."""


@contextmanager
def routed_to(model: PreTrainedModel, expert: int) -> Iterator[None]:
    """Let all routers of a mixture choose one expert with a gate of 1: those of FFNs, attention and embeddings.

    So the mixture computes the dense model of the expert, with the parts that the experts share. The model is as before
    when the context ends.

    Args:
        model: The mixture.
        expert: The number of the expert.
    """

    def one_hot(module: Any, args: Any, logits: Tensor) -> Tensor:
        chosen = torch.full_like(logits, EXCLUDED)
        chosen[..., expert] = 0.0
        return chosen

    routers = [module for module in model.modules() if isinstance(module, BamRouter)]
    changes: list[tuple[Any, str, Any]] = [
        (router, "selection_bias", torch.zeros_like(router.selection_bias))
        for router in routers
        if router.selection_bias is not None
    ]
    changes += [(part, "scale", 1.0) for part in model.modules() if isinstance(part, BamMoE | BamAttention)]
    before = [(part, name, getattr(part, name)) for part, name, _ in changes]
    hooks = [router.register_forward_hook(one_hot) for router in routers]
    try:
        for part, name, value in changes:
            setattr(part, name, value)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, name, value in before:
            setattr(part, name, value)
