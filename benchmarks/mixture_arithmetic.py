"""The cost of a mixture's layers on one CPU thread or a GPU, as ratios: FFN experts, attention experts, whole blocks.

    python -m benchmarks.mixture_arithmetic [--rounds 15] [--only ffn|attention|block] [--compile] [--device cuda]

Every row is the forward and backward pass of a case over the same pass of its reference in the same run. `routing` is
the distribution of the tokens over the four experts: balanced, or 71 % on one expert.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

from bam_ray.model import BamConfig
from bam_ray.model.attention_bam import AveragedAttention, BamAttention, BamRotaryEmbedding
from bam_ray.model.experts_bam import BamExperts
from bam_ray.model.layers_bam import BamDecoderLayer, BamFFN
from bam_ray.training.flops import forward_flops_per_token
from benchmarks.measure import ratios, report, seconds
from benchmarks.peers import AutoEP, MoE, chosen, filled, marked, mixtral, start_deepspeed

EXPERTS = 4
Row = list[str | float]


class Shapes(NamedTuple):
    """The sizes that are compared."""

    ffn: tuple[tuple[str, int], ...]  # routing, tokens
    ffn_width: int
    attention: tuple[tuple[int, int, int], ...]  # sequences, length, hidden size
    block: tuple[int, int, int]
    dtypes: tuple[torch.dtype, ...]


CPU = Shapes(
    ffn=(("balanced", 2048), ("skewed", 2048), ("balanced", 512)),
    ffn_width=512,
    attention=((4, 512, 512), (2, 128, 512), (2, 32, 64), (1, 16, 64)),
    block=(4, 512, 512),
    dtypes=(torch.float32, torch.bfloat16),
)
# Matrix products of the shapes above take a GPU microseconds, less than it takes to launch them
GPU = Shapes(
    ffn=(("balanced", 16384), ("skewed", 16384)),
    ffn_width=4096,
    attention=((8, 2048, 4096),),
    block=(8, 2048, 4096),
    dtypes=(torch.bfloat16,),
)


def passes(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Return a training pass: forward, and the gradients of the input and of all parameters."""
    grad = torch.randn_like(x)

    def run() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        x.grad = None
        forward(x).backward(grad)

    x.requires_grad_()
    return run


def sizes(d: int, **settings: Any) -> BamConfig:
    """Return the configuration of a mixture with one layer and hidden size `d`."""
    return BamConfig(
        hidden_size=d,
        intermediate_size=4 * d,
        num_attention_heads=max(1, d // 64),
        num_hidden_layers=1,
        vocab_size=1,
        num_experts=EXPERTS,
        attn_implementation="sdpa",
        **settings,
    )


def ffn(rounds: int, tokens: int, d: int, dtype: torch.dtype, routing: str) -> list[Row]:
    """Compare FFN experts, top-1, with one dense FFN on the same tokens and with peers."""
    torch.manual_seed(0)
    expert = chosen(routing, tokens)
    index, weights = expert.unsqueeze(1), torch.ones(tokens, 1, dtype=dtype)
    config = sizes(d)
    x = torch.randn(tokens, d, dtype=dtype)

    def routed(experts: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: experts(x, index, weights)

    dense = filled(BamFFN(config, config.intermediate_size), dtype)
    ours = filled(BamExperts(config), dtype)
    cases = {
        "one dense FFN": passes(dense, lambda x: dense(x)[0], x),
        "BamExperts": passes(ours, routed(ours), x),
    }
    for implementation in ("eager", "grouped_mm"):
        peer = filled(mixtral(config, implementation), dtype)
        cases[f"transformers' Mixtral, {implementation}"] = passes(peer, routed(peer), x)
    told = marked(x, expert, EXPERTS)
    for name, peer in (("DeepSpeed's MoE layer", MoE(config, dtype)), ("DeepSpeed's AutoEP", AutoEP(config, dtype))):
        cases[name] = passes(peer, peer, told)
    times = ratios(seconds(cases, rounds), "one dense FFN")
    shape = f"{tokens} tokens, d {d}, {str(dtype).removeprefix('torch.')}, {routing}"
    return [["FFN " + shape, name, "one dense FFN", ratio] for name, ratio in times.items() if name != "one dense FFN"]


def attention(rounds: int, batch: int, length: int, d: int, dtype: torch.dtype) -> list[Row]:
    """Compare soft attention experts as one call with a loop over the same number of attentions."""
    torch.manual_seed(0)
    config = sizes(d)
    shared_config = sizes(d, attention_experts="kv_shared")
    one, shared = (filled(BamAttention(each, 0), dtype) for each in (config, shared_config))
    loop = filled(nn.ModuleList(AveragedAttention(config, 0) for _ in range(EXPERTS)), dtype)
    gate = one.gate
    cos_sin = BamRotaryEmbedding(config)(torch.empty(0, dtype=dtype), torch.arange(length)[None])
    more: dict[str, Any] = {"position_embeddings": cos_sin, "attention_mask": None, "cache": None}

    def looped(x: Tensor) -> Tensor:
        gates = gate(x).softmax(-1)
        outputs = (gates[..., i, None] * each(x, **more)[0].result() for i, each in enumerate(loop))
        return sum(outputs, torch.zeros(()))

    x = torch.randn(batch, length, d, dtype=dtype)
    times = ratios(
        seconds(
            {
                "loop over experts": passes(loop, looped, x),
                "one call": passes(one, lambda x: one(x, **more)[0].result(), x),
                "one call, kv_shared": passes(shared, lambda x: shared(x, **more)[0].result(), x),
            },
            rounds,
        ),
        "loop over experts",
    )
    shape = f"attention {batch}x{length} tokens, d {d}"
    return [
        [shape, "one call", "loop over experts", times["one call"]],
        [shape, "kv_shared", "kv_experts", times["one call, kv_shared"] / times["one call"]],
    ]


def block(rounds: int, batch: int, length: int, d: int, dtype: torch.dtype, compiled: bool) -> list[Row]:
    """Compare BAM blocks, top-1, with a dense block and with the ratio of operations.

    Compiled blocks are compared with eager ones.
    """
    torch.manual_seed(0)
    configs = {
        "dense": sizes(d, dense_layers=[0]),
        "kv_experts": sizes(d),
        "kv_shared": sizes(d, attention_experts="kv_shared"),
        "averaged": sizes(d, attention_experts="averaged"),
    }
    cos_sin = BamRotaryEmbedding(configs["dense"])(torch.empty(0, dtype=dtype), torch.arange(length)[None])
    more: dict[str, Any] = {"position_embeddings": cos_sin, "attention_mask": None, "cache": None}
    x = torch.randn(batch, length, d, dtype=dtype)
    cases = {}

    def output_of(layer: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x, **more)[0]

    for name, config in configs.items():
        layer = filled(BamDecoderLayer(config, 0), dtype)
        cases[name] = passes(layer, output_of(layer), x)
        if compiled and name != "averaged":
            fast = torch.compile(layer, fullgraph=True)
            cases[f"{name}, compiled"] = passes(layer, output_of(fast), x)
    taken = seconds(cases, rounds, warm_up=3)
    shape = f"block {batch}x{length} tokens, d {d}, {str(dtype).removeprefix('torch.')}"
    head = 2.0 * d  # operations of the head, for a vocabulary of one
    flops = {name: forward_flops_per_token(config, length) - head for name, config in configs.items()}
    rows: list[Row] = []
    for name in ("kv_experts", "kv_shared", "averaged"):
        ratio = taken[name] / taken["dense"]
        rows += [
            [shape, name, "dense", ratio],
            [shape, f"{name} ÷ dense", "counted operations", ratio / (flops[name] / flops["dense"])],
        ]
    rows += [[shape, name, "eager", taken[name] / taken[name.split(",")[0]]] for name in cases if "compiled" in name]
    return rows


def main(
    rounds: Annotated[int, typer.Option(help="Passes of each case.")] = 15,
    only: Annotated[str, typer.Option(help="ffn, attention or block.")] = "ffn,attention,block",
    compiled: Annotated[bool, typer.Option("--compile", help="Time compiled blocks too (minutes of C++).")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, print a table and write `benchmarks/results/mixture_arithmetic.json` (`..._gpu.json`)."""
    torch.set_default_device(device)
    shapes = GPU if device == "cuda" else CPU
    rows: list[Row] = []
    if "ffn" in only:
        start_deepspeed(device=device)
        for dtype in shapes.dtypes:
            for routing, tokens in shapes.ffn:
                rows += ffn(rounds, tokens, shapes.ffn_width, dtype, routing)
    if "attention" in only:
        for batch, length, d in shapes.attention:
            rows += attention(rounds if length > 128 else 10 * rounds, batch, length, d, shapes.dtypes[0])
    if "block" in only:
        for dtype in shapes.dtypes:
            rows += block(rounds, *shapes.block, dtype, compiled)
    report("mixture_arithmetic" + ("_gpu" if device == "cuda" else ""), ("shape", "case", "against", "ratio"), rows)


if __name__ == "__main__":
    typer.run(main)
