"""Router statistics by domain, which ranks compute from their own sequences."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bam_ray.training.engine import Engine
from tests.support.distributed.cases import LR, SHARE, TWO, shares

CASES = {
    name: TWO[name]
    for name in ("kv_shared biased, normed, sliding, one dense layer", "limited capacity", "kv_experts, ZeRO-2")
}
CASES["experts not spread"] = replace(TWO["limited capacity"], expert_parallel=1)
# The domains of the sequences of rank 0, then of rank 1; each rank has a domain that the other does not have
DOMAINS = torch.eye(3, dtype=torch.long)[[0, 1, 0, 0, 2, 2, 0, 2]]


def step_statistics(engine: Engine, ids: Tensor, domains: Tensor) -> dict[str, Any]:
    """Train one step and return its router statistics by name."""
    engine.step(ids, LR, domains=domains)
    assert engine.last_load is not None
    return {name: tensor.clone() for name, tensor in vars(engine.last_load).items()}


def statistics_of_rank() -> dict[str, Any]:
    """Return the statistics of every case after a step on this rank's share of the batch."""
    found = {}
    for name, case in CASES.items():
        engine = case.engine()
        mine = DOMAINS.view(engine.world_size, SHARE, -1)[engine.rank]
        found[name] = step_statistics(engine, shares(engine.world_size, 0)[engine.rank], mine)
    return found
