"""What ranks count of their own sequences' domains, and the same for one process."""

from dataclasses import replace
from typing import Any

import torch
from rank_scenarios import LR, SHARE, TWO, shares
from torch import Tensor

from bam_ray.training.engine import Engine

CASES = {
    name: TWO[name]
    for name in ("kv_shared biased, normed, sliding, one dense layer", "limited capacity", "kv_experts, ZeRO-2")
}
CASES["experts not spread"] = replace(TWO["limited capacity"], expert_parallel=1)
DOMAINS = torch.eye(3, dtype=torch.long)[[0, 1, 0, 0, 2, 2, 0, 2]]  # of rank 0 and of rank 1: one has what one has not


def step(engine: Engine, ids: Tensor, domains: Tensor) -> dict[str, Any]:
    """What a step has seen."""
    engine.step(ids, LR, domains=domains)
    assert engine.last_load is not None
    return {name: tensor.clone() for name, tensor in vars(engine.last_load).items()}


def on_ranks() -> dict[str, Any]:
    """Every case, on this rank's share."""
    found = {}
    for name, case in CASES.items():
        engine = case.engine()
        mine = DOMAINS.view(engine.world_size, SHARE, -1)[engine.rank]
        found[name] = step(engine, shares(engine.world_size, 0)[engine.rank], mine)
    return found
