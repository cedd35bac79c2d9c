"""What it gains that the branches of a parallel block overlap their communication: 2 gloo ranks of one thread each.

python -m benchmarks.exchange_overlap [--rounds 20] [--megabits 100]

A mixture's forward and backward pass in three schedules, in turns in the same processes: one branch after the other (as
in a sequential block), attention's sum under way beside the FFN, and both branches in turns (as it is trained).

Once over the loopback device, whose bytes are moved by the very cores that compute: little can be hidden there. Once
with every collective held back as if a wire of so many megabits a second lay between the ranks, shared evenly by all
that is under way: that is no network, but it shows what the order of things hides where cores are free while the wire
is busy.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.on_deepspeed.dispatch import Wire
from benchmarks.measure import report
from benchmarks.peers import start_deepspeed

RANKS = 2
SCHEDULES = ("one after the other", "sum beside FFN", "both branches")
COLUMNS = (
    *("wire", "tokens", f"{SCHEDULES[0]}, s", "of that waiting"),
    *(f"{name} ÷ it{what}" for name in SCHEDULES[1:] for what in ("", ", waiting")),
)
Row = list[str | float]


class SlowWire:
    """Holds back what `torch.distributed` does from now on, until a wire shared by all that is under way carried it."""

    def __init__(self, megabits: float) -> None:
        self.bytes_per_second = megabits * 1e6 / 8
        self.under_way: list[Held] = []
        self.at = time.perf_counter()
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
            setattr(dist, name, self.held(getattr(dist, name)))

    def held(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Tensor, sent: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            self.advance()
            crossing = max(out.nbytes, sent.nbytes) / RANKS  # the other part stays
            work = Held(collective(out, sent, *args, async_op=True, **kwargs), self, crossing)
            self.under_way.append(work)
            return work if async_op else work.wait()

        return call

    def advance(self) -> None:
        """Carry what time there was for, as much of each."""
        now = time.perf_counter()
        carried, self.at = (now - self.at) * self.bytes_per_second, now
        while self.under_way and carried > 0:
            part = min(carried / len(self.under_way), *(each.left for each in self.under_way))
            for each in self.under_way:
                each.left -= part
            carried -= part * len(self.under_way)
            self.under_way = [each for each in self.under_way if each.left > 0]


class Held:
    """A collective with so many bytes left to carry."""

    def __init__(self, work: dist.Work, wire: SlowWire, left: float) -> None:
        self.work, self.wire, self.left = work, wire, left

    def wait(self) -> None:
        self.work.wait()
        self.wire.advance()
        while self.left > 0:
            time.sleep(self.left / self.wire.bytes_per_second)
            self.wire.advance()


def compared(run: Callable[[str], None], wire: Wire, rounds: int) -> list[float]:
    """Medians over rounds: the first schedule in seconds and the part of these that this rank waited, and what each
    other takes of its seconds and of its wait. All ranks begin and end together."""
    found = []
    for number in range(rounds + 1):
        taken = {}
        for schedule in SCHEDULES if number % 2 else reversed(SCHEDULES):
            dist.barrier()
            start = time.perf_counter()
            run(schedule)
            dist.barrier()
            taken[schedule] = time.perf_counter() - start, wire.seconds()
        wall, wait = taken[SCHEDULES[0]]
        ratios = [part for name in SCHEDULES[1:] for part in (taken[name][0] / wall, taken[name][1] / wait)]
        found.append((wall, wait / wall, *ratios))
    return [statistics.median(column) for column in zip(*found[1:], strict=True)]  # the first warms up


def training_pass(model: BamForCausalLM, ids: Tensor) -> Callable[[str], None]:
    """Forward and backward, in the schedule of a name."""
    layers: Any = model.model.layers
    exchange, dispatcher = layers[0].self_attn.experts.exchange, layers[0].mlp.experts.dispatcher  # those of all layers

    def arrived_at_once(*call: Any) -> Tensor:
        out: Tensor = exchange.arrived(exchange(*call))
        return out

    def summed_at_once(*call: Any) -> Tensor:
        out: Tensor = exchange(*call)
        exchange.attend()
        return out

    def run(schedule: str) -> None:
        one_by_one, both = schedule == SCHEDULES[0], schedule == SCHEDULES[2]
        dispatcher.meanwhile = exchange.attend if both else lambda: None
        for layer in layers:
            layer.arrived = (lambda attended: attended) if one_by_one else exchange.arrived
            layer.self_attn.experts.exchange = exchange if both else arrived_at_once if one_by_one else summed_at_once
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    return run


def measure(rank: int, folder: str, rounds: int, megabits: float) -> None:
    from bam_ray.on_deepspeed.expert_parallel import apply_expert_parallelism

    warnings.filterwarnings("ignore", r".* is deprecated", FutureWarning)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)  # type: ignore[attr-defined]  # torch marks no re-exports
    start_deepspeed(rank, RANKS, store)
    rows: list[Row] = []
    for wire in ("loopback", f"held to {megabits:g} Mbit/s"):
        if wire != "loopback":
            SlowWire(megabits)
        for batch, length, d in ((4, 64, 256), (4, 64, 512)):
            torch.manual_seed(0)
            config = BamConfig(
                hidden_size=d, intermediate_size=4 * d, num_attention_heads=d // 64, num_hidden_layers=2, vocab_size=512
            )
            model = BamForCausalLM(config).train()
            shards = apply_expert_parallelism(model, RANKS)
            assert shards.wire is not None
            torch.manual_seed(rank)
            found = compared(training_pass(model, torch.randint(0, 512, (batch, length))), shards.wire, rounds)
            rows.append([wire, f"{RANKS} x {batch}x{length}, d {d}", *found])
    if rank == 0:
        report("exchange_overlap", COLUMNS, rows)
    dist.barrier()


def main(
    rounds: Annotated[int, typer.Option(help="Passes of each schedule.")] = 20,
    megabits: Annotated[float, typer.Option(help="Of the wire that is imitated, a second.")] = 100.0,
) -> None:
    """Measure, print a table and write `benchmarks/results/exchange_overlap.json`."""
    with tempfile.TemporaryDirectory(prefix="bam-benchmark-") as folder:
        start_processes(measure, (folder, rounds, megabits), nprocs=RANKS, start_method="spawn")


if __name__ == "__main__":
    typer.run(main)
