"""The order in which the collectives and the computations of one block begin and end, on expert-parallel ranks."""

from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from bam_ray.model.attention_bam import BamAttentionExperts
from bam_ray.model.experts_bam import BamExperts
from tests.support.distributed.cases import DENSE, LR, Case, shares

COLLECTIVES = {
    "all_gather_into_tensor": "gather",
    "reduce_scatter_tensor": "sum",
    "all_to_all_single": "exchange",
}


class RecordedWork:
    """An asynchronous collective; `record_end` is called when it has been waited for."""

    def __init__(self, work: dist.Work, record_end: Callable[[], None]) -> None:
        self.work, self.record_end = work, record_end

    def wait(self) -> None:
        """Wait for the collective."""
        self.work.wait()
        self.record_end()


def recorded_collective(collective: Callable[..., Any], name: str, log: list[str]) -> Callable[..., Any]:
    """Return `collective` changed to write its beginning and its end to `log`."""

    def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        log.append(f"{name} begins")
        work = collective(*args, async_op=async_op, **kwargs)
        if not async_op:
            log.append(f"{name} ends")
            return None
        return RecordedWork(work, lambda: log.append(f"{name} ends"))

    return call


def recorded_computation(compute: Callable[..., Tensor], name: str, log: list[str]) -> Callable[..., Tensor]:
    """Return `compute` changed to write its forward and its backward pass to `log`."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        log.append(name)
        out = compute(*args, **kwargs)
        out.register_hook(lambda _: log.append(f"{name}, backward"))
        return out

    return call


def trace_block(parallel: bool, recomputed: bool) -> dict[str, Any]:
    """Return the logs of the forward and the backward pass of a mixture of one block, and the gradients."""
    model = Case(2, config={"num_hidden_layers": 1, "parallel_block": parallel}).engine().model
    if recomputed:
        model.activation_checkpointing_enable()
    log: list[str] = []
    for function, name in COLLECTIVES.items():
        setattr(dist, function, recorded_collective(getattr(dist, function), name, log))
    attend = recorded_computation(BamAttentionExperts.attend, "attention", log)
    compute = recorded_computation(BamExperts.compute, "experts", log)
    patch.object(BamAttentionExperts, "attend", attend).start()  # for the rest of this process
    patch.object(BamExperts, "compute", compute).start()
    ids = shares(2, 0)[dist.get_rank()]
    loss = model(ids, labels=ids).loss
    forward = log.copy()
    log.clear()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"forward": forward, "backward": log, "gradients": gradients}


def exchanged_dtypes(precision: Literal["fp32", "bf16"]) -> set[tuple[str, str]]:
    """Return the collectives that transfer hidden states in a training step, with the dtypes of these states."""
    engine = Case(2, precision=precision).engine()
    found: set[tuple[str, str]] = set()

    def record_dtype(collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(out: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
            if sent.shape[-1] == DENSE["hidden_size"]:
                found.add((name, str(sent.dtype)))
            return collective(out, sent, *args, **kwargs)

        return call

    for function, name in COLLECTIVES.items():
        setattr(dist, function, record_dtype(getattr(dist, function), name))
    engine.step(shares(2, 0)[dist.get_rank()], LR)
    return found
