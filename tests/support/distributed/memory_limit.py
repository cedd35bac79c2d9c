"""The function that ranks execute in the test of the memory limit."""

from dataclasses import replace
from typing import Any

import torch

from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.units import MIB
from tests.support.distributed.cases import COHERE, LR, Case, shares


def train_with_limits(limits: tuple[int | None, ...]) -> list[tuple[int | None, bool | None]]:
    """Train a step with each memory limit in bytes, of a model that allocates 40 MiB per sequence.

    Returns:
        For each limit the micro batch, and whether the state is live (None on ranks above 0).
    """
    found = []
    for limit in limits:
        engine = deepspeed_engine(replace(Case(1, dense=COHERE).spec("auto"), memory_limit=limit))

        def allocate(module: object, inputs: object, named: dict[str, Any]) -> None:
            torch.ones(len(named["input_ids"]) * 40 * MIB // 4)  # large enough that malloc always maps and unmaps it

        engine.model.base_model.register_forward_pre_hook(allocate, with_kwargs=True)
        engine.step(shares(2, 0)[engine.rank], LR)
        state = engine.state()
        found.append((engine.micro_batch, None if state is None else state.live))
    return found
