"""The function that ranks execute in the test of how gradients travel."""

from typing import Any

import torch.distributed as dist

from tests.support.distributed.cases import LR, QWEN, Case, shares


def sent_to_all_ranks(ranks: int, stage: Any) -> tuple[int, int]:
    """Return the most values that a step sends from every rank to all ranks, and the parameters of the model."""
    engine = Case(1, dense=QWEN, zero_stage=stage).engine(1)
    original, sizes = dist.all_reduce, [0]

    def record(tensor: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *arguments, **named)

    dist.all_reduce = record
    try:
        engine.step(shares(ranks, 0)[engine.rank], LR)
    finally:
        dist.all_reduce = original
    return max(sizes), sum(parameter.numel() for parameter in engine.model.parameters())
