"""The cost of checkpoints: training with them over training without them, with an S3 server on the same machine.

    python -m benchmarks.checkpoint_cost [--device cuda --width 4096]

Two runs train the same dense model on random tokens, in turns. One of them writes a checkpoint of the weights and the
optimizer to SeaweedFS every `--every` steps. The results are medians of the ratios of adjacent segments, for three
times:

wall clock        the time that the target is for
training thread   the CPU time of the training thread, which does not depend on the load of the machine
all threads       the CPU time of all threads, which is the cost if no core is idle; it excludes the server's CPU time

On a machine with other work, the wall clock is unreliable: the result records the range of the pairs and the load. The
CPU times do not include waiting, so they do not prove that the target is met. A recipe's default is a checkpoint every
409,600 tokens.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.settings import TrainingSettings
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.engine import EngineSpec
from bam_ray.training.listener import TrainingListener
from bam_ray.training.loop import Training
from bam_ray.training.torch_engine import TorchEngine
from cluster.processes import Process
from cluster.s3_server import S3Settings, start_s3_server, stop_s3_server

TARGET = 1.03
LENGTH, SEQUENCES = 256, 8
CLOCKS = {"wall clock": time.perf_counter, "training thread": time.thread_time, "all threads": time.process_time}
RESULTS = Path(__file__).parent / "results"


class RandomTokens:
    """A sampler of random tokens, which has no state."""

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` sequences [count, LENGTH] of one domain."""
        return np.random.default_rng(0).integers(0, 8192, (count, LENGTH)), np.ones((count, 1), dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class SegmentShape(NamedTuple):
    """The length of a segment, and the model that is trained."""

    steps: int
    every: int
    width: int
    device: str


def segment(store: BlobStore, name: str, shape: SegmentShape, checkpoints: bool) -> dict[str, float]:
    """Train the steps of a segment, and return their seconds by each clock."""
    steps, every, width, device = shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
    )
    settings = TrainingSettings(
        tokens=steps * LENGTH * SEQUENCES,
        batch_tokens=LENGTH * SEQUENCES,
        peak_lr=1e-4,
        micro_batch_sequences=SEQUENCES,
        checkpoint_every=every if checkpoints else steps + 1,
    )
    engine = TorchEngine(EngineSpec(AutoModelForCausalLM.from_config(config), settings, device=device))
    lease = Lease.take(store, f"branches/{name}", AttemptNumber(1, 1))
    kept = Checkpoints(Artifact(store, ArtifactKind.BRANCHES, name), lease, Retention(2, None))
    training = Training(engine, RandomTokens(), LENGTH, settings, kept, TrainingListener())
    training.train_step()  # allocates and warms up
    before = {name: clock() for name, clock in CLOCKS.items()}
    if checkpoints:
        training.save_checkpoint()  # at the start of a segment, so that its upload runs beside steps as in a long run
    training.run()
    return {name: clock() - before[name] for name, clock in CLOCKS.items()}


@contextmanager
def s3() -> Iterator[BlobStore]:
    """Start an S3 server and yield a store in it."""
    with tempfile.TemporaryDirectory(prefix="bam-benchmark-") as folder:
        process = Process("s3", Path(folder))
        settings = start_s3_server(process, Path(folder) / "data", S3Settings.generate())
        os.environ |= settings.environment()
        try:
            yield open_store("s3://bam/benchmark")
        finally:
            stop_s3_server(process, settings)


def main() -> None:
    """Measure, print a table and write `benchmarks/results/checkpoint_cost.json` (`..._gpu.json`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="steps of a segment")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--width", type=int, default=256, help="hidden size of the model, which has four layers")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    with s3() as store:
        for number in range(options.pairs):
            shape = SegmentShape(options.steps, options.every, options.width, options.device)
            order = (True, False) if number % 2 else (False, True)
            times = {which: segment(store, f"{number}-{which}".lower(), shape, which) for which in order}
            pairs.append((times[True], times[False]))
    rows: dict[str, dict[str, Any]] = {
        clock: {
            "with_s": statistics.median(one[clock] for one, _ in pairs),
            "without_s": statistics.median(other[clock] for _, other in pairs),
            "ratio": statistics.median(one[clock] / other[clock] for one, other in pairs),
            "ratios": [one[clock] / other[clock] for one, other in pairs],
        }
        for clock in CLOCKS
    }
    tokens = options.every * LENGTH * SEQUENCES
    table = Table(title=f"Checkpoint every {tokens:,} tokens to S3, {options.pairs} pairs; target ≤ {TARGET}")
    for heading in ("time", "with, s", "without, s", "ratio", "pairs from", "to"):
        table.add_column(heading, justify="left" if heading == "time" else "right")
    for clock, row in rows.items():
        cells = (row["with_s"], row["without_s"], row["ratio"], min(row["ratios"]), max(row["ratios"]))
        table.add_row(clock, *(f"{cell:.3f}" for cell in cells))
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    result = {
        "benchmark": "checkpoint_cost",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        },
        "options": vars(options),
        "target": TARGET,
        "times": rows,
    }
    name = "checkpoint_cost" + ("_gpu" if options.device == "cuda" else "") + ".json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
