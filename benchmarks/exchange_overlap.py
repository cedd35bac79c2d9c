"""The gain of overlapping the communication of a parallel block's branches: two gloo ranks with one thread each.

    python -m benchmarks.exchange_overlap [--rounds 20] [--megabits 100]

The forward and backward pass of a mixture runs in three schedules, in turns in the same processes: attention and FFN
one after the other, as in a sequential block; the sum of attention's outputs in flight during the FFN; and both
overlapped, as in training.

The benchmark runs twice. The first time, collectives use the loopback device. The cores that compute also move its
bytes, so little of the communication can be hidden. The second time, every collective is delayed as if the ranks were
connected by a link of `--megabits` per second, which all collectives in flight share evenly. This does not imitate a
real network, but it shows the gain of the schedules if the cores are free while bytes are transferred.
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
from bam_ray.model.attention_exchange_bam import Attend, AttentionExchange, ComputedAttention, PendingAttention
from bam_ray.on_deepspeed.collectives import CommTimer
from benchmarks.measure import report
from benchmarks.peers import start_deepspeed

RANKS = 2
SCHEDULES = ("one after the other", "sum beside FFN", "both branches")
COLUMNS = (
    *("wire", "tokens", f"{SCHEDULES[0]}, s", "of that waiting"),
    *(f"{name} ÷ it{what}" for name in SCHEDULES[1:] for what in ("", ", waiting")),
)
Row = list[str | float]


class SlowLink:
    """A simulated link between the ranks, which delays every collective that is started after its creation.

    The collectives in flight share the link evenly.
    """

    def __init__(self, megabits: float) -> None:
        self.bytes_per_second = megabits * 1e6 / 8
        self.in_flight: list[DelayedCollective] = []
        self.updated = time.perf_counter()
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
            setattr(dist, name, self.delayed(getattr(dist, name)))

    def delayed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """Return `collective` changed to wait for the link."""

        def call(out: Tensor, sent: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            self.advance()
            crossing = max(out.nbytes, sent.nbytes) / RANKS  # the other part stays on its rank
            work = DelayedCollective(collective(out, sent, *args, async_op=True, **kwargs), self, crossing)
            self.in_flight.append(work)
            return work if async_op else work.wait()

        return call

    def advance(self) -> None:
        """Transfer the bytes for which there was time since the last call, equally many of each collective."""
        now = time.perf_counter()
        transferred, self.updated = (now - self.updated) * self.bytes_per_second, now
        while self.in_flight and transferred > 0:
            part = min(transferred / len(self.in_flight), *(each.left for each in self.in_flight))
            for each in self.in_flight:
                each.left -= part
            transferred -= part * len(self.in_flight)
            self.in_flight = [each for each in self.in_flight if each.left > 0]


class DelayedCollective:
    """A collective of which the link has `left` bytes to transfer."""

    def __init__(self, work: dist.Work, link: SlowLink, left: float) -> None:
        self.work, self.link, self.left = work, link, left

    def wait(self) -> None:
        """Wait for the collective and for the link."""
        self.work.wait()
        self.link.advance()
        while self.left > 0:
            time.sleep(self.left / self.link.bytes_per_second)
            self.link.advance()


def compared(run: Callable[[str], None], timer: CommTimer, rounds: int) -> list[float]:
    """Run all schedules in turns and return medians over the rounds.

    The first two are the seconds of the first schedule and the fraction of them that this rank waited. For each other
    schedule follow its seconds and its wait, over those of the first one. All ranks begin and end a pass together.
    """
    found = []
    for number in range(rounds + 1):
        taken = {}
        for schedule in SCHEDULES if number % 2 else reversed(SCHEDULES):
            dist.barrier()
            start = time.perf_counter()
            run(schedule)
            dist.barrier()
            taken[schedule] = time.perf_counter() - start, timer.pop_seconds()
        wall, wait = taken[SCHEDULES[0]]
        ratios = [part for name in SCHEDULES[1:] for part in (taken[name][0] / wall, taken[name][1] / wait)]
        found.append((wall, wait / wall, *ratios))
    return [statistics.median(column) for column in zip(*found[1:], strict=True)]  # the first warms up


class WithoutOverlap:
    """An exchange that computes and waits at once."""

    def __init__(self, exchange: AttentionExchange) -> None:
        self.exchange = exchange

    def start(self, x: Tensor, gates: Tensor, attend: Attend) -> PendingAttention:
        """See `AttentionExchange.start`."""
        return ComputedAttention(self.exchange.start(x, gates, attend).result())


class SumInFlight:
    """An exchange that computes at once and leaves the sum of the outputs in flight."""

    def __init__(self, exchange: AttentionExchange) -> None:
        self.exchange = exchange

    def start(self, x: Tensor, gates: Tensor, attend: Attend) -> PendingAttention:
        """See `AttentionExchange.start`."""
        return PendingSum(self.exchange.start(x, gates, attend))


class PendingSum(PendingAttention):
    """An attention whose outputs are being summed."""

    def __init__(self, pending: PendingAttention) -> None:
        super().__init__()
        pending.compute()
        self._pending = pending

    def _compute(self) -> None:
        """Do nothing."""

    def _wait(self) -> Tensor:
        return self._pending.wait()


def training_pass(model: BamForCausalLM, ids: Tensor) -> Callable[[str], None]:
    """Return a function that runs a forward and a backward pass in the schedule of a given name."""
    layers: Any = model.model.layers
    exchange = layers[0].self_attn.exchange  # the same for all layers
    exchanges = dict(zip(SCHEDULES, (WithoutOverlap(exchange), SumInFlight(exchange), exchange), strict=True))

    def run(schedule: str) -> None:
        for layer in layers:
            layer.self_attn.exchange = exchanges[schedule]
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    return run


def measure(rank: int, folder: str, rounds: int, megabits: float) -> None:
    """Measure on one of the ranks; rank 0 reports."""
    from bam_ray.on_deepspeed.expert_parallel import apply_expert_parallelism

    warnings.filterwarnings("ignore", r".* is deprecated", FutureWarning)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)  # type: ignore[attr-defined]  # torch marks no re-exports
    start_deepspeed(rank, RANKS, store)
    rows: list[Row] = []
    for wire in ("loopback", f"held to {megabits:g} Mbit/s"):
        if wire != "loopback":
            SlowLink(megabits)
        for batch, length, d in ((4, 64, 256), (4, 64, 512)):
            torch.manual_seed(0)
            config = BamConfig(
                hidden_size=d, intermediate_size=4 * d, num_attention_heads=d // 64, num_hidden_layers=2, vocab_size=512
            )
            model = BamForCausalLM(config).train()
            shards = apply_expert_parallelism(model, RANKS)
            assert shards.ep_group is not None
            torch.manual_seed(rank)
            ids = torch.randint(0, 512, (batch, length))
            found = compared(training_pass(model, ids), shards.ep_group.timer, rounds)
            rows.append([wire, f"{RANKS} x {batch}x{length}, d {d}", *found])
    if rank == 0:
        report("exchange_overlap", COLUMNS, rows)
    dist.barrier()


def main(
    rounds: Annotated[int, typer.Option(help="Passes of each schedule.")] = 20,
    megabits: Annotated[float, typer.Option(help="Megabits per second of the simulated link.")] = 100.0,
) -> None:
    """Measure, print a table and write `benchmarks/results/exchange_overlap.json`."""
    with tempfile.TemporaryDirectory(prefix="bam-benchmark-") as folder:
        start_processes(measure, (folder, rounds, megabits), nprocs=RANKS, start_method="spawn")


if __name__ == "__main__":
    typer.run(main)
