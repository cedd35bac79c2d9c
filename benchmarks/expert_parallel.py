"""Expert parallelism on two processes: the layer over DeepSpeed's two, and whole steps over replicated experts.

    python -m benchmarks.expert_parallel [--rounds 9] [--only layer,step]

Two gloo ranks run with one thread each.

layer     forward and backward pass of FFN experts, two of four on each rank; `routing` is the distribution of the
          tokens over the experts
step      training steps of a mixture whose experts are distributed over both ranks (EP 2), over steps with all experts
          on both (EP 1, data parallelism), at the same global batch

The results are the wall-clock and CPU time of the slower rank, as medians over rounds in which each case has one turn.
The bytes that a rank sends are counted where the exchanges call torch.distributed, over the smallest possible number:
one row there and back for each token and each rank that has an expert of its choice, in the forward and in the backward
pass; for soft attention experts, every token to every rank.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.experts_bam import BamExperts
from bam_ray.settings import TrainingSettings
from benchmarks.measure import report
from benchmarks.peers import SHARES, AutoEP, MoE, chosen, filled, marked, start_deepspeed

RANKS, EXPERTS = 2, 4
LENGTH, SEQUENCES = 256, 8  # in a step, on each rank
Row = list[str | float]
Case = Callable[[], object]


class Traffic:
    """A proxy for a module's torch.distributed (or DeepSpeed's) that counts the bytes sent to other ranks."""

    sent = 0  # by all modules

    def __init__(self, module: Any) -> None:
        self._dist = module.dist
        module.dist = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dist, name)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, **more: Any
    ) -> Any:
        """Count the rows for other ranks and call the collective."""
        splits = input_split_sizes or [len(input) // RANKS] * RANKS
        Traffic.sent += (sum(splits) - splits[dist.get_rank()]) * (input[:1].nbytes if len(input) else 0)
        return self._dist.all_to_all_single(output, input, output_split_sizes, input_split_sizes, **more)

    def all_gather_into_tensor(self, output: Tensor, input: Tensor, **more: Any) -> Any:
        """Count the input once for each other rank and call the collective."""
        Traffic.sent += input.nbytes * (RANKS - 1)
        return self._dist.all_gather_into_tensor(output, input, **more)

    def reduce_scatter_tensor(self, output: Tensor, input: Tensor, **more: Any) -> Any:
        """Count the output once for each other rank and call the collective."""
        Traffic.sent += output.nbytes * (RANKS - 1)
        return self._dist.reduce_scatter_tensor(output, input, **more)


def count_traffic() -> None:
    """Count the traffic of our exchanges and of DeepSpeed's two layers, but not that of ZeRO."""
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.moe import sharded_moe

    from bam_ray.on_deepspeed import collectives, dispatch

    for module in (collectives, dispatch, sharded_moe, auto_ep_layer):
        Traffic(module)


def measured(cases: dict[str, Case], rounds: int) -> dict[str, tuple[float, float, int]]:
    """Return the wall seconds, CPU seconds and bytes sent of each case, each as the maximum over the ranks."""
    taken: dict[str, list[Tensor]] = {name: [] for name in cases}
    for number in range(-2, rounds):
        for name, run in cases.items():
            dist.barrier()
            Traffic.sent = 0
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            spent = [time.perf_counter() - wall, time.process_time() - cpu, float(Traffic.sent)]
            most = torch.tensor(spent, dtype=torch.double)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            if number >= 0:  # the first two rounds warm up
                taken[name].append(most)
    medians = {name: torch.stack(each).median(0).values.tolist() for name, each in taken.items()}
    return {name: (wall, cpu, int(sent)) for name, (wall, cpu, sent) in medians.items()}


class Ours(nn.Module):
    """`BamExperts` with two experts on each rank, from [T, d] to [T, d]."""

    def __init__(self, config: BamConfig, dtype: torch.dtype, expert: Tensor) -> None:
        super().__init__()
        from deepspeed.utils import groups

        from bam_ray.on_deepspeed.collectives import EPGroup
        from bam_ray.on_deepspeed.dispatch import AllToAllTokenDispatcher

        self.experts = filled(BamExperts(config), dtype)
        groups._create_expert_and_data_parallel(RANKS)
        group = groups._get_expert_parallel_group(f"ep_size_{RANKS}")
        self.experts.dispatcher = AllToAllTokenDispatcher(EPGroup(group, group), EXPERTS)
        for name, whole in list(self.experts.named_parameters()):
            setattr(self.experts, name, nn.Parameter(whole.detach().chunk(RANKS)[dist.get_rank()].clone()))
        self.index, self.weights = expert[:, None], torch.ones(len(expert), 1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the experts."""
        out: Tensor = self.experts(x, self.index, self.weights)
        return out


def layer(rounds: int, tokens: int, d: int, dtype: torch.dtype, routing: str) -> list[Row]:
    """Compare one layer of FFN experts, forward and backward, with the peers."""
    torch.manual_seed(dist.get_rank())
    config = sizes(d, 1)
    expert = chosen(routing, tokens)
    x = marked(torch.randn(tokens, d, dtype=dtype), expert, EXPERTS).requires_grad_()
    grad = torch.randn_like(x)
    modules = {
        "ours": Ours(config, dtype, expert),
        "DeepSpeed's MoE layer": MoE(config, dtype, RANKS),
        "DeepSpeed's AutoEP": AutoEP(config, dtype, RANKS, dist.get_rank()),
    }

    def passes(module: nn.Module) -> Case:
        def run() -> None:
            module.zero_grad()
            x.grad = None
            module(x).backward(grad)

        return run

    taken = measured({name: passes(module) for name, module in modules.items()}, rounds)
    least = least_rows(expert[:, None]) * d * x.element_size()
    shape = f"layer, {RANKS} × {tokens} tokens, d {d}, {str(dtype).removeprefix('torch.')}, {routing}"
    return [[shape, name, *over(times, taken["ours"]), times[2] / least] for name, times in taken.items()]


def least_rows(index: Tensor) -> int:
    """Return the smallest number of rows that a rank sends if its tokens choose `index` [T, k].

    It counts the rank's own rows to the other rank, the other's rows on their way back, and the gradients of both. With
    two ranks the number is the same on both. This is a collective.
    """
    away = (index // (EXPERTS // RANKS) != dist.get_rank()).any(1).sum()
    dist.all_reduce(away)
    return 2 * int(away)


def step(rounds: int, d: int, layers: int, **settings: Any) -> list[Row]:
    """Compare training steps with EP 2 and EP 1."""
    from bam_ray.on_deepspeed import deepspeed_engine
    from bam_ray.training.engine import EngineSpec

    training = TrainingSettings(
        tokens=1 << 30, batch_tokens=RANKS * SEQUENCES * LENGTH, peak_lr=1e-4, micro_batch_sequences=8
    )
    config = sizes(d, layers, vocab_size=4096, **settings)
    batch = torch.randint(0, 4096, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    cases: dict[str, Case] = {}
    for size in (2, 1):
        torch.manual_seed(0)
        model = BamForCausalLM(config)
        engine = deepspeed_engine(EngineSpec(model, training, expert_parallel=size))
        cases[f"EP {size}"] = lambda engine=engine: engine.step(batch, 1e-4)  # type: ignore[misc]
        if size == RANKS:
            rows = least_rows_of(model, cases[f"EP {size}"])
    taken = measured(cases, rounds)
    soft = config.attention_experts != "averaged"
    rows += soft * layers * 4 * SEQUENCES * LENGTH
    shape = f"step, {layers} layers, d {d}, {'BAM' if soft else 'BTX'}, top {config.num_experts_per_tok}"
    return [
        [shape, "EP 2", *over(taken["EP 2"], taken["EP 1"]), taken["EP 2"][2] / (rows * d * 4)],
    ]


def least_rows_of(model: nn.Module, run: Case) -> int:
    """Return the sum of `least_rows` over all FFN layers in the first step.

    The routers of later steps differ from it only by a few updates.
    """
    found: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: found.append(least_rows(arguments[1])))
        for module in model.modules()
        if isinstance(module, BamExperts)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return sum(found)


def over(times: tuple[float, float, int], floor: tuple[float, float, int]) -> list[float]:
    """Return the ratios of the wall-clock and CPU times."""
    return [times[0] / floor[0], times[1] / floor[1]]


def sizes(d: int, layers: int, vocab_size: int = 1, **settings: Any) -> BamConfig:
    """Return the configuration of a mixture with hidden size `d`."""
    return BamConfig(
        hidden_size=d,
        intermediate_size=4 * d,
        num_attention_heads=max(1, d // 64),
        num_hidden_layers=layers,
        vocab_size=vocab_size,
        num_experts=EXPERTS,
        attn_implementation="sdpa",
        **settings,
    )


def rank(number: int, folder: str, rounds: int, only: str) -> None:
    """Run all cases in one of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)  # type: ignore[attr-defined]  # torch marks no re-exports
    start_deepspeed(number, RANKS, store)
    count_traffic()
    layers: list[Row] = []
    steps: list[Row] = []
    if "layer" in only:
        for dtype in (torch.float32, torch.bfloat16):
            for routing in SHARES:
                layers += layer(rounds, 2048, 512, dtype, routing)
    if "step" in only:
        steps += step(rounds, 256, 4)
        steps += step(rounds, 256, 4, attention_experts="averaged", num_experts_per_tok=2, norm_topk_prob=True)
    torch.save((layers, steps), Path(folder, f"{number}.pt"))
    dist.barrier()


def main(
    rounds: Annotated[int, typer.Option(help="Turns of each case.")] = 9,
    only: Annotated[str, typer.Option(help="layer or step.")] = "layer,step",
) -> None:
    """Measure, print tables and write `benchmarks/results/expert_parallel_*.json`."""
    with tempfile.TemporaryDirectory(prefix="bam-benchmark-") as folder:
        start_processes(rank, (folder, rounds, only), nprocs=RANKS, start_method="spawn")
        layers, steps = torch.load(Path(folder, "0.pt"))
    if layers:
        columns = ("shape", "case", "wall clock ÷ ours", "CPU ÷ ours", "bytes ÷ least")
        report("expert_parallel_layer", columns, layers)
    if steps:
        report("expert_parallel_step", ("shape", "case", "wall clock ÷ EP 1", "CPU ÷ EP 1", "bytes ÷ least"), steps)


if __name__ == "__main__":
    typer.run(main)
