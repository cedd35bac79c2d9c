"""Engines that start from the folder of a mixture, of which each rank reads its own part."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bam_ray.errors import CheckpointError
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Mixing
from bam_ray.training.engine import Engine, EngineSpec
from bam_ray.training.meta_init import model_on_meta
from tests.support.distributed.cases import BY_PREFIX, UNTIED_TABLES, Case, save, train

EVERYTHING = {"noisy_gate": True, "selection_bias": True, "capacity_factor": 0.75}
STARTS = {
    "kv_experts": Case(2),
    "kv_shared, untied": Case(2, config={"attention_experts": "kv_shared", "tie_word_embeddings": False}),
    "averaged, ZeRO-2": Case(2, config={"attention_experts": "averaged"}, zero_stage=2),
    "embedding experts": Case(2, config=BY_PREFIX),
    "embedding experts, untied": Case(2, config=UNTIED_TABLES),
    "not spread": Case(1),
    "not spread, ZeRO-3": Case(1, zero_stage=3),
    "frozen experts, ZeRO-3": Case(1, zero_stage=3, mixing=Mixing(train="routers_and_shared")),
    "biased, sliding": Case(2, config={"attention_bias": True, "mlp_bias": True, "sliding_window": 5}),
}

M_MMAP_THRESHOLD = -3  # of malloc.h


def start_engine(case: Case, folder: Path, whole: bool, **changes: Any) -> Engine:
    """Return an engine for the mixture in `folder`.

    If `whole` is true, each rank reads the whole mixture. `changes` are changes to its configuration.
    """
    settings = case.settings(case.micro)
    if whole:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)
        return deepspeed_engine(EngineSpec(model, settings, case.mixing, case.expert_parallel))
    model = model_on_meta(folder, **changes)
    return deepspeed_engine(EngineSpec(model, settings, case.mixing, case.expert_parallel, folder))


def start_whole_and_partial(folder: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Start every case from `folder`/NAME in both ways, train two steps and save the state below `out`.

    Returns:
        By name, a list of what the engine that read everything and the engine that read its part hold on this rank,
        with the results of their steps.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, case in STARTS.items():
        found[name] = []
        for whole in (True, False):
            engine = start_engine(case, folder / name, whole, **EVERYTHING)
            held = {
                key: (getattr(tensor, "group_name", None), tensor.detach().clone())
                for key, tensor in (*engine.model.named_parameters(), *engine.model.named_buffers())
            }
            save(engine, out / f"{name}, {whole}")
            found[name].append({"held": held, "results": train(engine, 0, 2)})
    return found


def start_with_other_models(folder: Path) -> list[str]:
    """Return the errors for configurations with a parameter of another shape, or one that `folder` does not have."""
    messages = []
    for changes in ({"intermediate_size": 20}, {"attention_bias": True}):
        try:
            start_engine(STARTS["kv_experts"], folder, False, **changes)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


@dataclass
class Peak:
    """The peak of a process's anonymous memory above its start, in bytes.

    Mapped files do not count, as the kernel can evict them.
    """

    bytes: int = 0


def anonymous_bytes() -> int:
    """Return the size of this process's anonymous memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


@contextmanager
def record_peak() -> Iterator[Peak]:
    """Record the peak while the context lasts."""
    start, stop = anonymous_bytes(), threading.Event()
    peak = Peak()

    def watch() -> None:
        while not stop.wait(0.001):
            peak.bytes = max(peak.bytes, anonymous_bytes() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def peak_bytes_of_start(case: Case, tiny: Path, folder: Path, checkpoint: Path | None) -> int:
    """Return this rank's memory peak, in bytes, when it starts from `folder`, or from a `checkpoint` of the mixture.

    A first start from the small mixture `tiny` allocates what a process needs once, mostly code. The experts are
    frozen: otherwise a rank would hold its experts twice, because ZeRO's master weights are copies, and for a moment
    three times.
    """
    frozen = replace(case, mixing=Mixing(losses=case.mixing.losses, train="routers_and_shared"))
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # return freed memory to the system at once
    start_engine(frozen, tiny, whole=False)
    with record_peak() as peak:
        engine = start_engine(frozen, folder, whole=False)
        if checkpoint is not None:
            engine.load(checkpoint)
    if checkpoint is None:
        save(engine, folder / "checkpoint")
    return peak.bytes
