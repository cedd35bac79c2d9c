"""Models, settings and batches of the distributed tests, which also train them on one process for comparison."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Losses, Mixing, Ramp, TrainingSettings
from bam_ray.training.document_mask import mask_documents
from bam_ray.training.engine import Engine, EngineSpec, StepResult
from tests.support.tiny import with_random_counts

SHARE, LENGTH, VOCABULARY = 4, 12, 64  # sequences per rank and step, tokens per sequence, tokens of the vocabulary
STEPS, LR = 3, 5e-5
END_OF_TEXT = 7  # one token in 64, so in a step some ranks have sequences of several documents and others have none
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
QWEN = Qwen3Config(**DENSE, head_dim=6, tie_word_embeddings=True)  # four ranks cannot divide six values evenly


MicroBatch = int | Literal["auto"]  # sequences


@dataclass(frozen=True)
class Case:
    """A model, its training settings, and the number of ranks that its experts are spread over."""

    expert_parallel: int
    micro: int = SHARE
    config: dict[str, Any] = field(default_factory=dict)
    dense: PreTrainedConfig | None = None
    idle: bool = False  # no token is routed to the upper half of the experts, so rank 1 of two has no tokens
    precision: Literal["fp32", "bf16"] = "fp32"
    mixing: Mixing = LOSSES
    apart: bool = False  # tokens attend only within their document
    zero_stage: Literal[1, 2, 3] = 1
    recompute: bool = False

    def model(self) -> PreTrainedModel:
        """Return the model, with the same weights every time."""
        torch.manual_seed(0)
        if self.dense is not None:
            return AutoModelForCausalLM.from_config(self.dense)
        model = BamForCausalLM(BamConfig(**{**DENSE, "num_experts": 4, **self.config}))
        with_random_counts(model)
        if self.apart:
            mask_documents(model, END_OF_TEXT)
        if self.idle:  # logits v·u, -v·u, 0, 0: one of the first two is always the highest
            layers: Any = model.model.layers
            for layer in layers:
                weight = layer.mlp.gate.weight.data
                weight[1:] = torch.stack((-weight[0], torch.zeros_like(weight[0]), torch.zeros_like(weight[0])))
        return model

    def settings(self, micro: MicroBatch) -> TrainingSettings:
        """Return the training settings with micro batches of `micro` sequences."""
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

    def spec(self, micro: MicroBatch | None = None) -> EngineSpec:
        """Return what an engine is made from; `micro` replaces the case's own number of sequences per micro batch."""
        return EngineSpec(self.model(), self.settings(micro or self.micro), self.mixing, self.expert_parallel)

    def engine(self, micro: MicroBatch | None = None) -> Engine:
        """Return an engine over all ranks for `spec(micro)`."""
        return deepspeed_engine(self.spec(micro))


RENORMALISED = {"num_experts_per_tok": 2, "norm_topk_prob": True}
BY_PREFIX = {"embeddings": "experts", "router_input": "prefix", "router_prior": "bigram"}
UNTIED_TABLES = {"embeddings": "experts", "tie_word_embeddings": False, "vocab_size": 67}  # two ranks cannot divide it
OWN_RATE = Mixing(losses=LOSSES.losses, expert_lr_factor=0.5)
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
            router_warmup_fraction=0.5,  # the first step, as later steps are beyond the last one of the settings
            expert_lr_factor=0.5,
        ),
    ),
    "documents apart": Case(2, micro=1, config={"sliding_window": 5, "nope_layers": [0]}, apart=True),
    "kv_shared, documents apart": Case(2, config={"attention_experts": "kv_shared", **RENORMALISED}, apart=True),
    "embedding experts": Case(2, micro=3, config={"embeddings": "experts", **RENORMALISED}, mixing=OWN_RATE),
    "embedding experts, untied": Case(2, config={**UNTIED_TABLES, "logit_scale": 0.5}),
    "frozen embedding experts": Case(
        2, config={"embeddings": "experts"}, mixing=Mixing(losses=LOSSES.losses, train="routers")
    ),
    "by prefix": Case(2, micro=1, config={**BY_PREFIX, **RENORMALISED}, mixing=OWN_RATE, apart=True),
    "by prefix, recomputed, ZeRO-2": Case(
        2,
        config={
            **BY_PREFIX,
            "router_forgetting": 0.9,
            "attention_experts": "averaged",
            "parallel_block": False,
            **RENORMALISED,
        },
        recompute=True,
        zero_stage=2,
    ),
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
    "by prefix on 1": Case(1, config=BY_PREFIX),
    "by prefix on 2": Case(2, micro=3, config=BY_PREFIX, mixing=OWN_RATE),
    "by prefix on 4": Case(4, config={**BY_PREFIX, "tie_word_embeddings": False}),
    "embedding experts on 4": Case(4, micro=3, config={"embeddings": "experts"}),
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
FOUR_BF16 = {
    "bf16 on 2": BF16,
    "bf16 on 4": replace(BF16, expert_parallel=4),
    "embedding experts, bf16 on 4": Case(4, config={"embeddings": "experts"}, precision="bf16"),
}
RESUMED = Case(2, config={"attention_experts": "kv_shared", "embeddings": "experts"})
OTHER_STAGES = {
    "mixture, ZeRO-2": Case(2, config={"attention_experts": "kv_shared", **UNTIED_TABLES}, zero_stage=2),
    "dense, ZeRO-2": Case(1, dense=QWEN, zero_stage=2),
    "dense, ZeRO-3": Case(1, dense=QWEN, zero_stage=3),
}
ANOTHER_STAGE: dict[str, Literal[1, 2, 3]] = {"mixture, ZeRO-2": 1, "dense, ZeRO-2": 3, "dense, ZeRO-3": 1}
"""The stage at which a case of `OTHER_STAGES` is resumed besides its own."""


def shares(world_size: int, step: int) -> Tensor:
    """Return the global batch of a step, [world_size, SHARE, LENGTH]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (world_size, SHARE, LENGTH), generator=generator)


class ShareSampler:
    """A sampler that returns the global batches of two ranks in their order."""

    position = 0

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the next global batch, and its only domain for each of the `count` sequences."""
        self.position += 1
        return shares(2, self.position).flatten(0, 1).numpy(), np.ones((count, 1), dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position in `state`."""
        self.position = state["position"]


def step_losses(result: StepResult) -> dict[str, float]:
    """Return the losses and the gradient norm of a step by name."""
    return {name: getattr(result, name) for name in ("nll", "load_balance", "router_z", "grad_norm")}


def train(engine: Engine, first: int, steps: int) -> list[dict[str, float]]:
    """Train `steps` steps from step `first` on and return their results."""
    results = []
    for step in range(first, first + steps):
        torch.manual_seed(step * engine.world_size + engine.rank)  # as the training loop does, for the noise of gates
        results.append(step_losses(engine.step(shares(engine.world_size, step)[engine.rank], LR)))
    return results


def save(engine: Engine, folder: Path) -> None:
    """Write the engine's state to `folder` in place of another one; returns when all ranks have written their parts."""
    if engine.rank == 0:
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.safetensors"):  # of another number of ranks
            path.unlink()
    engine.any_rank(False)
    state = engine.state()
    assert state is not None
    state.write(folder)
    engine.any_rank(False)
