"""The functions that ranks execute in the tests of what an engine makes before its first step."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from bam_ray.errors import BamError
from bam_ray.training.engine import Engine
from bam_ray.training.memory import HostMemory
from tests.support.distributed.cases import LR, QWEN, SHARE, Case, save, shares, train

PARALLEL = Case(2, micro=1, config={"parallel_block": True})
STAGES = {stage: Case(1, dense=QWEN, zero_stage=stage) for stage in (1, 2, 3)}


class CountingMemory(HostMemory):
    """A memory that counts the values of Adam's states when it is asked how much is used for the first time."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self._optimizer = engine.deepspeed.optimizer.optimizer
        self.adam_values: int | None = None

    def used_bytes(self) -> int:
        """Count, and return what `HostMemory` returns."""
        if self.adam_values is None:
            self.adam_values = adam_values(self._optimizer)
        return super().used_bytes()


def adam_values(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of values in Adam's states, without the step."""
    return sum(each.numel() for state in optimizer.state.values() for each in state.values() if each.ndim)


def everything(folder: Path) -> dict[str, Any]:
    """Execute everything that needs two ranks; return the results by name."""
    return {
        "groups": groups_of_an_engine(),
        "synchronizations": synchronizations(),
        "states": {stage: states_when_measured(case, folder / str(stage)) for stage, case in STAGES.items()},
        "errors": {stage: errors(case) for stage, case in STAGES.items()},
    }


@contextmanager
def recorded_groups() -> Iterator[set[Any]]:
    """Record the process groups of all exchanges of tokens."""
    used: set[Any] = set()
    original = dist.all_to_all_single

    def record(*arguments: Any, **named: Any) -> Any:
        used.add(named["group"])
        return original(*arguments, **named)

    dist.all_to_all_single = record
    try:
        yield used
    finally:
        dist.all_to_all_single = original


def groups_of_an_engine() -> dict[str, Any]:
    """Return the timeouts of all process groups, and whether both groups of the experts have been used."""
    dist.distributed_c10d.default_pg_timeout = timedelta(minutes=7)  # as on NCCL, shorter than the world's
    with recorded_groups() as used:
        engine: Any = PARALLEL.engine()
    group = engine.shards.ep_group
    assert group.process_group is not group.side_group
    backends = [each._get_backend(torch.device("cpu")) for each in dist.distributed_c10d._world.pg_map]
    return {
        "timeouts": [backend.options._timeout.total_seconds() for backend in backends],
        "connected": used == {group.process_group, group.side_group},
    }


def synchronizations() -> int:
    """Return how often a step of four micro batches waits for the device, after steps for which nothing is timed."""
    engine = PARALLEL.engine()
    train(engine, 0, 3)
    accelerator, calls = get_accelerator(), []
    original = accelerator.synchronize
    accelerator.synchronize = lambda *arguments: calls.append(1)
    try:
        engine.step(shares(2, 0)[engine.rank], LR)
    finally:
        accelerator.synchronize = original
    return len(calls)


def states_when_measured(case: Case, folder: Path) -> dict[str, tuple[int | None, int]]:
    """Return the number of Adam's values when memory is measured, and after the step.

    The engine is new, or has loaded the checkpoint of step 0.
    """
    found = {}
    for name in ("new", "loaded"):
        engine: Any = case.engine("auto")
        if name == "new":
            save(engine, folder)
        else:
            engine.load(folder)
        engine.memory = CountingMemory(engine)
        engine.step(shares(2, 0)[engine.rank], LR)
        found[name] = (engine.memory.adam_values, adam_values(engine.deepspeed.optimizer.optimizer))
    return found


def errors(case: Case) -> dict[str, str]:
    """Return the messages if memory runs out in an update, and in a micro batch of each setting."""
    engine: Any = case.engine()
    engine.deepspeed.step = run_out
    found = {"update": error_of(engine)}
    for micro in ("auto", SHARE, 1):
        engine = case.engine(micro)
        engine.step(shares(2, 0)[engine.rank], LR)
        engine.model.base_model.register_forward_pre_hook(run_out)
        found[str(micro)] = error_of(engine)
    return found


def error_of(engine: Engine) -> str:
    """Make a step that fails and return its message."""
    try:
        engine.step(shares(2, 1)[engine.rank], LR)
    except BamError as error:
        return str(error)
    raise AssertionError("the step did not fail")


def run_out(*arguments: Any) -> None:
    """Run out of memory."""
    raise torch.OutOfMemoryError("CUDA out of memory")
