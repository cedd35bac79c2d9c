"""The training loss in chunks of tokens over the loss from full logits, on one CPU thread.

    python -m benchmarks.next_token_loss [--rounds 5]

A pass is forward and backward, with random hidden states and a random weight of the head, and includes the gradient of
the weight. The results are medians of CPU time, and the peak memory of a pass beyond what was allocated before it.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.training.memory import HostMemory
from bam_ray.training.next_token import ChunkedHead
from benchmarks.measure import report, seconds

TOKENS = 4096


def peak_mib(run: Callable[[], object]) -> float:
    """Return the peak memory of `run` in MiB, beyond what was allocated before."""
    memory = HostMemory()
    gc.collect()
    before = memory.used_bytes()
    memory.reset_peak()
    run()
    return (memory.peak_bytes() - before) / (1 << 20)


def losses(rounds: int, width: int, vocabulary: int, bf16: bool) -> list[str | float]:
    """Measure one shape and return its row."""
    torch.manual_seed(0)
    model = BamForCausalLM(BamConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, dense_layers=[0]))
    head = ChunkedHead(model)
    weight = head.weight
    hidden = torch.randn(TOKENS, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (TOKENS,))

    def whole(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(hidden, targets)
        value.backward()

    cases = {"whole": partial(run, whole), "chunks": partial(run, head)}
    taken = seconds(cases, rounds, warm_up=1)
    hidden.grad = weight.grad = None  # every pass of both cases allocates them
    memory: dict[str, float] = {}
    for name, case in cases.items():
        memory[name] = peak_mib(case)
        hidden.grad = weight.grad = None
    shape = f"{TOKENS} tokens, d {width}, vocabulary {vocabulary}, {'bf16' if bf16 else 'fp32'}"
    return [shape, taken["chunks"] / taken["whole"], memory["whole"], memory["chunks"]]


def main(rounds: Annotated[int, typer.Option(help="Passes of each case.")] = 5) -> None:
    """Measure, print a table and write `benchmarks/results/next_token_loss.json`."""
    shapes = ((256, 32768), (1024, 32768))
    rows = [losses(rounds, *shape, bf16) for shape in shapes for bf16 in (False, True)]
    report("next_token_loss", ("shape", "time ÷ whole logits", "whole logits, MiB", "chunks, MiB"), rows)


if __name__ == "__main__":
    typer.run(main)
