"""The training loss in chunks of tokens over the loss from full logits, on one CPU thread or a GPU.

    python -m benchmarks.next_token_loss [--rounds 5] [--device cuda]

A pass is forward and backward, with random hidden states and a random weight of the head, and includes the gradient of
the weight. The results are medians of CPU time or of a GPU's time, and the peak memory of a pass beyond what was
allocated before it. On a GPU, the loss from full logits is also compiled.
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
from bam_ray.training.memory import memory_of
from bam_ray.training.next_token import ChunkedHead
from benchmarks.measure import report, seconds

TOKENS = 4096
CPU_SHAPES = ((256, 32_768), (1024, 32_768))  # hidden size, vocabulary
GPU_SHAPES = ((1024, 256_000), (4096, 128_256))
Row = list[str | float]


def peak_mib(run: Callable[[], object]) -> float:
    """Return the peak memory of `run` in MiB, beyond what was allocated before."""
    memory = memory_of(torch.get_default_device().type)
    gc.collect()
    before = memory.used_bytes()
    memory.reset_peak()
    run()
    return (memory.peak_bytes() - before) / (1 << 20)


def losses(rounds: int, tokens: int, width: int, vocabulary: int, bf16: bool) -> list[Row]:
    """Measure one shape on torch's default device, and return a row for each loss."""
    torch.manual_seed(0)
    device = torch.get_default_device().type
    model = BamForCausalLM(BamConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, dense_layers=[0]))
    head = ChunkedHead(model)
    weight = head.weight
    hidden = torch.randn(tokens, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))

    def whole(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss(hidden, targets)
        value.backward()

    cases = {"whole": partial(run, whole), "chunks": partial(run, head)}
    if device == "cuda":
        cases["whole, compiled"] = partial(run, torch.compile(whole))
    taken = seconds(cases, rounds, warm_up=1)
    hidden.grad = weight.grad = None  # every pass of each case allocates them
    memory: dict[str, float] = {}
    for name, case in cases.items():
        memory[name] = peak_mib(case)
        hidden.grad = weight.grad = None
    shape = f"{tokens} tokens, d {width}, vocabulary {vocabulary}, {'bf16' if bf16 else 'fp32'}"
    return [[shape, name, 1000 * taken[name], taken[name] / taken["whole"], memory[name]] for name in cases]


def main(
    rounds: Annotated[int, typer.Option(help="Passes of each case.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, print a table and write `benchmarks/results/next_token_loss.json` (`..._gpu.json`)."""
    torch.set_default_device(device)
    on_gpu = device == "cuda"
    rows = [
        row
        for shape in (GPU_SHAPES if on_gpu else CPU_SHAPES)
        for bf16 in ([True] if on_gpu else [False, True])
        for row in losses(rounds, TOKENS, *shape, bf16)
    ]
    columns = ("shape", "loss", "milliseconds", "time ÷ whole logits", "peak, MiB")
    report("next_token_loss" + ("_gpu" if on_gpu else ""), columns, rows)


if __name__ == "__main__":
    typer.run(main)
