"""How ranks begin, in the tests of what that takes: with the folder of a mixture, of which each reads its part."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rank_scenarios import Case, save, train
from transformers import AutoModelForCausalLM

from bam_ray.errors import CheckpointError
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Mixing
from bam_ray.training.engine import Engine
from bam_ray.training.meta_init import outline

EVERYTHING = {"noisy_gate": True, "selection_bias": True, "capacity_factor": 0.75}
STARTS = {
    "kv_experts": Case(2),
    "kv_shared, untied": Case(2, config={"attention_experts": "kv_shared", "tie_word_embeddings": False}),
    "averaged, ZeRO-2": Case(2, config={"attention_experts": "averaged"}, zero_stage=2),
    "not spread": Case(1),
    "not spread, ZeRO-3": Case(1, zero_stage=3),
    "frozen experts, ZeRO-3": Case(1, zero_stage=3, mixing=Mixing(train="routers_and_shared")),
    "biased, sliding": Case(2, config={"attention_bias": True, "mlp_bias": True, "sliding_window": 5}),
}

M_MMAP_THRESHOLD = -3  # of malloc.h


def begin(case: Case, folder: Path, whole: bool, **changes: Any) -> Engine:
    """An engine on the mixture in `folder`; `whole`: each rank reads all of it."""
    settings = case.settings(case.micro)
    if whole:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)
        return deepspeed_engine(model, settings, case.mixing, case.expert_parallel)
    return deepspeed_engine(outline(folder, **changes), settings, case.mixing, case.expert_parallel, folder)


def begin_both_ways(folder: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Every start of `folder`/its name, whole and not -> what each holds on this rank, and its losses.

    Its state goes to `out`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, case in STARTS.items():
        found[name] = []
        for whole in (True, False):
            engine = begin(case, folder / name, whole, **EVERYTHING)
            held = {
                key: (getattr(tensor, "group_name", None), tensor.detach().clone())
                for key, tensor in (*engine.model.named_parameters(), *engine.model.named_buffers())
            }
            save(engine, out / f"{name}, {whole}")
            found[name].append({"held": held, "results": train(engine, 0, 2)})
    return found


def begin_with_other_models(folder: Path) -> list[str]:
    """What is said where the configuration has a parameter of another shape, or one more, than the folder."""
    said = []
    for changes in ({"intermediate_size": 20}, {"attention_bias": True}):
        try:
            begin(STARTS["kv_experts"], folder, False, **changes)
        except CheckpointError as error:
            said.append(str(error))
    return said


@dataclass
class Peak:
    """Of a process's own memory above what it had before, in bytes (file maps, which are dropped at need, are not)."""

    bytes: int = 0


def anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


@contextmanager
def watched() -> Iterator[Peak]:
    """The peak while this lasts."""
    start, stop = anonymous(), threading.Event()
    peak = Peak()

    def watch() -> None:
        while not stop.wait(0.001):
            peak.bytes = max(peak.bytes, anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def peak_of_a_start(case: Case, tiny: Path, folder: Path, checkpoint: Path | None) -> int:
    """A start on the mixture in `folder`, at step 0 or at a `checkpoint` of it -> its peak, on this rank.

    What only the first start of a process needs (code, mostly) is there from one on the mixture `tiny`. Experts are
    frozen: else a rank has its own twice, ZeRO's masters being copies, and for a moment thrice.
    """
    frozen = replace(case, mixing=Mixing(losses=case.mixing.losses, train="routers_and_shared"))
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed is the system's again, not kept for later
    begin(frozen, tiny, whole=False)
    with watched() as peak:
        engine = begin(frozen, folder, whole=False)
        if checkpoint is not None:
            engine.load(checkpoint)
    if checkpoint is None:
        save(engine, folder / "checkpoint")
    return peak.bytes
