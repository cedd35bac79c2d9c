"""Training steps and decode steps of BAM with embedding experts, over those of the plain mixture.

    python -m benchmarks.embedding_experts [--rounds 7] [--width 128] [--layers 4]

A training step is forward, backward, clipping and update by the engine that trains mixtures, on the same random tokens.
A decode step is one token of one sequence after a prompt. The times are medians of the CPU time of one thread.

`operations` is the ratio of counted operations (`bam_ray.training.flops`), which predicts the ratio of the times of
training. The count does not include the update, whose cost grows with all parameters. A decode step reads each weight
that it uses once, so the number of parameters that a token uses (`used parameters`) predicts its time if reading them
dominates.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.parameters import count_parameters
from bam_ray.settings import TrainingSettings
from bam_ray.training.engine import EngineSpec
from bam_ray.training.flops import training_flops
from bam_ray.training.torch_engine import TorchEngine
from benchmarks.measure import ratios, report, seconds

VOCABULARIES = (512, 8192)
LENGTH, SEQUENCES, PROMPT = 256, 8, 64
PLAIN = "averaged embeddings"
MODELS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "embedding experts": {"embeddings": "experts"},
    "embedding experts, prefix, prior": {
        "embeddings": "experts",
        "router_input": "prefix",
        "router_prior": "bigram",
    },
}


def model(name: str, vocabulary: int, width: int, layers: int) -> BamForCausalLM:
    """Return a mixture of four experts with keys and values of their own. A prior has random counts."""
    torch.manual_seed(0)
    made = BamForCausalLM(
        BamConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            num_experts=4,
            attn_implementation="sdpa",
            **MODELS[name],
        )
    )
    if made.model.prior is not None:
        made.model.prior.experts.tokens.random_(0, 500)
        made.model.prior.experts.pairs.random_(0, 20)
    return made


def decoding(model: BamForCausalLM, prompt: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs one token after the prompt [1, L] and all tokens of earlier calls."""
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).cache

    @torch.no_grad()
    def step() -> None:
        model(input_ids=prompt[:, :1], cache=cache, use_cache=True)

    return step


def measure(rounds: int, vocabulary: int, width: int, layers: int) -> list[list[str | float]]:
    """Measure all models of one shape, and return a row for each."""
    batch = torch.randint(0, vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    settings = TrainingSettings(
        tokens=1 << 30, batch_tokens=batch.numel(), peak_lr=1e-4, micro_batch_sequences=SEQUENCES, precision="fp32"
    )
    trained = {name: model(name, vocabulary, width, layers) for name in MODELS}
    engines = {name: TorchEngine(EngineSpec(each, settings, device="cpu")) for name, each in trained.items()}
    training = ratios(
        seconds({name: partial(engine.step, batch, 1e-4) for name, engine in engines.items()}, rounds), PLAIN
    )
    decoded = {name: decoding(model(name, vocabulary, width, layers), batch[:1, :PROMPT]) for name in MODELS}
    decode = ratios(seconds(decoded, 20 * rounds), PLAIN)
    flops = ratios({name: training_flops(each.config, LENGTH, 1) for name, each in trained.items()}, PLAIN)
    active = ratios({name: count_parameters(each)[1] for name, each in trained.items()}, PLAIN)
    shape = f"{layers} layers, d {width}, vocabulary {vocabulary}"
    return [
        [shape, name, training[name], flops[name], training[name] / flops[name], decode[name], active[name]]
        for name in MODELS
    ]


def main(
    rounds: Annotated[int, typer.Option(help="Training steps of each case; 20 times as many decode steps.")] = 7,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
) -> None:
    """Measure, print a table and write `benchmarks/results/embedding_experts.json`."""
    rows = [row for vocabulary in VOCABULARIES for row in measure(rounds, vocabulary, width, layers)]
    compared = ("training time", "operations", "time ÷ operations", "decode time", "used parameters")
    report("embedding_experts", ("shape", "model", *compared), rows)


if __name__ == "__main__":
    typer.run(main)
