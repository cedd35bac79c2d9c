"""The order of the collectives and of the computation of one block, on the ranks that share its experts."""

from collections.abc import Callable
from typing import Any

import torch
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


class LoggedWork:
    """The handle of a started collective, which logs its end."""

    def __init__(self, work: dist.Work, log_end: Callable[[], None]) -> None:
        self.work, self.log_end = work, log_end

    def wait(self) -> None:
        self.work.wait()
        self.log_end()


def logged_collective(collective: Callable[..., Any], name: str, log: list[str]) -> Callable[..., Any]:
    def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        log.append(f"{name} starts")
        work = collective(*args, async_op=async_op, **kwargs)
        if not async_op:
            log.append(f"{name} ends")
            return None
        return LoggedWork(work, lambda: log.append(f"{name} ends"))

    return call


def logged_computation(compute: Callable[..., Tensor], name: str, log: list[str]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        log.append(name)
        out = compute(*args, **kwargs)
        out.register_hook(lambda _: log.append(f"{name}, backward"))
        return out

    return call


def one_block(parallel: bool, recomputed: bool) -> dict[str, Any]:
    """Return the order of events in the forward and the backward pass of a mixture of one block, and the gradients."""
    model = Case(2, config={"num_hidden_layers": 1, "parallel_block": parallel}).engine().model
    if recomputed:
        model.activation_checkpointing_enable()
    log: list[str] = []
    for function, name in COLLECTIVES.items():
        setattr(dist, function, logged_collective(getattr(dist, function), name, log))
    BamAttentionExperts.forward = logged_computation(BamAttentionExperts.forward, "attention", log)
    BamExperts.compute = logged_computation(BamExperts.compute, "experts", log)
    ids = shares(2, 0)[dist.get_rank()]
    loss = model(ids, labels=ids).loss
    forward = log.copy()
    log.clear()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"forward": forward, "backward": log, "gradients": gradients}


def two_layers_in_flight(interleaved: bool) -> dict[str, Tensor]:
    """Run the attentions of two layers, which share one exchange, and return their outputs and gradients.

    If `interleaved`, both are in flight at the same time, and the first is waited for last.
    """
    model = Case(2).engine().model
    first, second = (layer.self_attn for layer in model.model.layers)
    assert first.exchange is second.exchange
    torch.manual_seed(dist.get_rank())
    x = torch.randn(2, 5, DENSE["hidden_size"], requires_grad=True)
    position_ids = torch.arange(5)[None]
    positions = {
        "position_ids": position_ids,
        "position_embeddings": model.model.rotary_emb(x, position_ids),
        "attention_mask": None,
        "cache": None,
    }
    if interleaved:
        pending = [attention(x, **positions)[0] for attention in (first, second)]
        for each in pending:
            each.compute()
        outputs = [each.wait() for each in reversed(pending)][::-1]
    else:
        outputs = [attention(x, **positions)[0].result() for attention in (first, second)]
    for number, out in enumerate(outputs):
        (out.square().sum() * (number + 1)).backward(retain_graph=True)
    assert x.grad is not None
    found = {f"out {number}": out.detach() for number, out in enumerate(outputs)} | {"x": x.grad}
    for number, attention in enumerate((first, second)):
        found |= {f"{name} {number}": parameter.grad for name, parameter in attention.experts.named_parameters()}
    return found


def calls_out_of_order() -> list[str]:
    """Return the messages of errors if a pending attention is waited for or computed too early or twice."""
    model = Case(2).engine().model
    x, position_ids = torch.randn(2, 5, DENSE["hidden_size"]), torch.arange(5)[None]
    embeddings = model.model.rotary_emb(x, position_ids)
    pending, _ = model.model.layers[0].self_attn(
        x, position_ids=position_ids, position_embeddings=embeddings, attention_mask=None, cache=None
    )
    messages = []
    for call, legal in ((pending.wait, pending.compute), (pending.compute, pending.wait)):
        try:
            call()
        except RuntimeError as error:
            messages.append(str(error))
        legal()
    return messages


def precisions_of_tokens(precision: str) -> set[tuple[str, str]]:
    """Return the collectives that carry hidden states in a training step, and the dtypes of these."""
    engine = Case(2, precision=precision).engine()
    found: set[tuple[str, str]] = set()

    def observed(collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(out: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
            if sent.shape[-1] == DENSE["hidden_size"]:
                found.add((name, str(sent.dtype)))
            return collective(out, sent, *args, **kwargs)

        return call

    for function, name in COLLECTIVES.items():
        setattr(dist, function, observed(getattr(dist, function), name))
    engine.step(shares(2, 0)[dist.get_rank()], LR)
    return found
