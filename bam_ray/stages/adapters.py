"""Adapters: one LoRA per topic on the frozen seed (MoIN).

A task loads the seed once and trains its topics one after another. Each adapter is saved as soon as it is trained, so
that the next attempt after a lost worker trains only those that are missing.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bam_ray.adapters.bundles import AdapterEntry, AdapterIndexFile, write_bundles
from bam_ray.adapters.lora import LoraModel
from bam_ray.adapters.run_adapters import base_identity
from bam_ray.adapters.topics import TOPICS_FILE
from bam_ray.checkpoint.manifest import ArtifactKind, ComputeCost, Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data import Corpus
from bam_ray.errors import Interrupted
from bam_ray.model.loading import load_folder
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import TrainingSettings
from bam_ray.stages.adapter_work import adapter_work
from bam_ray.stages.publish import published_dtype
from bam_ray.stages.task_run import TaskRun
from bam_ray.training.adapter_checkpoints import AdapterCheckpoints
from bam_ray.training.adapter_training import AdapterTrainer
from bam_ray.training.checkpoints import retry_while_unavailable
from bam_ray.training.devices import requested_device
from bam_ray.training.document_mask import mask_documents
from bam_ray.training.engine import EngineSpec
from bam_ray.training.events import CheckpointCommitted, CheckpointRefused, Resumed
from bam_ray.training.flops import forward_flops_per_token
from bam_ray.training.memory import limit_in_bytes
from bam_ray.training.torch_engine import TorchEngine

FLOPS_FACTOR = 2.0  # over those of the forward pass: frozen weights need no gradients of their own


def train_adapters(run: TaskRun) -> Manifest:
    """Train the adapters of the topics of this task, and publish them in bundles."""
    settings = run.recipe.adapters
    assert settings is not None
    corpus = Corpus(run.parent(ArtifactKind.CORPORA, "corpus").fetch())
    topics_folder = run.parent(ArtifactKind.TOPICS, "topics").fetch()
    work = adapter_work(run.task.name, settings, corpus, topic_names(topics_folder), topics_folder)
    mine, training = work.adapters, work.training
    seed = run.parent(ArtifactKind.SEEDS, "seed")
    model = load_folder(seed.fetch(), torch.float32)
    if not corpus.attend_across_documents:
        mask_documents(model, corpus.end_of_text_id)
    lora = LoraModel(model.requires_grad_(False), settings.rank, settings.alpha, settings.targets)
    needs = run.task.needs
    memory_limit, device = limit_in_bytes(needs.memory_gib), requested_device(needs.gpus)
    engine = TorchEngine(EngineSpec(model, training, memory_limit=memory_limit, device=device))
    dtype = published_dtype(TensorReader(run.store, seed.prefix))
    flops = FLOPS_FACTOR * forward_flops_per_token(model.config, corpus.sequence_length) * training.batch_tokens
    with run.attempt() as attempt:
        assert attempt.lease is not None
        saved = AdapterCheckpoints(run.artifact, attempt.lease)
        for name, error in saved.drop_damaged().items():
            attempt.emit(CheckpointRefused(name, error))
        steps = training.steps
        progress = AdapterProgress(run.context, len(mine), training, len(saved.topics))
        attempt.track_steps(lambda: progress.finished * steps)
        attempt.emit(Resumed(progress.finished * steps))
        trainer = AdapterTrainer(lora, engine, work.rows, training)
        for number, name in mine.items():
            if number in saved.topics:
                continue
            trained = trainer.train(name, progress.of_topic(name))
            entry = AdapterEntry(
                name=name,
                tokens=steps * training.batch_tokens,
                losses={"first": trained.nll[0], "last": trained.nll[-1]},
            )
            cost = ComputeCost(flops=flops * steps, device_seconds=trained.seconds, wall_seconds=trained.seconds)
            saved.save(number, lora.weights(name, dtype), entry, cost)
            progress.finish_topic()
            attempt.emit(CheckpointCommitted(progress.finished * steps))
        targets = settings.targets
        index = AdapterIndexFile(
            base=base_identity(seed),
            rank=settings.rank,
            alpha=settings.alpha,
            targets=lora.targets if targets == "all-linear" else tuple(targets),
        )
        return _publish(attempt, saved, index, mine, steps)


def topic_names(folder: Path) -> list[str]:
    """Return the names of the topics in the folder of a topics artifact, in the order of their numbers."""
    return [topic["name"] for topic in json.loads((folder / TOPICS_FILE).read_text())["topics"]]


class AdapterProgress:
    """The progress of a task over all its topics, in steps.

    Args:
        context: Receives the progress, and may ask to stop.
        topics: The number of topics of the task.
        training: The training of each adapter.
        finished: The number of topics whose adapters are saved.
    """

    def __init__(self, context: StageContext, topics: int, training: TrainingSettings, finished: int) -> None:
        self._context, self._training, self._topics = context, training, topics
        self.finished = finished

    def of_topic(self, name: str) -> Callable[[int, float], None]:
        """Return the function that reports the steps of one topic. It raises `Interrupted` if asked to stop."""
        steps, batch_tokens = self._training.steps, self._training.batch_tokens
        started = time.monotonic()

        def on_step(step: int, nll: float) -> None:
            done = self.finished * steps
            speed = step * batch_tokens / max(time.monotonic() - started, 1e-9)
            note = f"{name}, {self.finished} of {self._topics} adapters are finished"
            self._context.report(Progress(done + step, self._topics * steps, nll, round(speed, 1), done, note))
            if self._context.should_stop():
                raise Interrupted(
                    f"stopped with {self.finished} of {self._topics} adapters: run the same command to train the others"
                )

        return on_step

    def finish_topic(self) -> None:
        """Count one more topic whose adapter is saved."""
        self.finished += 1


def _publish(
    run: TaskRun, saved: AdapterCheckpoints, index: AdapterIndexFile, topics: dict[int, str], steps: int
) -> Manifest:
    """Write all adapters of the task to bundles and commit them."""
    assert run.recipe.adapters is not None and run.lease is not None
    numbers = {name: number for number, name in topics.items()}
    entries = [saved.entry(number) for number in topics]
    last = [entry.losses["last"] for entry in entries]
    manifest = Manifest(
        id=run.task.id,
        kind=run.task.kind,
        name=run.task.name,
        parents=run.task.parents,
        settings=run.recipe.adapters.model_dump(mode="json"),
        step=len(topics) * steps,
        tokens=sum(entry.tokens for entry in entries),
        compute=saved.cost(),
        metrics={"loss/nll": statistics.fmean(last)} if last else {},
        facts={"adapters": len(topics)},
        attempt=str(run.lease.number),
    )
    with scratch_folder("adapters") as folder:
        write_bundles(folder, index, entries, lambda name: saved.weights(numbers[name], name, index.scale))
        committed = retry_while_unavailable()(run.artifact.publish, folder, manifest, run.lease)
    saved.clear()
    return committed
