"""A tiny run whose stages are executed in one process, without a cluster."""

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.leases import AttemptNumber, newest_attempt
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import Recipe
from bam_ray.stages.run import run_rank, run_stage
from bam_ray.stages.task_run import TaskRun
from bam_ray.training.engine import EngineFactory, EngineSpec
from bam_ray.training.meta_init import materialize
from bam_ray.training.state import load_weights
from bam_ray.training.torch_engine import TorchEngine

TRAINING = {"tokens": 1280, "batch_tokens": 128, "peak_lr": 0.02, "checkpoint_every": 4}


@dataclass
class RecordingContext:
    """A `StageContext` that records every report and asks the stage to stop at a step."""

    node = "here"

    stop_at: int | None = None
    reports: list[Progress] = field(default_factory=list)

    def report(self, progress: Progress) -> None:
        """Record the progress."""
        self.reports.append(progress)

    def should_stop(self) -> bool:
        """Return True if the last report was of step `stop_at` or a later one."""
        return self.stop_at is not None and bool(self.reports) and self.reports[-1].step >= self.stop_at


def small_recipe(folder: Path, **changes: object) -> Recipe:
    """Return a recipe with the store and two corpora in `folder`, updated with `changes`.

    The corpora are random words of two domains whose words have different letters.
    """
    for domain, letters in (("general", "abcdef"), ("code", "uvwxyz")):
        words = random.Random(domain)
        lines = [
            json.dumps({"text": " ".join("".join(words.choices(letters, k=4)) for _ in range(60))}) for _ in range(40)
        ]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    plain = {
        "name": "small",
        "store": {"uri": str(folder / "store")},
        "data": {
            "domains": {name: {"source": str(folder / f"{name}.jsonl")} for name in ("general", "code")},
            "sequence_length": 32,
            "held_out_fraction": 0.2,
            "tokenizer": {"vocab_size": 300},
        },
        "seed": {
            "scratch": {"hidden_size": 16, "intermediate_size": 24, "layers": 1, "heads": 2, "kv_heads": 2},
            "training": TRAINING,
        },
        "branch": {"domains": ["code"], "training": TRAINING},
        "upcycle": {"mixtures": {"bam": {"method": "bam"}, "btx": {"method": "btx"}}},
        "mix": {"training": TRAINING},
        "evaluate": {"tokens_per_domain": 256},
    }
    return Recipe.model_validate({**plain, **changes})


def one_process_engine(spec: EngineSpec) -> TorchEngine:
    """Return an engine that holds all experts in this process; `spec.expert_parallel` is not used."""
    if spec.weights_folder is None:  # a dense model, whose weights are loaded
        return TorchEngine(spec)
    assert spec.model.device.type == "meta"  # so that ranks that share the experts never hold all of them
    materialize(spec.model)
    load_weights(spec.weights_folder, spec.model)
    return TorchEngine(spec)


def task_run(
    recipe: Recipe, store: BlobStore, kind: ArtifactKind, name: str, context: StageContext | None = None, rank: int = 0
) -> TaskRun:
    """Return the task `kind/name` of `recipe` as it is placed if no fallback is needed, for its next attempt."""
    run = PipelineRun.of(recipe, store)
    newest = newest_attempt(store, run.artifact(kind, name).prefix)
    number = AttemptNumber(1, newest.count + 1 if newest else 1)
    return TaskRun(run.task(kind, name), run, context or RecordingContext(), rank, number)


def run_task(
    recipe: Recipe,
    store: BlobStore,
    kind: ArtifactKind,
    name: str,
    context: StageContext | None = None,
    engine_factory: EngineFactory = one_process_engine,
    suspect: bool = False,
) -> Manifest:
    """Execute the task `kind/name` in this process and return the manifest of its artifact.

    Mixtures are trained with `engine_factory`. If the artifact is `suspect`, its files are checked first.
    """
    run = replace(task_run(recipe, store, kind, name, context), suspect=suspect)
    manifest = run_rank(run, engine_factory) if kind == "mixtures" else run_stage(run)
    assert manifest is not None
    return manifest


def make_artifacts(recipe: Recipe, store: BlobStore, kinds: tuple[str, ...]) -> None:
    """Execute all tasks of `recipe` whose kind is one of `kinds`, in the order of the task graph."""
    for task in task_graph(recipe):
        if task.kind in kinds:
            run_task(recipe, store, task.kind, task.name)


def tensorboard_curves(store: BlobStore, prefix: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) points of every curve that TensorBoard shows for the artifact at `prefix`.

    The event files are copied to `folder`, which must not exist.
    """
    folder.mkdir()
    for key in store.list(f"{prefix}/tensorboard/"):
        store.get_file(key, folder / key.rpartition("/")[2])
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
