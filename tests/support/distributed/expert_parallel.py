"""The functions that ranks execute in the tests of expert-parallel training."""

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import LossNotFinite, SettingsError, TrainingError
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.training import next_token
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.engine import Engine, LossLimits
from bam_ray.training.events import RolledBack
from bam_ray.training.loop import Training
from bam_ray.training.next_token import NextTokenLoss
from tests.support.distributed.cases import (
    ANOTHER_STAGE,
    BF16,
    COHERE,
    FOUR,
    FOUR_BF16,
    FROZEN,
    LENGTH,
    LR,
    NOISY,
    OTHER_STAGES,
    RENORMALISED,
    RESUMED,
    SHARE,
    STEPS,
    TWO,
    UNTIED_TABLES,
    Case,
    ShareSampler,
    save,
    shares,
    step_losses,
    train,
)
from tests.support.leases import next_lease
from tests.support.training_run import RecordingListener


def all_cases(cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    """Train every case and return its step results.

    The state at the end is saved to `folder`/NAME, and the state after the first step to `folder`/NAME, first.
    """
    results: dict[str, Any] = {}
    for name, case in cases.items():
        engine = case.engine()
        results[name] = train(engine, 0, 1)
        save(engine, folder / f"{name}, first")
        results[name] += train(engine, 1, STEPS - 1)
        save(engine, folder / name)
    return results


def train_on_two(folder: Path) -> dict[str, Any]:
    """Execute everything that needs two ranks; return the results by name."""
    noisy = {f"noisy on {size}": replace(NOISY, expert_parallel=size) for size in (1, 2)}
    results = all_cases(TWO | {"bf16": BF16} | noisy, folder)
    results["resumed"] = uninterrupted_and_resumed(folder)
    results["resumed, partly frozen"] = partly_frozen_and_resumed(folder)
    results["refused"] = refusals(folder)
    results["spoiled"] = undisturbed_and_rolled_back(folder)
    for name, case in OTHER_STAGES.items():
        results[f"{name} resumed"] = uninterrupted_and_resumed(folder / f"{name} resumed", case)
        results[f"{name} spoiled"] = non_finite_steps(folder / f"{name} spoiled", case)
    results["dispatched"] = dispatched_ffn()
    results["heads"] = sharded_heads(2)
    results["short of memory"] = short_of_memory(folder / "short of memory")
    results["mixture short of memory"] = mixture_short_of_memory()
    return results


def train_on_four(folder: Path) -> dict[str, Any]:
    """Execute everything that needs four ranks; `folder` is the one that `train_on_two` wrote to."""
    results = all_cases(FOUR | FOUR_BF16, folder)
    results["heads"] = sharded_heads(4)
    for size in (1, 4):
        engine = replace(RESUMED, expert_parallel=size).engine(SHARE // 2)
        engine.load(folder / "half")
        save(engine, folder / f"half again on {size}")
        batches = [shares(2, step).view(4, SHARE // 2, LENGTH) for step in range(STEPS, 2 * STEPS)]
        results[f"resumed on {size}"] = [step_losses(engine.step(batch[engine.rank], LR)) for batch in batches]
        save(engine, folder / f"resumed on {size}")
    for name, case in OTHER_STAGES.items():
        engine = replace(case, expert_parallel=2 * case.expert_parallel).engine(SHARE // 2)
        engine.load(folder / f"{name} resumed" / "half")
        save(engine, folder / f"{name} resumed" / "half again")
        results[f"{name} resumed"] = [step_losses(engine.step(batch[engine.rank], LR)) for batch in batches]
        engine = replace(case, zero_stage=ANOTHER_STAGE[name]).engine(SHARE // 2)
        engine.load(folder / f"{name} resumed" / "half")
        save(engine, folder / f"{name} resumed" / "half at another stage")
        results[f"{name} at another stage"] = [step_losses(engine.step(batch[engine.rank], LR)) for batch in batches]
    return results


def uninterrupted_and_resumed(folder: Path, case: Case = RESUMED) -> dict[str, Any]:
    """Train past a checkpoint, then load the checkpoint and train the same steps again; return the results of both."""
    folder.mkdir(exist_ok=True)
    engine = case.engine()
    train(engine, 0, STEPS)
    save(engine, folder / "half")
    unbroken = train(engine, STEPS, STEPS)
    save(engine, folder / "whole")
    engine = case.engine()
    train(engine, 7, 1)  # loading the checkpoint must replace all of this state
    engine.load(folder / "half")
    resumed = train(engine, STEPS, STEPS)
    save(engine, folder / "whole, resumed")
    held_out = engine.evaluate(shares(2, 99)[engine.rank])
    exchange = engine.step(shares(2, 7)[engine.rank], LR).exchange_seconds
    found = {"held out": held_out, "mean": engine.mean(float(engine.rank)), "exchange": exchange}
    return {"unbroken": unbroken, "resumed": resumed, **found}


def partly_frozen_and_resumed(folder: Path) -> dict[str, Any]:
    """Do as `uninterrupted_and_resumed` does, for a mixture with frozen experts and a selection bias.

    Frozen parameters are not in the optimizer's state, and the selection bias is a buffer, not a parameter.
    """
    first = FROZEN.engine()
    train(first, 0, STEPS)
    save(first, folder / "half, frozen")
    unbroken = train(first, STEPS, STEPS)
    save(first, folder / "whole, frozen")
    again = FROZEN.engine()
    again.load(folder / "half, frozen")
    return {"unbroken": unbroken, "resumed": train(again, STEPS, STEPS)}


def undisturbed_and_rolled_back(folder: Path) -> list[list[float]]:
    """Return the losses of two runs of the training loop.

    In the second run one loss is NaN on rank 1 alone, so that both ranks roll back.
    """
    os.environ["BAM_CACHE"] = str(folder / f"cache {dist.get_rank()}")  # as on two nodes
    curves = []
    for spoiled in (None, 4):
        tokens = 6 * 2 * SHARE * LENGTH
        settings = RESUMED.settings(SHARE).model_copy(
            update={"tokens": tokens, "batch_tokens": tokens // 6, "checkpoint_every": 2}
        )
        engine = deepspeed_engine(replace(RESUMED.spec(), training=settings))
        calls = itertools.count(1)

        def spoil(module: Any, inputs: Any, out: Any, calls: Any = calls, spoiled: int | None = spoiled) -> None:
            if next(calls) == spoiled and dist.get_rank() == 1:
                out.last_hidden_state = out.last_hidden_state * float("nan")

        engine.model.base_model.register_forward_hook(spoil)
        store = FolderStore(folder / f"store {spoiled}")
        lease = next_lease(store, "mixtures/x") if engine.rank == 0 else None
        checkpoints = Checkpoints(Artifact(store, ArtifactKind.MIXTURES, "x"), lease, Retention(2, None))
        listener = RecordingListener()
        training = Training(engine, ShareSampler(), LENGTH, settings, checkpoints, listener)
        training.resume()
        curves.append([metrics.nll for metrics in training.run().curve])
        assert any(isinstance(event, RolledBack) for event in listener.events) == (spoiled is not None)
    return curves


def non_finite_steps(folder: Path, case: Case) -> list[str]:
    """Make a loss and then a gradient non-finite on rank 1 alone and return the error messages of the failed steps.

    The state before and after the next good step is saved, beside that of an engine without failed steps.
    """
    folder.mkdir(exist_ok=True)
    messages = []
    engine = case.engine(SHARE // 2)
    batch = shares(2, 0)[engine.rank]
    model: Any = engine.model
    for what in ("loss", "gradient"):
        calls = itertools.count()

        def spoil(module: Any, inputs: Any, out: Any, what: str = what, calls: Any = calls) -> None:
            if next(calls) == 1 and engine.rank == 1:  # the second micro batch
                if what == "loss":
                    out.last_hidden_state = out.last_hidden_state * float("nan")
                else:
                    out.last_hidden_state.register_hook(lambda grad: grad * float("inf"))

        hook = model.base_model.register_forward_hook(spoil)
        try:
            engine.step(batch, LR)
        except LossNotFinite as error:
            messages.append(str(error))
        hook.remove()
    try:
        engine.step(batch, LR, LossLimits(grad_norm=1e-3))
    except TrainingError as error:
        messages.append(str(error))
    save(engine, folder / "before")
    engine.step(batch, LR)
    save(engine, folder / "after")
    for name, steps in (("before, undisturbed", 0), ("after, undisturbed", 1)):
        engine = case.engine(SHARE // 2)
        train(engine, 0, steps)
        save(engine, folder / name)
    return messages


def refusals(folder: Path) -> dict[str, str]:
    """Return the messages of errors that must be raised on all ranks with the same message."""
    messages = {}
    rank = dist.get_rank()
    engine = RESUMED.engine()
    batch = shares(2, 0)[rank]
    try:
        engine.step(batch[: SHARE - rank], LR)
    except TrainingError as error:
        messages["uneven"] = str(error)
    save(engine, folder / "before")
    for case in ("loss", "gradient"):
        messages[case] = spoiled_step(engine, batch, case)
        save(engine, folder / f"after a {case}")
    for name, limits in (("spike", LossLimits(grad_norm=1e-3)), ("high loss", LossLimits(nll=1e-3))):
        try:
            engine.step(batch, LR, limits)
        except TrainingError as error:
            messages[name] = str(error)
        save(engine, folder / f"after a {name}")
    engine.step(batch, LR)  # after the errors, training continues
    save(engine, folder / "after all")
    try:
        replace(RESUMED, expert_parallel=3).engine()
    except TrainingError as error:
        messages["group"] = str(error)
    try:
        replace(RESUMED, zero_stage=3).engine()
    except SettingsError as error:
        messages["stage"] = str(error)
    messages["any"] = str([engine.any_rank(rank == 1), engine.any_rank(False)])
    return messages


def spoiled_step(engine: Engine, batch: Tensor, spoiled: str) -> str:
    """Make a step whose loss or gradient is not finite on rank 1 alone; return the error message."""
    model: Any = engine.model
    weight = model.model.norm.weight
    kept = weight.detach().clone()
    hook = None
    if spoiled == "loss" and engine.rank == 1:
        weight.data.fill_(float("nan"))
    if spoiled == "gradient" and engine.rank == 1:
        hook = weight.register_hook(lambda grad: grad * float("inf"))
    message = ""
    try:
        engine.step(batch, LR)
    except TrainingError as error:
        message = str(error)
    weight.data.copy_(kept)
    if hook is not None:
        hook.remove()
    return message


def short_of_memory(folder: Path) -> dict[str, Any]:
    """Train a dense model while rank 1 runs out of memory with more than two sequences, later with more than one."""
    engine = Case(1, dense=COHERE).engine("auto")
    most = [SHARE // 2]

    def run_out(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if engine.rank == 1 and len(kwargs["input_ids"]) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine.model.base_model.register_forward_pre_hook(run_out, with_kwargs=True)
    results, micro_batches = [], []
    for step in range(STEPS):
        results += train(engine, step, 1)
        micro_batches.append(engine.micro_batch)
        most[0] = 1
    save(engine, folder)
    most[0] = 0
    try:
        train(engine, STEPS, 1)
    except TrainingError as error:
        return {"results": results, "micro batches": micro_batches, "refused": str(error)}
    raise AssertionError("training continued without memory")


def mixture_short_of_memory() -> dict[str, Any]:
    """Run out of memory with a mixture, whose micro batch must not be halved because its balance loss depends on it.

    Before that, measure a step that follows evaluations, and the time that it waited for collectives.
    """
    engine = RESUMED.engine()
    for _ in range(20):
        engine.evaluate(shares(2, 0)[engine.rank])
    started = time.perf_counter()
    waited = engine.step(shares(2, 0)[engine.rank], LR).exchange_seconds
    step = time.perf_counter() - started

    def run_out(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.model.base_model.register_forward_pre_hook(run_out)
    try:
        train(engine, 1, 1)
    except SettingsError as error:
        return {"waited": waited, "step": step, "refused": str(error)}
    raise AssertionError("training continued without memory")


TOKENS = (0, 7)  # numbers of tokens of rank 0 and rank 1


def routed_tokens(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states of a rank's tokens, their chosen experts and the weights of these."""
    torch.manual_seed(rank)
    tokens = TOKENS[rank]
    index = torch.rand(tokens, 4).topk(2, dim=-1).indices
    return torch.randn(tokens, 32), index, torch.rand(tokens, 2)


def dispatched_ffn() -> dict[str, Tensor]:
    """Return the outputs and gradients of one layer's FFN when the ranks have different numbers of tokens."""
    from bam_ray.on_deepspeed.expert_parallel import apply_expert_parallelism

    model = Case(2).model()
    apply_expert_parallelism(model, 2)
    return ffn_gradients(model, *routed_tokens(dist.get_rank()))


def ffn_gradients(model: PreTrainedModel, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the output of the first layer's FFN and the gradients of the sum of its squares."""
    experts = model.train().model.layers[0].mlp.experts
    hidden.requires_grad_(), weights.requires_grad_()
    out = experts(hidden, index, weights)
    out.square().sum().backward()
    return {
        "out": out.detach(),
        "hidden": hidden.grad,
        "weights": weights.grad,
        "gate_up": experts.gate_up_proj.grad,
        "down": experts.down_proj.grad,
    }


HEADS = {
    "tied": {"embeddings": "experts", **RENORMALISED},
    "untied": UNTIED_TABLES,
}


def sharded_heads(size: int) -> dict[str, dict[str, Tensor]]:
    """Return what `head_gradients` returns of this rank's sequences, with the experts divided among `size` ranks."""
    from bam_ray.on_deepspeed.expert_parallel import apply_expert_parallelism

    results = {}
    for name, config in HEADS.items():
        model = Case(size, config=config).model()
        apply_expert_parallelism(model, size)
        results[name] = head_gradients(model, shares(size, 0)[dist.get_rank()])
    return results


def head_gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits of `ids` [B, L], their summed loss in several chunks, and the gradients of both.

    The gradients have the names of the parameters, after `logits.` and `loss.`.
    """
    logits = model.train()(ids).logits
    (logits.square().sum() / 1000).backward()
    found = {"logits": logits.detach()}
    found |= {f"logits.{name}": parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with patch.object(next_token, "MIN_CHUNK_TOKENS", 1):
        loss = NextTokenLoss(model)(ids)[0] * ids[:, 1:].numel()
    loss.backward()
    found |= {f"loss.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return found | {"loss": loss.detach()}
