"""Whole training steps of mixtures on one CPU thread, over a step of the dense model they are made of.

    python -m benchmarks.training_step [--rounds 7] [--width 256] [--layers 4]

Forward, backward, clipping and update by the engine that trains branches, on the same random tokens; medians of CPU
time. `operations` is the ratio of operations by `bam_ray.training.flops`, the floor of the time's ratio: a BTX mixture
of one expert a token has as many as the dense model. An update is no part of the count, and grows with all parameters:
its share falls with the tokens of a step. transformers' Mixtral is the same size as BTX, with that library's defaults.
"""

from functools import partial
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import MixtralForCausalLM, PreTrainedModel

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.settings import TrainingSettings
from bam_ray.training.engine import TorchEngine
from bam_ray.training.flops import forward_flops_per_token
from benchmarks.measure import ratios, report, seconds
from benchmarks.peers import mixtral_config

LENGTH, SEQUENCES, VOCABULARY = 256, 16, 4096
BTX = {"attention_experts": "averaged"}
TWO = {"num_experts_per_tok": 2, "norm_topk_prob": True}


def models(width: int, layers: int) -> dict[str, PreTrainedModel]:
    """The dense model and its mixtures of four experts."""

    def config(**more: Any) -> BamConfig:
        return BamConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            num_experts=4,
            parallel_block=False,
            attn_implementation="sdpa",
            **more,
        )

    return {
        "dense": BamForCausalLM(config(dense_layers=list(range(layers)))),
        "BTX, top 1": BamForCausalLM(config(**BTX)),
        "BAM kv_experts, top 1": BamForCausalLM(config()),
        "BAM kv_shared, top 1": BamForCausalLM(config(attention_experts="kv_shared")),
        "BTX, top 2": BamForCausalLM(config(**BTX, **TWO)),
        "transformers' Mixtral, top 2": MixtralForCausalLM(
            mixtral_config(config(**BTX, **TWO), tie_word_embeddings=True)
        ),
    }


def steps(rounds: int, width: int, layers: int, precision: Literal["fp32", "bf16"]) -> list[list[str | float]]:
    """A row a model."""
    torch.manual_seed(0)
    batch = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH))
    settings = TrainingSettings(
        tokens=1 << 30,
        batch_tokens=SEQUENCES * LENGTH,
        peak_lr=1e-4,
        micro_batch_sequences=8,
        precision=precision,
    )
    made = models(width, layers)
    engines = {name: TorchEngine(model, settings) for name, model in made.items()}
    cases = {name: partial(engine.step, batch, 1e-4) for name, engine in engines.items()}
    taken = ratios(seconds(cases, rounds), "dense")
    flops = {name: forward_flops_per_token(model.config, LENGTH) for name, model in made.items()}
    # Mixtral's operations are those of BTX; the count knows our configurations alone
    flops["transformers' Mixtral, top 2"] = flops["BTX, top 2"]
    rows: list[list[str | float]] = []
    for name, model in made.items():
        floor = flops[name] / flops["dense"]
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        shape = f"{layers} layers, d {width}, {precision}"
        rows.append([shape, name, parameters, taken[name], floor, taken[name] / floor])
    return rows


def main(
    rounds: Annotated[int, typer.Option(help="Steps of each case.")] = 7,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
) -> None:
    """Measure, print a table and write `benchmarks/results/training_step.json`."""
    rows = [*steps(rounds, width, layers, "fp32"), *steps(rounds, width, layers, "bf16")]
    columns = ("shape", "model", "parameters, M", "time ÷ dense", "operations ÷ dense", "time ÷ operations")
    report("training_step", columns, rows)


if __name__ == "__main__":
    typer.run(main)
