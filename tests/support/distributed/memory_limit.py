"""The functions that ranks execute in the tests of the memory limit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.training.tensor_file import HostCopier
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


def write_states(folder: Path, limits: tuple[int | None, ...]) -> list[tuple[bool, int, int] | None]:
    """Train a mixture whose experts are on two ranks, and write its state to `folder`/NUMBER with each memory limit.

    Returns:
        For each limit on rank 0: whether the state is live, the bytes that were copied although they were in host
        memory, and the bytes of the weights that both ranks hold. None on other ranks.
    """
    found: list[tuple[bool, int, int] | None] = []
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
        if state is None:
            found.append(None)
        else:
            names = [
                name for name, parameter in engine.model.named_parameters() if not hasattr(parameter, "group_name")
            ]
            replicated = sum(state.weights[name].nbytes for name in names)
            found.append((state.live, sum(copied), replicated))
            (folder / str(number)).mkdir()
            state.write(folder / str(number))
        engine.any_rank(False)
    return found
