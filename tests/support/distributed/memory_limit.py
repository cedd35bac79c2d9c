"""The functions that ranks execute in the tests of the memory limit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.training.tensor_file import HostCopier
from bam_ray.units import MIB
from tests.support.distributed.cases import COHERE, LR, Case, save, shares


def train_with_limits(limits: tuple[int | None, ...]) -> list[tuple[int | None, bool]]:
    """Train a step with each memory limit in bytes, of a model that allocates 40 MiB per sequence.

    Returns:
        For each limit the micro batch, and whether this rank's part of the state is live.
    """
    found = []
    for limit in limits:
        engine = deepspeed_engine(replace(Case(1, dense=COHERE).spec("auto"), memory_limit=limit))

        def allocate(module: object, inputs: object, named: dict[str, Any]) -> None:
            torch.ones(len(named["input_ids"]) * 40 * MIB // 4)  # large enough that malloc always maps and unmaps it

        engine.model.base_model.register_forward_pre_hook(allocate, with_kwargs=True)
        engine.step(shares(2, 0)[engine.rank], LR)
        state = engine.state()
        assert state is not None
        found.append((engine.micro_batch, state.live))
    return found


def write_states(folder: Path, limits: tuple[int | None, ...]) -> list[tuple[bool, int]]:
    """Train a mixture whose experts are on two ranks, and write its state to `folder`/NUMBER with each memory limit.

    Returns:
        For each limit whether this rank's part of the state is live, and the bytes that were copied.
    """
    found: list[tuple[bool, int]] = []
    copied: list[int] = []

    def copy(self: HostCopier, tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.nbytes)
        return tensor.detach().clone()

    HostCopier.copy = copy  # type: ignore[method-assign]
    for number, limit in enumerate(limits):
        engine = deepspeed_engine(replace(Case(2).spec(), memory_limit=limit))
        engine.step(shares(2, 0)[engine.rank], LR)
        copied.clear()
        state = engine.state()
        assert state is not None
        found.append((state.live, sum(copied)))
        save(engine, folder / str(number))
    return found
