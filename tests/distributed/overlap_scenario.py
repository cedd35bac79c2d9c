"""When the collectives of one block begin and end and its branches compute, on the ranks that share its experts."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from rank_scenarios import DENSE, LR, Case, shares
from torch import Tensor

from bam_ray.model.attention_bam import BamAttentionExperts
from bam_ray.model.experts_bam import BamExperts

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


def noted_branch(compute: Callable[..., Tensor], name: str, log: list[str]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        log.append(name)
        out = compute(*args, **kwargs)
        out.register_hook(lambda _: log.append(f"{name}, backward"))
        return out

    return call


def pass_of_a_block(parallel: bool, recomputed: bool) -> dict[str, Any]:
    """What happens in the forward and the backward pass of a mixture of one block, in order, and the gradients."""
    model = Case(2, config={"num_hidden_layers": 1, "parallel_block": parallel}).engine().model
    if recomputed:
        model.activation_checkpointing_enable()
    log: list[str] = []
    for function, name in COLLECTIVES.items():
        setattr(dist, function, noted(getattr(dist, function), name, log))
    BamAttentionExperts.attend = noted_branch(BamAttentionExperts.attend, "attention", log)
    BamExperts.compute = noted_branch(BamExperts.compute, "experts", log)
    ids = shares(2, 0)[dist.get_rank()]
    loss = model(ids, labels=ids).loss
    forward = log.copy()
    log.clear()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"forward": forward, "backward": log, "gradients": gradients}


def precisions_of_tokens(precision: str) -> set[tuple[str, str]]:
    """The collectives that hidden states take in a training step, and the dtypes in which they travel."""
    engine = Case(2, precision=precision).engine()
    found: set[tuple[str, str]] = set()

    def seen(collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(out: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
            if sent.shape[-1] == DENSE["hidden_size"]:
                found.add((name, str(sent.dtype)))
            return collective(out, sent, *args, **kwargs)

        return call

    for function, name in COLLECTIVES.items():
        setattr(dist, function, seen(getattr(dist, function), name))
    engine.step(shares(2, 0)[dist.get_rank()], LR)
    return found
