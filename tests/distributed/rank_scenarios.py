"""What ranks do in the distributed tests, and the same cases for one process to be compared with."""

import itertools
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.leases import Lease
from bam_ray.errors import LossNotFinite, SettingsError, TrainingError
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Losses, Mixing, Ramp, TrainingSettings
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.document_mask import keep_apart
from bam_ray.training.engine import Engine, Limits
from bam_ray.training.loop import Training

SHARE, LENGTH, VOCABULARY = 4, 12, 64  # sequences of a rank a step, tokens of a sequence
STEPS, LR = 3, 5e-5
END_OF_TEXT = 7  # one token in 64: some ranks have sequences that it parts, when others have none
LOSSES = Mixing(losses=Losses(load_balance=0.05, router_z=0.01))
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # gradients well above rounding, which Adam's first steps would enlarge
}
COHERE = CohereConfig(**DENSE, logit_scale=1.0, bos_token_id=1, eos_token_id=1, pad_token_id=0)
QWEN = Qwen3Config(**DENSE, head_dim=6, tie_word_embeddings=True)  # six values are not shared alike by four ranks


@dataclass(frozen=True)
class Case:
    """A model, and how many ranks share its experts."""

    expert_parallel: int
    micro: int = SHARE
    config: dict[str, Any] = field(default_factory=dict)
    dense: PreTrainedConfig | None = None
    idle: bool = False  # no token ever chooses the upper half of the experts: with EP 2, rank 1 has nothing to do
    precision: str = "fp32"
    mixing: Mixing = LOSSES
    apart: bool = False  # documents within a sequence do not see each other
    zero_stage: int = 1
    recompute: bool = False

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        if self.dense is not None:
            return AutoModelForCausalLM.from_config(self.dense)
        model = BamForCausalLM(BamConfig(**{**DENSE, "num_experts": 4, **self.config}))
        if self.apart:
            keep_apart(model, END_OF_TEXT)
        if self.idle:  # logits v·u, -v·u, 0, 0: one of the first two is always the highest
            for layer in model.model.layers:
                weight = layer.mlp.gate.weight.data
                weight[1:] = torch.stack((-weight[0], torch.zeros_like(weight[0]), torch.zeros_like(weight[0])))
        return model

    def settings(self, micro: int | str) -> TrainingSettings:
        return TrainingSettings(
            tokens=1,
            peak_lr=LR,
            clip_norm=0.5,
            micro_batch_sequences=micro,
            precision=self.precision,
            weight_decay=1.0,
            zero_stage=self.zero_stage,
            recompute=self.recompute,
        )

    def engine(self, micro: int | str | None = None) -> Engine:
        """An engine over all ranks."""
        settings = self.settings(micro or self.micro)
        return deepspeed_engine(self.model(), settings, self.mixing, self.expert_parallel)


RENORMALISED = {"num_experts_per_tok": 2, "norm_topk_prob": True}
BIASED = {
    **RENORMALISED,
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "norm_bias": True,
    "shared_expert_intermediate_size": 16,
}
TWO = {
    "kv_experts": Case(2),
    "kv_experts accumulated": Case(2, micro=3, config={"parallel_block": False, "norm_type": "rmsnorm"}),
    "kv_shared": Case(2, config={"attention_experts": "kv_shared", **RENORMALISED}),
    "kv_shared top-1 attention": Case(
        2, micro=1, config={"attention_experts": "kv_shared", "num_attention_experts_per_tok": 1}
    ),
    "averaged": Case(
        2, micro=2, config={"attention_experts": "averaged", **RENORMALISED, "tie_word_embeddings": False}
    ),
    "kv_experts biased, normed": Case(2, config={**BIASED, "qk_norm": "per_head"}),
    "kv_shared biased, normed, sliding, one dense layer": Case(
        2,
        micro=3,
        config={
            **BIASED,
            "attention_experts": "kv_shared",
            "qk_norm": "full",
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "dense_layers": [0],
            "mlp_gated": False,
        },
    ),
    "frozen experts": Case(2, mixing=Mixing(losses=LOSSES.losses, train="routers_and_shared")),
    "warm-up, own rate, ramp, biases": Case(
        2,
        micro=3,
        config={"selection_bias": True, **RENORMALISED},
        mixing=Mixing(
            losses=Losses(load_balance=Ramp(start=0.5, end=0.05), bias_rate=0.02),
            router_warmup_fraction=0.5,  # the first step: what follows is after the last that settings know of
            expert_lr_factor=0.5,
        ),
    ),
    "documents apart": Case(2, micro=1, config={"sliding_window": 5, "nope_layers": [0]}, apart=True),
    "kv_shared, documents apart": Case(2, config={"attention_experts": "kv_shared", **RENORMALISED}, apart=True),
    "idle rank": Case(2, idle=True),
    "limited capacity": Case(2, micro=3, config={**BIASED, "capacity_factor": 0.5}),
    "idle rank, limited capacity": Case(2, micro=1, idle=True, config={"capacity_factor": 0.75}),
    "recomputed": Case(2, micro=3, recompute=True),
    "sequential, recomputed": Case(2, config={"parallel_block": False, **RENORMALISED}, recompute=True),
    "dense, recomputed": Case(1, dense=QWEN, recompute=True),
    "kv_experts, ZeRO-2": Case(2, micro=3, zero_stage=2),
    "averaged, ZeRO-2": Case(2, micro=1, config={"attention_experts": "averaged", **RENORMALISED}, zero_stage=2),
    "dense": Case(2, micro=3, dense=COHERE),
    "dense, ZeRO-2": Case(1, micro=3, dense=QWEN, zero_stage=2),
    "dense, ZeRO-3": Case(1, micro=3, dense=QWEN, zero_stage=3),
    "experts not spread, ZeRO-3": Case(1, zero_stage=3),
}
NOISY = Case(
    2,
    config={"noisy_gate": True, **RENORMALISED, "num_experts_per_tok": 1},
    mixing=Mixing(losses=Losses(load_balance=0.5), gate="noisy"),
)
FROZEN = Case(
    2,
    config={"selection_bias": True, **RENORMALISED, "num_experts_per_tok": 1},
    mixing=Mixing(losses=Losses(bias_rate=0.02), train="routers_and_shared"),
)
BF16 = Case(2, precision="bf16")
LIMITED = {**RENORMALISED, "capacity_factor": 0.75}
FOUR = {
    "kv_experts on 1": Case(1),
    "kv_experts on 2": Case(2, micro=3),
    "kv_experts on 4": Case(4),
    "kv_shared on 2": Case(2, config={"attention_experts": "kv_shared", **RENORMALISED}),
    "kv_shared on 4": Case(4, micro=2, config={"attention_experts": "kv_shared"}),
    "averaged on 4": Case(4, config={"attention_experts": "averaged", **RENORMALISED}),
    "idle ranks on 4": Case(4, idle=True),
    "limited capacity on 1": Case(1, micro=2, config=LIMITED),
    "limited capacity on 2": Case(2, micro=3, config=LIMITED),
    "limited capacity on 4": Case(4, micro=1, config=LIMITED),
    "kv_shared on 4, recomputed": Case(4, micro=2, config={"attention_experts": "kv_shared"}, recompute=True),
    "kv_experts on 1, ZeRO-2": Case(1, zero_stage=2),
    "kv_experts on 2, ZeRO-2": Case(2, micro=3, zero_stage=2),
    "kv_shared on 4, ZeRO-2": Case(4, micro=2, config={"attention_experts": "kv_shared"}, zero_stage=2),
    "warm-up, own rate, ramp, biases on 2, ZeRO-2": replace(TWO["warm-up, own rate, ramp, biases"], zero_stage=2),
    "warm-up, own rate, ramp, biases on 4": replace(TWO["warm-up, own rate, ramp, biases"], expert_parallel=4),
    "frozen experts on 2, ZeRO-2": replace(TWO["frozen experts"], micro=3, zero_stage=2),
    "dense, ZeRO-3": Case(1, micro=3, dense=QWEN, zero_stage=3),
}
FOUR_BF16 = {"bf16 on 2": BF16, "bf16 on 4": replace(BF16, expert_parallel=4)}
RESUMED = Case(2, config={"attention_experts": "kv_shared"})
OTHER_STAGES = {
    "mixture, ZeRO-2": Case(2, config={"attention_experts": "kv_shared"}, zero_stage=2),
    "dense, ZeRO-2": Case(1, dense=QWEN, zero_stage=2),
    "dense, ZeRO-3": Case(1, dense=QWEN, zero_stage=3),
}


def shares(world_size: int, step: int) -> Tensor:
    """The global batch of a step: [ranks, SHARE, LENGTH]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (world_size, SHARE, LENGTH), generator=generator)


def train(engine: Engine, first: int, steps: int) -> list[dict[str, float]]:
    results = []
    for step in range(first, first + steps):
        torch.manual_seed(step * engine.world_size + engine.rank)  # as the loop does, for noisy gates
        results.append(asdict(engine.step(shares(engine.world_size, step)[engine.rank], LR)))
    return results


def save(engine: Engine, folder: Path) -> None:
    """Write the engine's state; all ranks return after that."""
    state = engine.state()
    if state is not None:
        folder.mkdir(exist_ok=True)
        state.write(folder)
    engine.any_rank(False)


def all_cases(cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    """Train every case, save it to folder / its name, and after one step with "first" -> its step results."""
    results: dict[str, Any] = {}
    for name, case in cases.items():
        engine = case.engine()
        results[name] = train(engine, 0, 1)
        save(engine, folder / f"{name}, first")
        results[name] += train(engine, 1, STEPS - 1)
        save(engine, folder / name)
    return results


def on_two(folder: Path) -> dict[str, Any]:
    """Everything that two ranks are needed for."""
    noisy = {f"noisy on {size}": replace(NOISY, expert_parallel=size) for size in (1, 2)}
    results = all_cases(TWO | {"bf16": BF16} | noisy, folder)
    results["resumed"] = unbroken_and_resumed(folder)
    results["resumed, partly frozen"] = partly_frozen_and_resumed(folder)
    results["refused"] = refusals(folder)
    results["spoiled"] = unbroken_and_spoiled(folder)
    for name, case in OTHER_STAGES.items():
        results[f"{name} resumed"] = unbroken_and_resumed(folder / f"{name} resumed", case)
        results[f"{name} spoiled"] = spoiled(folder / f"{name} spoiled", case)
    results["dispatched"] = dispatched()
    results["short of memory"] = short_of_memory(folder / "short of memory")
    results["mixture short of memory"] = mixture_short_of_memory()
    return results


def on_four(folder: Path) -> dict[str, Any]:
    """Everything that four ranks are needed for; `folder` is the one that `on_two` wrote to."""
    results = all_cases(FOUR | FOUR_BF16, folder)
    for size in (1, 4):
        engine = deepspeed_engine(RESUMED.model(), RESUMED.settings(SHARE // 2), LOSSES, size)
        engine.load(folder / "half")
        save(engine, folder / f"half again on {size}")
        batches = [shares(2, step).view(4, SHARE // 2, LENGTH) for step in range(STEPS, 2 * STEPS)]
        results[f"resumed on {size}"] = [asdict(engine.step(batch[engine.rank], LR)) for batch in batches]
        save(engine, folder / f"resumed on {size}")
    for name, case in OTHER_STAGES.items():
        engine = replace(case, expert_parallel=2 * case.expert_parallel).engine(SHARE // 2)
        engine.load(folder / f"{name} resumed" / "half")
        save(engine, folder / f"{name} resumed" / "half again")
        results[f"{name} resumed"] = [asdict(engine.step(batch[engine.rank], LR)) for batch in batches]
    return results


def unbroken_and_resumed(folder: Path, case: Case = RESUMED) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    engine = case.engine()
    train(engine, 0, STEPS)
    save(engine, folder / "half")
    unbroken = train(engine, STEPS, STEPS)
    save(engine, folder / "whole")
    engine = case.engine()
    train(engine, 7, 1)  # what is loaded replaces all of this
    engine.load(folder / "half")
    resumed = train(engine, STEPS, STEPS)
    save(engine, folder / "whole, resumed")
    held_out = engine.evaluate(shares(2, 99)[engine.rank])
    found = {"held out": held_out, "mean": engine.mean(float(engine.rank)), "exchange": engine.last_exchange}
    return {"unbroken": unbroken, "resumed": resumed, **found}


def partly_frozen_and_resumed(folder: Path) -> dict[str, Any]:
    """As `unbroken_and_resumed`, with what is trained, and what is no parameter, by the settings of mixtures."""

    def engine() -> Engine:
        return deepspeed_engine(FROZEN.model(), FROZEN.settings(SHARE), FROZEN.mixing, 2)

    first = engine()
    train(first, 0, STEPS)
    save(first, folder / "half, frozen")
    unbroken = train(first, STEPS, STEPS)
    save(first, folder / "whole, frozen")
    again = engine()
    again.load(folder / "half, frozen")
    return {"unbroken": unbroken, "resumed": train(again, STEPS, STEPS)}


class Shares:
    """The global batches in their order, as a sampler."""

    position = 0

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        self.position += 1
        return shares(2, self.position).flatten(0, 1).numpy(), np.ones((count, 1), dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def unbroken_and_spoiled(folder: Path) -> list[list[float]]:
    """The losses of the training loop, undisturbed and with one that is NaN on rank 1 alone, which is rolled back."""
    os.environ["BAM_CACHE"] = str(folder / f"cache {dist.get_rank()}")  # as on two nodes
    curves = []
    for spoiled in (None, 4):
        tokens = 6 * 2 * SHARE * LENGTH
        settings = RESUMED.settings(SHARE).model_copy(
            update={"tokens": tokens, "batch_tokens": tokens // 6, "checkpoint_every": 2}
        )
        engine = deepspeed_engine(RESUMED.model(), settings, RESUMED.mixing, 2)
        calls = itertools.count(1)

        def spoil(module: Any, inputs: Any, out: Any, calls: Any = calls, spoiled: int | None = spoiled) -> None:
            if next(calls) == spoiled and dist.get_rank() == 1:
                out.last_hidden_state = out.last_hidden_state * float("nan")

        engine.model.base_model.register_forward_hook(spoil)
        store = FolderStore(folder / f"store {spoiled}")
        lease = Lease.take(store, "mixtures/x") if engine.rank == 0 else None
        kept = Checkpoints(store, "mixtures", "x", lease, Retention(2, None))
        told: list[str] = []
        training = Training(
            engine,
            Shares(),
            LENGTH,
            settings,
            kept,
            lambda point: None,
            lambda what, told=told, **facts: told.append(what),
            lambda: False,
        )
        training.resume()
        curves.append([point.nll for point in training.run()])
        assert ("rolled_back" in told) == (spoiled is not None)
    return curves


def spoiled(folder: Path, case: Case) -> list[str]:
    """A loss and a gradient that are not finite on rank 1 alone -> the messages; then a step as if nothing had been."""
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
        engine.step(batch, LR, Limits(grad_norm=1e-3))
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
    """The messages of errors, which must come on all ranks alike."""
    messages = {}
    rank = dist.get_rank()
    engine = deepspeed_engine(RESUMED.model(), RESUMED.settings(SHARE), LOSSES, 2)
    batch = shares(2, 0)[rank]
    try:
        engine.step(batch[: SHARE - rank], LR)
    except TrainingError as error:
        messages["uneven"] = str(error)
    save(engine, folder / "before")
    for case in ("loss", "gradient"):
        weight = engine.model.model.norm.weight
        kept = weight.detach().clone()
        hook = None
        if case == "loss" and rank == 1:
            weight.data.fill_(float("nan"))
        if case == "gradient" and rank == 1:
            hook = weight.register_hook(lambda grad: grad * float("inf"))
        try:
            engine.step(batch, LR)
        except TrainingError as error:
            messages[case] = str(error)
        weight.data.copy_(kept)
        if hook is not None:
            hook.remove()
        save(engine, folder / f"after a {case}")
    for name, limits in (("spike", Limits(grad_norm=1e-3)), ("high loss", Limits(nll=1e-3))):
        try:
            engine.step(batch, LR, limits)
        except TrainingError as error:
            messages[name] = str(error)
        save(engine, folder / f"after a {name}")
    engine.step(batch, LR)  # goes on
    save(engine, folder / "after all")
    try:
        deepspeed_engine(RESUMED.model(), RESUMED.settings(SHARE), LOSSES, 3)
    except TrainingError as error:
        messages["group"] = str(error)
    try:
        replace(RESUMED, zero_stage=3).engine()
    except SettingsError as error:
        messages["stage"] = str(error)
    messages["any"] = str([engine.any_rank(rank == 1), engine.any_rank(False)])
    return messages


def short_of_memory(folder: Path) -> dict[str, Any]:
    """Rank 1 alone cannot hold four sequences of a dense model, and from the second step on not even two."""
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
    raise AssertionError("it went on without memory")


def mixture_short_of_memory() -> dict[str, Any]:
    """A mixture's micro batch is part of what it learns. Before: a step after an evaluation, and what it waited."""
    engine = RESUMED.engine()
    for _ in range(20):
        engine.evaluate(shares(2, 0)[engine.rank])
    started = time.perf_counter()
    train(engine, 0, 1)
    step = time.perf_counter() - started

    def run_out(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.model.base_model.register_forward_pre_hook(run_out)
    try:
        train(engine, 1, 1)
    except SettingsError as error:
        return {"waited": engine.last_exchange, "step": step, "refused": str(error)}
    raise AssertionError("it went on without memory")


TOKENS = (0, 7)  # of rank 0 and rank 1


def routed(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and their weights of a rank's tokens."""
    torch.manual_seed(rank)
    tokens = TOKENS[rank]
    index = torch.rand(tokens, 4).topk(2, dim=-1).indices
    return torch.randn(tokens, 32), index, torch.rand(tokens, 2)


def dispatched() -> dict[str, Tensor]:
    """The FFN of one layer, ranks having different numbers of tokens -> outputs and gradients of Σ output²."""
    from bam_ray.on_deepspeed.expert_parallel import apply_expert_parallelism

    model = Case(2).model()
    apply_expert_parallelism(model, 2)
    return ffn(model, *routed(dist.get_rank()))


def ffn(model: PreTrainedModel, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
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
