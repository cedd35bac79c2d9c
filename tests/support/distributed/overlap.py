"""The order in which the collectives and the computations of one block begin and end, on expert-parallel ranks."""

from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

import torch
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
    attend = recorded_computation(BamAttentionExperts.forward, "attention", log)
    compute = recorded_computation(BamExperts.compute, "experts", log)
    patch.object(BamAttentionExperts, "forward", attend).start()  # for the rest of this process
    patch.object(BamExperts, "compute", compute).start()
    ids = shares(2, 0)[dist.get_rank()]
    loss = model(ids, labels=ids).loss
    forward = log.copy()
    log.clear()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"forward": forward, "backward": log, "gradients": gradients}


def attention_inputs(model: Any, length: int) -> dict[str, Any]:
    """Return the arguments of an attention for sequences of `length` tokens, without a cache."""
    position_ids = torch.arange(length)[None]
    embeddings = model.model.rotary_emb(torch.empty(0), position_ids)
    return {"position_ids": position_ids, "position_embeddings": embeddings, "attention_mask": None, "cache": None}


def attend_two_layers(interleaved: bool) -> dict[str, Tensor]:
    """Run the attentions of two layers, which share one exchange, and return their outputs and gradients.

    If `interleaved` is true, both are in flight at the same time, and the first is waited for last.
    """
    model: Any = Case(2).engine().model
    first, second = (layer.self_attn for layer in model.model.layers)
    assert first.exchange is second.exchange
    torch.manual_seed(dist.get_rank())
    x = torch.randn(2, 5, int(DENSE["hidden_size"]), requires_grad=True)
    inputs = attention_inputs(model, 5)
    if interleaved:
        pending = [attention(x, **inputs)[0] for attention in (first, second)]
        for each in pending:
            each.compute()
        outputs = [each.wait() for each in reversed(pending)][::-1]
    else:
        outputs = [attention(x, **inputs)[0].result() for attention in (first, second)]
    for number, out in enumerate(outputs):
        (out.square().sum() * (number + 1)).backward(retain_graph=True)
    assert x.grad is not None
    found = {f"out {number}": out.detach() for number, out in enumerate(outputs)} | {"x": x.grad}
    for number, attention in enumerate((first, second)):
        found |= {
            f"{name} {number}": parameter.grad for name, parameter in attention.attention_experts.named_parameters()
        }
    return found


def attend_out_of_order() -> list[str]:
    """Return the errors if a pending attention is waited for before it is computed, and if it is computed twice."""
    model: Any = Case(2).engine().model
    pending, _ = model.model.layers[0].self_attn(
        torch.randn(2, 5, int(DENSE["hidden_size"])), **attention_inputs(model, 5)
    )
    messages = []
    for call, legal in ((pending.wait, pending.compute), (pending.compute, pending.wait)):
        try:
            call()
        except RuntimeError as error:
            messages.append(str(error))
        legal()
    return messages


def exchanged_dtypes(precision: Literal["fp32", "bf16"]) -> set[tuple[str, str]]:
    """Return the collectives that transfer hidden states in a training step, with the dtypes of these states."""
    engine = Case(2, precision=precision).engine()
    found: set[tuple[str, str]] = set()

    def record_dtype(collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(out: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
            if sent.shape[-1] == int(DENSE["hidden_size"]):
                found.add((name, str(sent.dtype)))
            return collective(out, sent, *args, **kwargs)

        return call

    for function, name in COLLECTIVES.items():
        setattr(dist, function, record_dtype(getattr(dist, function), name))
    engine.step(shares(2, 0)[dist.get_rank()], LR)
    return found
