"""Upcycling over the lower bound (copying the same bytes), and loading everything for comparison: time and peak memory.

    python -m benchmarks.upcycling [--folder DIR] [--models 4] [--runs 3]

Four models of 428 MB (bf16, Llama layout) become one mixture of experts. Every case runs in its own process. Memory is
the peak of RssAnon above its value after the imports; memory maps, which increase RSS, are not counted. The lower bound
is `cat` of all sources to one file, which is flushed to disk like the files of our writer. `mergekit-moe` runs on the
same sources if it is on the PATH; it keeps the seed's attention, so it writes less.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.checkpoint.writing import ModelWriter
from benchmarks.measure import report

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 14, 1024, 3584, 8192
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = CONFIG | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 2, "vocab_size": 64}
MIXTURES = {
    "bam kv_experts": {"method": "bam"},
    "btx": {"method": "btx"},
}


def make_models(folder: Path, count: int, settings: dict[str, Any] = CONFIG) -> list[Path]:
    """Write `count` models with random weights, unless they exist, and return their folders."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from bam_ray.data.tokenizer import train_tokenizer
    from bam_ray.families import FAMILIES

    places = []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    specs = [TensorSpec(name, torch.bfloat16, shapes[name]) for name in FAMILIES["llama"].tensor_names(settings)]
    for number in range(count):
        place = folder / f"model-{number}"
        if not (place / ".made").exists():
            generator = torch.Generator().manual_seed(number)

            def produce(spec: TensorSpec, generator: torch.Generator = generator) -> Iterator[torch.Tensor]:
                yield torch.randn(spec.elements, generator=generator).mul_(0.02)

            writer = ModelWriter(FolderStore(place))
            writer.write_tensors(specs, produce)
            train_tokenizer(iter(["mergekit wants one"]), 300, place)
            writer.commit(json.dumps(settings), Manifest(id=place.name, kind=ArtifactKind.SEEDS, name=place.name))
            (place / "manifest.json").unlink()  # folders from a hub have none, so no digests are compared
            (place / ".made").touch()
        places.append(place)
    return places


def streamed(sources: list[Path], out: Path, mixture: str) -> None:
    """Upcycle with bam_ray."""
    from bam_ray.upcycling import upcycle

    readers = {f"m{number}": TensorReader(FolderStore(place)) for number, place in enumerate(sources)}
    from bam_ray.settings import mixture_settings

    settings = mixture_settings(MIXTURES[mixture] | {"same_seed": False})
    upcycle(readers, settings, ModelWriter(FolderStore(out)), Manifest(id="x", kind=ArtifactKind.UPCYCLED, name="x"))


def load_all(sources: list[Path], out: Path, mixture: str) -> None:
    """Load all models, stack their tensors and save them with safetensors, as a simple script would."""
    from safetensors.torch import load_file, save_file

    models = [load_file(place / "model.safetensors") for place in sources]
    out.mkdir()
    made = {}
    for name in models[0]:
        tensors = [model[name] for model in models]
        stacked = ".mlp." in name or (mixture != "btx" and "_proj" in name)
        mean = torch.stack([each.float() for each in tensors]).mean(0).bfloat16() if not stacked else None
        made[name] = torch.stack(tensors) if mean is None else mean
    save_file(made, out / "model.safetensors")
    with (out / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def anonymous_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak of RssAnon above its start, in bytes, sampled every 2 ms."""

    def now() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

    start = peak = now()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield lambda: max(peak, now()) - start
    stop.set()
    watcher.join()


def child(case: str, mixture: str, sources: list[Path], out: Path) -> None:
    """Run one case in this process and print its time and memory as JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # loads the code that only the first mixture loads
        tiny = make_models(Path(folder), 2, TINY)
        streamed(tiny, Path(folder) / "out", mixture)
    with anonymous_memory() as peak:
        started = time.perf_counter()
        {"streamed": streamed, "load all": load_all}[case](sources, out, mixture)
        print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak()}))


def measured(command: list[str], out: Path) -> dict[str, float]:
    """Run a command that writes to `out`, with a warm page cache.

    Returns the JSON that it prints, or else its wall-clock time.
    """
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - started
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    printed = json.loads(done.stdout.splitlines()[-1]) if done.stdout.startswith("{") else {"seconds": wall, "peak": 0}
    return {**printed, "written": size}


def mergekit(sources: list[Path], folder: Path, out: Path) -> list[str] | None:
    """Return the command of mergekit-moe on the same sources, or None if it is not installed."""
    binary = shutil.which("mergekit-moe")
    if binary is None:
        return None
    experts = [{"source_model": str(place), "positive_prompts": [""]} for place in sources]
    config = folder / "mergekit.json"  # JSON is YAML
    settings = {"base_model": str(sources[0]), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    config.write_text(json.dumps(settings))
    return [binary, str(config), str(out), "--i-understand-this-is-not-useful-without-training"]


def main() -> None:
    """Run all cases in turns, print a table of medians and write `benchmarks/results/upcycling.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bam-upcycling")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sources = make_models(arguments.folder, arguments.models)
    if arguments.child:
        case, mixture, out = arguments.child
        child(case, mixture, sources, Path(out))
        return
    out = arguments.folder / "out"
    files = " ".join(str(place / "model.safetensors") for place in sources)
    ours = [sys.executable, "-m", "benchmarks.upcycling"]
    ours += ["--folder", str(arguments.folder), "--models", str(arguments.models), "--child"]
    cases = {
        "cat of the sources (floor)": ["sh", "-c", f"mkdir {out} && cat {files} > {out}/all && sync {out}/all"],
        "sha256 of the sources": ["sh", "-c", f"mkdir {out} && cat {files} | sha256sum > {out}/digest"],
        **{
            f"{case}: {mixture}": [*ours, case, mixture, str(out)]
            for mixture in MIXTURES
            for case in ("streamed", "load all")
        },
    }
    command = mergekit(sources, arguments.folder, out)
    if command is not None:
        cases["mergekit-moe"] = command
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(arguments.runs):
        for name, command in cases.items():
            runs[name].append(measured(command, out))
    shutil.rmtree(out, ignore_errors=True)
    floor = statistics.median(run["seconds"] for run in runs["cat of the sources (floor)"])
    rows = []
    for name, each in runs.items():
        seconds = statistics.median(run["seconds"] for run in each)
        peak = statistics.median(run["peak"] for run in each)
        rows.append((name, seconds, seconds / floor, peak / (1 << 20), each[0]["written"] / 1e6))
    report("upcycling", ("case", "seconds", "÷ floor", "peak RssAnon MiB", "MB written"), rows)


if __name__ == "__main__":
    main()
