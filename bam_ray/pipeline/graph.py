"""The tasks of a recipe, parents first.

    corpora/corpus ─▶ seeds/seed ─▶ branches/<domain> … ─▶ upcycled/<mixture> ─▶ mixtures/<mixture> ─▶ reports/report
        │                 └───────▶ controls/<dense model> … ─────────────────────────────────────────────┘
        └─▶ topics/topics ─▶ adapters/part-<number> … ─▶ evaluations/adapters; the adapters and their evaluation are
             also made from the seed and the corpus, and the topics from the seed if it embeds the text

The id of a task is a pure function of the settings that determine its artifact's content and of its parents' ids, so
all ids are known before anything runs. Settings that only control how or where the work is done (micro batch,
checkpoint interval, expert parallelism, resource requests) are not part of an id: a run continues with the same
artifacts after they change. Each setting states at its field whether it is part of an id (`settings.Identity`).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from bam_ray.checkpoint.manifest import ArtifactKind, identity
from bam_ray.pipeline.tasks import BranchQuorum, Task, fewer_workers
from bam_ray.settings import DILOCO, MixtureSettings, Needs, Recipe, TopicsSettings, TrainingSettings

DENSE = "dense"  # `Task.model` of the seed, the branches and the controls without a prior


def task_graph(recipe: Recipe) -> list[Task]:
    """Return every task of `recipe`, parents first."""
    corpus = _corpus_task(recipe)
    seed = _seed_task(recipe, corpus)
    branches = [_branch_task(recipe, domain, seed, corpus) for domain in recipe.branch.domains]
    controls = [_control_task(recipe, name, seed, corpus) for name in recipe.controls]
    topics = [_topics_task(recipe.topics, seed, corpus)] if recipe.topics else []
    upcycled = [_upcycled_task(recipe, name, seed, branches) for name in recipe.upcycle.mixtures]
    mixtures = [_mixture_task(recipe, start, corpus) for start in upcycled]
    adapters = _adapter_tasks(recipe, seed, corpus, topics)
    evaluations = [_adapter_evaluation_task(recipe, [seed, corpus, *topics, *adapters])] if adapters else []
    report = _report_task(recipe, [corpus, seed, *branches, *controls, *mixtures], branches)
    return [corpus, seed, *branches, *controls, *topics, *adapters, *evaluations, *upcycled, *mixtures, report]


def subset(tasks: Sequence[Task], kinds: Collection[ArtifactKind]) -> list[Task]:
    """Return the tasks of `kinds` and all tasks that they are made from, in the order of `tasks`."""
    wanted: set[str] = set()
    for task in reversed(tasks):  # children before parents
        if task.kind in kinds or task.id in wanted:
            wanted |= {task.id, *task.parents}
    return [task for task in tasks if task.id in wanted]


def find_task(tasks: Sequence[Task], kind: ArtifactKind, name: str) -> Task:
    """Return the task of `kind` with `name`; raise `KeyError` if there is none."""
    for task in tasks:
        if task.kind == kind and task.name == name:
            return task
    raise KeyError(f"{kind}/{name}")


def _corpus_task(recipe: Recipe) -> Task:
    id = identity("corpus", recipe.data.identity())
    return Task(ArtifactKind.CORPORA, "corpus", id, parents=(), needs=Needs())


def _seed_task(recipe: Recipe, corpus: Task) -> Task:
    seed = recipe.seed
    parents = (corpus.id,)
    return _with_training(
        Task(ArtifactKind.SEEDS, "seed", identity("seed", seed.identity(), parents), parents, seed.needs, seed.workers),
        seed.training,
        seed.min_workers,
        recipe.data.sequence_length,
    )


def _branch_task(recipe: Recipe, domain: str, seed: Task, corpus: Task) -> Task:
    branch = recipe.branch
    content = {"domain": domain, **branch.identity()}
    parents = (seed.id, corpus.id)
    task = Task(
        ArtifactKind.BRANCHES,
        domain,
        identity(domain, content, parents),
        parents,
        branch.needs_of(domain),
        branch.workers_of(domain),
        max_attempts=branch.max_attempts,
    )
    return _with_training(task, branch.training, branch.min_workers, recipe.data.sequence_length)


def _control_task(recipe: Recipe, name: str, seed: Task, corpus: Task) -> Task:
    compare, training = recipe.compare, recipe.controls[name]
    assert compare is not None
    content: dict[str, Any] = {"blend": recipe.mix.blend, "training": training.identity()}
    form, diloco = compare.prior_controls.get(name), compare.diloco if name == DILOCO else None
    if form is not None:
        content["prior"] = form
    if diloco is not None:
        content["diloco"] = diloco.identity()
    parents = (seed.id, corpus.id)
    task = Task(
        ArtifactKind.CONTROLS,
        name,
        identity(name, content, parents),
        parents,
        compare.needs,
        diloco.workers if diloco else compare.workers,
        max_attempts=compare.max_attempts,
        gives_way=True,
    )
    least = None if diloco else compare.min_workers
    task = _with_training(task, training, least, recipe.data.sequence_length)
    return replace(task, model=name) if form else task


def _topics_task(topics: TopicsSettings, seed: Task, corpus: Task) -> Task:
    parents = (seed.id, corpus.id) if topics.embedder == "seed" else (corpus.id,)
    id = identity("topics", topics.identity(), parents)
    return Task(ArtifactKind.TOPICS, "topics", id, parents, topics.needs)


def _adapter_tasks(recipe: Recipe, seed: Task, corpus: Task, topics: Sequence[Task]) -> list[Task]:
    """Return the tasks of the adapters. Their number is a setting, so they are known before the topics are."""
    settings = recipe.adapters
    if settings is None or recipe.topics is None:
        return []
    parents, count = (seed.id, corpus.id, *(task.id for task in topics)), recipe.topics.count
    # Small topics are left out, so the steps are an upper bound; without a number of topics they are not known
    known = 0 if count == "auto" else count
    steps: dict[str, int] = {}
    for names in (settings.task_names, settings.random_tasks):
        for number, name in enumerate(names):
            steps[name] = len(settings.topics_of(number, known)) * settings.training.steps
    if settings.all_text_task is not None:
        steps[settings.all_text_task] = known * settings.training.steps
    return [
        Task(
            ArtifactKind.ADAPTERS,
            name,
            identity(name, settings.identity(), parents),
            parents,
            settings.needs,
            total_steps=own,
            max_attempts=settings.max_attempts,
            model="adapters",
            step_tokens=settings.training.batch_tokens if own else 0,
            gives_way=name in settings.random_tasks,  # that of all text has no checkpoints to continue from
        )
        for name, own in steps.items()
    ]


def _adapter_evaluation_task(recipe: Recipe, evaluated: Sequence[Task]) -> Task:
    assert recipe.adapters is not None
    parents = tuple(task.id for task in evaluated)
    content = {"held_out_tokens": recipe.adapters.held_out_tokens, "dtype": recipe.evaluate.dtype}
    id = identity("adapters", content, parents)
    return Task(ArtifactKind.EVALUATIONS, "adapters", id, parents, recipe.evaluate.needs)


def _upcycled_task(recipe: Recipe, name: str, seed: Task, branches: Sequence[Task]) -> Task:
    mixture = recipe.upcycle.mixtures[name]
    made_from = branches if mixture.has_branches else []
    parents = (seed.id, *(branch.id for branch in made_from))
    return Task(
        ArtifactKind.UPCYCLED,
        name,
        identity(name, _upcycled_content(recipe, mixture), parents),
        parents,
        recipe.upcycle.needs,
        # A dense average has no experts that a late branch could be added to, so it waits for all branches
        quorum=_quorum(recipe, branches) if mixture.has_branch_experts else None,
    )


def _mixture_task(recipe: Recipe, start: Task, corpus: Task) -> Task:
    mix, sequence_length = recipe.mix_of(start.name), recipe.data.sequence_length
    content = {"balance_sequences": mix.balance_sequences, **mix.identity()}
    parents = (start.id, corpus.id)
    shared = mix.process_multiple(mix.training.batch_tokens // sequence_length)
    return Task(
        ArtifactKind.MIXTURES,
        start.name,
        identity(start.name, content, parents),
        parents,
        mix.needs,
        mix.processes,
        fewer_workers(mix.processes, mix.min_workers, shared, mix.expert_parallel),
        mix.training.steps,
        mix.max_failures + 1,
        at_once=mix.at_once,
        model=f"mixture {start.name}",
        step_tokens=mix.training.batch_tokens,
        # The upcycled model has waited for the quorum; the mixture starts with it and absorbs late branches
        quorum=replace(start.quorum, at_least=0, deadline=0.0) if start.quorum else None,
    )


def _report_task(recipe: Recipe, evaluated: Sequence[Task], branches: Sequence[Task]) -> Task:
    parents = tuple(task.id for task in evaluated)
    quorum, tasks = _quorum(recipe, branches), recipe.evaluate.lm_eval_tasks
    content = {**recipe.evaluate.identity(), **({} if tasks is None else {"lm_eval_tasks": tasks})}
    return Task(
        ArtifactKind.REPORTS,
        "report",
        identity("report", content, parents),
        parents,
        recipe.evaluate.needs,
        quorum=replace(quorum, at_least=0, deadline=math.inf) if quorum else None,
    )


def _with_training(task: Task, training: TrainingSettings | None, least: int | None, sequence_length: int) -> Task:
    """Return a dense task with its steps and the acceptable numbers of workers; a copied seed has no training."""
    if training is None:
        return task
    sequences = training.batch_tokens // sequence_length
    return replace(
        task,
        fewer_workers=fewer_workers(task.workers, least, sequences),
        total_steps=training.steps,
        model=DENSE,
        step_tokens=training.batch_tokens,
    )


def _quorum(recipe: Recipe, branches: Sequence[Task]) -> BranchQuorum | None:
    """Return which of `branches` the mixtures can start without; None if they start with all."""
    when = recipe.upcycle.when
    if when == "all":
        return None
    deadline = when.deadline_hours * 3600.0 if when.deadline_hours else 0.0
    return BranchQuorum(tuple((branch.id, branch.name) for branch in branches), when.at_least, deadline)


def _upcycled_content(recipe: Recipe, mixture: MixtureSettings) -> dict[str, Any]:
    """Return the settings that determine an upcycled model; with a quorum they include the quorum."""
    when = recipe.upcycle.when
    if when == "all" or not mixture.has_branch_experts:
        return mixture.identity()
    return {**mixture.identity(), "when": when.identity()}
