"""Training steps of mixtures over a step of the dense model that they are made from.

    python -m benchmarks.training_step [--rounds 7] [--width 256] [--layers 4]
    python -m benchmarks.training_step --device cuda --paper

A step is forward, backward, clipping and update by the engine that trains branches, on the same random tokens. The
times are medians of the CPU time of one thread, or of a GPU's time.

`operations` is the ratio of counted operations (`bam_ray.training.flops`) and the lower bound of the ratio of times. A
BTX mixture with one expert for each token has the same number as the dense model. The count does not include the
update, whose cost grows with all parameters; its share becomes smaller with more tokens in a step. `ceiling` is the
number of operations a second that one large square matrix product of the same precision reaches in the same run. A
model's share of it is its MFU relative to the measured ceiling. transformers' Mixtral has the size of BTX and that
library's defaults.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import MixtralForCausalLM, PreTrainedModel

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.settings import TrainingSettings
from bam_ray.training.engine import EngineSpec
from bam_ray.training.flops import training_flops
from bam_ray.training.torch_engine import TorchEngine
from benchmarks.measure import report, seconds
from benchmarks.peers import mixtral_config


@dataclass(frozen=True)
class Shape:
    """The shape of the dense model and of a step."""

    width: int
    layers: int
    ffn: int
    head_dim: int = 64
    vocabulary: int = 4096
    length: int = 256
    sequences: int = 16
    micro_batch: int = 8
    ceiling: int = 1024  # rows and columns of the matrix product

    def __str__(self) -> str:
        return f"{self.layers} layers, d {self.width}"


PAPER = Shape(1024, 6, 2048, 128, 256_000, 2048, 16, 4, 8192)  # arXiv 2408.08274, Table 9, embeddings tied
BTX = {"attention_experts": "averaged"}
TWO = {"num_experts_per_tok": 2, "norm_topk_prob": True}


def models(shape: Shape) -> dict[str, PreTrainedModel]:
    """Return the dense model and its mixtures of four experts."""

    def config(**more: Any) -> BamConfig:
        return BamConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=max(1, shape.width // shape.head_dim),
            num_experts=4,
            parallel_block=False,
            attn_implementation="sdpa",
            **more,
        )

    return {
        "dense": BamForCausalLM(config(dense_layers=list(range(shape.layers)))),
        "BTX, top 1": BamForCausalLM(config(**BTX)),
        "BAM kv_experts, top 1": BamForCausalLM(config()),
        "BAM kv_shared, top 1": BamForCausalLM(config(attention_experts="kv_shared")),
        "BTX, top 2": BamForCausalLM(config(**BTX, **TWO)),
        "transformers' Mixtral, top 2": MixtralForCausalLM(
            mixtral_config(config(**BTX, **TWO), tie_word_embeddings=True)
        ),
    }


def steps(rounds: int, shape: Shape, precision: Literal["fp32", "bf16"]) -> list[list[str | float]]:
    """Measure all models and return a row for each."""
    torch.manual_seed(0)
    device = torch.get_default_device().type
    batch = torch.randint(0, shape.vocabulary, (shape.sequences, shape.length))
    settings = TrainingSettings(
        tokens=1 << 30,
        batch_tokens=batch.numel(),
        peak_lr=1e-4,
        micro_batch_sequences=shape.micro_batch,
        precision=precision,
    )
    made = models(shape)
    engines = {name: TorchEngine(EngineSpec(model, settings, device=device)) for name, model in made.items()}
    cases: dict[str, Callable[[], object]] = {
        name: partial(engine.step, batch, 1e-4) for name, engine in engines.items()
    }
    a, b = torch.randn(2, shape.ceiling, shape.ceiling, dtype=torch.bfloat16 if precision == "bf16" else torch.float)
    taken = seconds({**cases, "matmul": partial(torch.mm, a, b)}, rounds)
    ceiling = 2 * shape.ceiling**3 / taken["matmul"]
    flops = {name: training_flops(model.config, shape.length, batch.numel()) for name, model in made.items()}
    # Mixtral has the operations of BTX, but the count supports only BamConfig
    flops["transformers' Mixtral, top 2"] = flops["BTX, top 2"]
    rows: list[list[str | float]] = []
    for name, model in made.items():
        floor, time = flops[name] / flops["dense"], taken[name] / taken["dense"]
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        share = flops[name] / taken[name] / ceiling
        rows.append([f"{shape}, {precision}", name, parameters, time, floor, time / floor, share])
    return rows


def main(
    rounds: Annotated[int, typer.Option(help="Steps of each case.")] = 7,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
    paper: Annotated[bool, typer.Option("--paper", help="Use the paper's 590M shape, in bf16 only.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, print a table and write `benchmarks/results/training_step.json`, or that of the paper's shape."""
    torch.set_default_device(device)
    if paper:
        rows = steps(rounds, PAPER, "bf16")
    else:
        shape = Shape(width, layers, 4 * width)
        rows = [*steps(rounds, shape, "fp32"), *steps(rounds, shape, "bf16")]
    compared = ("time ÷ dense", "operations ÷ dense", "time ÷ operations", "share of ceiling")
    name = "_".join(["training_step", *(["paper"] if paper else []), *(["gpu"] if device == "cuda" else [])])
    report(name, ("shape", "model", "parameters, M", *compared), rows)


if __name__ == "__main__":
    typer.run(main)
