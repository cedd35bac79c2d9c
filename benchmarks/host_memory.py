"""The memory that `bam plan` states for a worker on CPUs, compared with what training processes really take.

    python -m benchmarks.host_memory

Each case trains a small model for a few steps with checkpoints, and gathers the final weights, in fresh processes. The
result is the peak of resident memory of the largest process over the planner's estimate. A ratio above 1 means that
the estimate is too small.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_ray.planning.memory import WorkerShare, training_memory
from bam_ray.planning.model_size import ModelSize
from bam_ray.settings import BamSettings, RouterSettings, TrainingSettings

TARGET = 0.2  # deviation of the ratio from 1
VOCABULARY, LENGTH, SEQUENCES, STEPS = 8192, 256, 4, 4


ONE, TWO = WorkerShare(), WorkerShare(workers=2, is_group=True)
TWO_WITH_EXPERTS = WorkerShare(workers=2, expert_parallel=2, is_group=True)


@dataclass(frozen=True)
class Case:
    """A model, and the processes that train it."""

    name: str
    width: int
    layers: int
    experts: int = 1
    share: WorkerShare = ONE
    recompute: bool = False
    zero_stage: int = 1
    tables: bool = False  # embedding experts, and a router prior

    @property
    def size(self) -> ModelSize:
        """The model as the planner sees it."""
        dense = ModelSize(
            hidden=self.width,
            ffn=3 * self.width,
            layers=self.layers,
            query=self.width,
            key=self.width,
            vocabulary=VOCABULARY,
            tied=True,
            vectors=2,
        )
        router = RouterSettings(init="zero", prior="bigram" if self.tables else "none")
        settings = BamSettings(method="bam", router=router, embeddings="experts" if self.tables else "averaged")
        return dense.mixed(settings, self.experts) if self.experts > 1 else dense

    @property
    def training(self) -> TrainingSettings:
        """The settings of the training."""
        batch = LENGTH * SEQUENCES * self.share.workers
        return TrainingSettings(
            tokens=STEPS * batch,
            batch_tokens=batch,
            peak_lr=1e-4,
            precision="fp32",
            micro_batch_sequences=SEQUENCES,
            checkpoint_every=2,
            recompute=self.recompute,
            zero_stage=self.zero_stage,  # type: ignore[arg-type]
        )

    @property
    def estimate(self) -> int:
        """The memory of a worker that the planner states, in bytes."""
        return training_memory(self.size, self.training, LENGTH, self.share).host_bytes


CASES = (
    Case("dense, 1 process", 512, 8),
    Case("dense, 1 process, recompute", 512, 8, recompute=True),
    Case("dense, 2 processes", 512, 8, share=TWO),
    Case("dense, 2 processes, ZeRO-3", 512, 8, share=TWO, zero_stage=3),
    Case("4 experts, 2 processes", 320, 6, experts=4, share=TWO_WITH_EXPERTS),
    Case("4 experts, 2 processes, recompute", 320, 6, experts=4, share=TWO_WITH_EXPERTS, recompute=True),
    Case("4 experts with tables, 1 process", 320, 6, experts=4, tables=True),
    Case("4 experts with tables, 2 processes", 320, 6, experts=4, share=TWO_WITH_EXPERTS, tables=True),
)


def train(rank: int, case: Case, port: int, folder: str) -> None:
    """Train a case as one of its processes, and write the peak of this process's memory to `folder`."""
    from benchmarks import host_memory_rank

    host_memory_rank.train(rank, case, port, Path(folder))


def measure(case: Case) -> int:
    """Return the peak of the largest process of a case in bytes."""
    from torch.multiprocessing.spawn import start_processes

    from cluster.processes import free_ports

    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory(prefix="bam-benchmark-") as folder:
        start_processes(train, (case, free_ports(1)[0], folder), nprocs=case.share.workers, start_method="spawn")
        return max(int(path.read_text()) for path in Path(folder).glob("peak-*"))


def main() -> None:
    """Measure, print a table and write `benchmarks/results/host_memory.json`."""
    from bam_ray.units import MIB
    from benchmarks.measure import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="run the cases whose name contains this text")
    options = parser.parse_args()
    rows: list[list[Any]] = []
    for case in CASES:
        if options.case and options.case not in case.name:
            continue
        peak = measure(case)
        rows.append([case.name, case.size.parameters / 1e6, peak / MIB, case.estimate / MIB, peak / case.estimate])
    report("host_memory", ("case", "parameters M", "peak MiB", "estimate MiB", "ratio"), rows)


if __name__ == "__main__":
    main()
