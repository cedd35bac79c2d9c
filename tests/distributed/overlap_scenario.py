"""When the collectives of one block begin and end, on the ranks that share its experts."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from rank_scenarios import Case, shares

COLLECTIVES = {
    "all_gather_into_tensor": "gather",
    "reduce_scatter_tensor": "sum",
    "all_to_all_single": "exchange",
}


class Noted:
    """A collective under way, whose end is noted."""

    def __init__(self, work: dist.Work, note: Callable[[], None]) -> None:
        self.work, self.note = work, note

    def wait(self) -> None:
        self.work.wait()
        self.note()


def noted(collective: Callable[..., Any], name: str, log: list[str]) -> Callable[..., Any]:
    def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        log.append(f"{name} begins")
        work = collective(*args, async_op=async_op, **kwargs)
        if not async_op:
            log.append(f"{name} ends")
            return None
        return Noted(work, lambda: log.append(f"{name} ends"))

    return call


def pass_of_a_block(parallel: bool, recomputed: bool) -> dict[str, Any]:
    """What begins and ends in the forward and the backward pass of a mixture of one block, and the gradients."""
    model = Case(2, config={"num_hidden_layers": 1, "parallel_block": parallel}).engine().model
    if recomputed:
        model.activation_checkpointing_enable()
    log: list[str] = []
    for function, name in COLLECTIVES.items():
        setattr(dist, function, noted(getattr(dist, function), name, log))
    ids = shares(2, 0)[dist.get_rank()]
    loss = model(ids, labels=ids).loss
    forward = log.copy()
    log.clear()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"forward": forward, "backward": log, "gradients": gradients}
