"""The tasks of a recipe, in an order that respects their parents.

    corpora/corpus ─▶ seeds/seed ─▶ branches/<domain> … ─▶ upcycled/<mixture> ─▶ mixtures/<mixture> ─▶ reports/report

Identities are pure functions of the settings that determine an artifact's content and of its parents' identities, so
all are known before anything runs. What only says how or where the work is done (micro batch, how often to write
checkpoints, expert parallelism, what a worker needs) is no part of them: changing it goes on with the same artifacts.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from bam_ray.checkpoint.manifest import ArtifactKind, identity
from bam_ray.pipeline.tasks import Quorum, Task, fewer_workers
from bam_ray.settings import Mixing, MixSettings, MixtureSettings, Needs, Recipe, TrainingSettings

DENSE = "dense"  # the model of the seed and of all branches


def task_graph(recipe: Recipe) -> list[Task]:
    """Every task of `recipe`, parents first."""
    corpus = _task(ArtifactKind.CORPORA, "corpus", recipe.data)
    seed = _task(
        ArtifactKind.SEEDS,
        "seed",
        {
            "scratch": _plain(recipe.seed.scratch),
            "folder": recipe.seed.folder,
            "training": _content(recipe.seed.training),
            "blend": recipe.seed.blend,
        },
        parents=(corpus.id,),
        needs=recipe.seed.needs,
        workers=recipe.seed.workers,
        min_workers=recipe.seed.min_workers,
        sequence_length=recipe.data.sequence_length,
        training=recipe.seed.training,
        model=DENSE,
    )
    branches = [
        _task(
            ArtifactKind.BRANCHES,
            domain,
            {
                "domain": domain,
                "training": _content(recipe.branch.training),
                "general_fraction": recipe.branch.general_fraction,
            },
            parents=(seed.id, corpus.id),
            needs=recipe.branch.needs_of(domain),
            workers=recipe.branch.workers_of(domain),
            min_workers=recipe.branch.min_workers,
            sequence_length=recipe.data.sequence_length,
            training=recipe.branch.training,
            model=DENSE,
            max_attempts=recipe.branch.max_attempts,
        )
        for domain in recipe.branch.domains
    ]
    quorum = _quorum(recipe, branches)
    upcycled = [
        _task(
            ArtifactKind.UPCYCLED,
            name,
            _upcycled_content(recipe, mixture),
            parents=(seed.id, *(branch.id for branch in branches if mixture.has_branches)),
            needs=recipe.upcycle.needs,
            quorum=quorum if mixture.has_branches else None,
        )
        for name, mixture in recipe.upcycle.mixtures.items()
    ]
    mixtures = [
        _task(
            ArtifactKind.MIXTURES,
            start.name,
            {
                "training": _content(recipe.mix.training),
                "balance_sequences": recipe.mix.balance_sequences,
                "blend": recipe.mix.blend,
                "dynamic_blend": _plain(recipe.mix.dynamic_blend),
                **recipe.mix.model_dump(mode="json", include=set(Mixing.model_fields)),
            },
            parents=(start.id, corpus.id),
            needs=recipe.mix.needs,
            workers=recipe.mix.processes,
            min_workers=recipe.mix.min_workers,
            sequence_length=recipe.data.sequence_length,
            mix=recipe.mix,
            training=recipe.mix.training,
            model=f"mixture {start.name}",
            max_attempts=recipe.mix.max_failures + 1,
            at_once=recipe.mix.at_once,
            # It starts with what was upcycled, and absorbs what arrives later
            quorum=replace(start.quorum, at_least=0, deadline=0.0) if start.quorum else None,
        )
        for start in upcycled
    ]
    report = _task(
        ArtifactKind.REPORTS,
        "report",
        {"tokens_per_domain": recipe.evaluate.tokens_per_domain},
        parents=tuple(task.id for task in [corpus, seed, *branches, *mixtures]),
        needs=recipe.evaluate.needs,
        quorum=replace(quorum, at_least=0, deadline=math.inf) if quorum else None,
    )
    return [corpus, seed, *branches, *upcycled, *mixtures, report]


def subset(tasks: Sequence[Task], kinds: Collection[ArtifactKind]) -> list[Task]:
    """The tasks of `kinds` and everything they are made from, in the order of `tasks`."""
    wanted: set[str] = set()
    for task in reversed(tasks):  # children before parents
        if task.kind in kinds or task.id in wanted:
            wanted |= {task.id, *task.parents}
    return [task for task in tasks if task.id in wanted]


def find_task(tasks: Sequence[Task], kind: ArtifactKind, name: str) -> Task:
    """The one task of `kind` called `name`; raises KeyError."""
    for task in tasks:
        if task.kind == kind and task.name == name:
            return task
    raise KeyError(f"{kind}/{name}")


def _task(
    kind: ArtifactKind,
    name: str,
    settings: BaseModel | dict[str, Any],
    *,
    parents: tuple[str, ...] = (),
    needs: Needs | None = None,
    workers: int = 1,
    min_workers: int | None = None,
    sequence_length: int = 1,
    mix: MixSettings | None = None,
    training: TrainingSettings | None = None,
    model: str = "",
    max_attempts: int = 4,
    at_once: int | None = None,
    quorum: Quorum | None = None,
) -> Task:
    """A task whose identity is that of its settings and parents."""
    sequences = training.batch_tokens // sequence_length if training else 0
    alike, expert_parallel = (mix.process_multiple(sequences), mix.expert_parallel) if mix else (sequences, 1)
    return Task(
        kind=kind,
        name=name,
        id=identity(name, settings, parents),
        parents=parents,
        needs=needs or Needs(),
        workers=workers,
        fewer_workers=fewer_workers(workers, min_workers, alike, expert_parallel),
        total_steps=training.steps if training else 0,
        max_attempts=max_attempts,
        at_once=at_once,
        model=model if training else "",
        step_tokens=training.batch_tokens if training else 0,
        quorum=quorum,
    )


def _quorum(recipe: Recipe, branches: Sequence[Task]) -> Quorum | None:
    """With which of `branches` mixtures start; None: with all."""
    when = recipe.upcycle.when
    if when == "all":
        return None
    deadline = when.deadline_hours * 3600.0 if when.deadline_hours else 0.0
    return Quorum(tuple((branch.id, branch.name) for branch in branches), when.at_least, deadline)


def _upcycled_content(recipe: Recipe, mixture: MixtureSettings) -> BaseModel | dict[str, Any]:
    """A mixture of some branches must not be taken for that of all."""
    when = recipe.upcycle.when
    if when == "all" or not mixture.has_branches:
        return mixture
    return {**mixture.model_dump(mode="json"), "when": when.model_dump(mode="json")}


def _plain(settings: BaseModel | None) -> dict[str, Any] | None:
    return settings.model_dump(mode="json") if settings is not None else None


def _content(training: TrainingSettings | None) -> dict[str, Any] | None:
    """The part of training settings that determines the weights."""
    if training is None:
        return None
    how = {"micro_batch_sequences", "recompute", "checkpoint_every", "keep_last", "keep_every", "zero_stage"}
    if training.on_not_finite == "retry":
        how.add("on_not_finite")  # what was trained before there was a choice is not trained anew
    return training.model_dump(mode="json", exclude=how)
