"""What a run would be, before anything starts: tokens, memory, bytes, and with a cluster file where and how long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import SettingsError
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.cluster_file import ClusterFile, NodeGroup
from bam_ray.planning.model_size import CHECKPOINT_BYTES, WEIGHT_BYTES, ModelSize, seed_size
from bam_ray.planning.simulate import SimulationResult, SpeedOf, simulate
from bam_ray.scheduling.matching import bound
from bam_ray.scheduling.nodes import NodeFacts, satisfiable_request, count_fitting, ray_resources, selects
from bam_ray.settings import MixtureSettings, Recipe, TrainingSettings
from bam_ray.units import format_duration

LOOKS = 150  # of the simulated controller between events, over the time that the longest stage takes at best
LATE = 300.0  # seconds that a task without a node waits longer than it must, at most
TOO_LONG = 10  # times as long as the run takes at best, and the simulation is given up
TRAINED = tuple(kind for kind in ArtifactKind if kind.trains)


@dataclass(frozen=True)
class PlannedTask:
    """One task. Bytes are None where the model's size is not known before the run."""

    task: Task
    tokens: int
    memory: int | None = None  # of each worker
    written: int | None = None  # to the blob store, with checkpoints that are deleted again
    kept: int | None = None  # there in the end
    most: int | None = None  # there at once
    nodes: tuple[str, ...] = ()  # that worked on it, in a simulated run
    begins: float | None = None  # seconds from the begin of the run
    ends: float | None = None


@dataclass(frozen=True)
class Stage:
    """The trained tasks of one kind, in a simulated run that finished them."""

    kind: ArtifactKind
    seconds: float
    at_best: float  # no schedule could be faster on these nodes, were none of them taken away


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    recipe: Recipe
    rows: tuple[PlannedTask, ...]
    size: ModelSize | None
    cluster: ClusterFile | None = None
    simulated: SimulationResult | None = None
    stages: tuple[Stage, ...] = ()

    @property
    def failure(self) -> str | None:
        """Why the simulated run did not finish, in one line; None where it did, or none was simulated."""
        run = self.simulated
        if not run or run.outcome == "finished":
            return None
        first = next(
            (f"{row.task.full_name}: {error}" for row in self.rows if (error := run.errors.get(row.task.id))), ""
        )
        if run.outcome == "failed":
            return f"the simulated run fails after {format_duration(run.seconds)}: {first}"
        open_still = ", ".join(row.task.full_name for row in self.rows if row.ends is None)
        return (
            f"the simulated run has not finished after {format_duration(run.seconds)}, {TOO_LONG} times as long "
            f"as it takes at best, without {open_still}: write checkpoints more often, "
            f"ask for fewer workers or for steadier nodes"
        )


def make_plan(recipe: Recipe, cluster: ClusterFile | None = None, seed: int = 0) -> Plan:
    """Plan `recipe`, simulating it on `cluster` where one is given. Starts nothing.

    Raises `PlacementError` where the cluster can never hold a task, `SettingsError` where its speeds cannot be told.
    """
    tasks = task_graph(recipe)
    size = seed_size(recipe)
    rows = tuple(_planned(task, recipe, size) for task in tasks)
    if cluster is None:
        return Plan(recipe, rows, size)
    nodes = [
        NodeFacts(f"{kind}-{number}", f"{kind}-{number}", "", group.resources, group.all_labels)
        for kind, group in cluster.nodes.items()
        for number in range(group.count)
    ]
    for task in tasks:
        satisfiable_request(task, nodes)
    speed_of = _speeds(recipe, size)
    of_kind = {kind: [task for task in tasks if task.kind == kind] for kind in TRAINED}
    at_best = {kind: _at_best(of_kind[kind], nodes, cluster, speed_of) for kind in TRAINED}
    every = {task.id: training.checkpoint_every for task in tasks if (training := _training(task, recipe))}
    look = max(1.0, max(at_best.values()) / LOOKS)
    aside = [cluster.start_seconds + max(cluster.checkpoint_seconds, _untrained(task, cluster)) for task in tasks]
    until = TOO_LONG * (sum(at_best.values()) + sum(aside))
    simulated = simulate(tasks, cluster, speed_of, every, seed, look, min(look, LATE), until)
    stages = []
    for kind in TRAINED:
        ids = [task.id for task in of_kind[kind]]
        if ids and at_best[kind] and all(map(simulated.committed, ids)):
            begin, end = simulated.span(ids)
            stages.append(Stage(kind, end - begin, at_best[kind]))
    return Plan(recipe, tuple(_timed(row, simulated) for row in rows), size, cluster, simulated, tuple(stages))


def _untrained(task: Task, cluster: ClusterFile) -> float:
    """Seconds of a stage that does not train."""
    return 0.0 if task.total_steps else cluster.stage_seconds.get(task.kind, 0.0)


def _planned(task: Task, recipe: Recipe, seed: ModelSize | None) -> PlannedTask:
    tokens = task.total_steps * task.step_tokens
    size = _size(task, recipe, seed)
    if size is None:
        return PlannedTask(task, tokens)
    weights = WEIGHT_BYTES * size.parameters
    training = _training(task, recipe)
    if training is None:
        return PlannedTask(task, tokens, None, weights, weights, weights)
    if task.kind == "mixtures":
        assert seed is not None
        memory = _mixing_bytes(recipe, recipe.upcycle.mixtures[task.name], seed, size.experts)
    else:
        memory = size.training_bytes(training, recipe.data.sequence_length)
    return PlannedTask(task, tokens, memory, *_stored(training, weights, CHECKPOINT_BYTES * size.parameters))


def _stored(training: TrainingSettings, weights: int, checkpoint: int) -> tuple[int, int, int]:
    """Bytes written, kept in the end, and there at most, of a model of `weights` bytes and its checkpoints."""
    steps = range(0, training.steps, training.checkpoint_every)
    sizes = [checkpoint if step else weights for step in steps]  # Adam has no states yet at the start
    for_good = [
        size if training.keep_every and step % training.keep_every == 0 else 0
        for step, size in zip(steps, sizes, strict=True)
    ]

    def with_newest(count: int) -> int:
        return sum(for_good[:-count]) + sum(sizes[-count:])

    # One more than the recipe keeps is there before the oldest is deleted; the model itself comes when they are fewer
    most = max(with_newest(training.keep_last + 1), with_newest(training.keep_last) + weights)
    return sum(sizes) + weights, sum(for_good) + weights, most


def _mixing_bytes(recipe: Recipe, mixture: MixtureSettings, seed: ModelSize, experts: int) -> int:
    """Memory of each worker that trains a mixture, at most: while branches are missing, fewer may share the experts."""
    when, processes = recipe.upcycle.when, recipe.mix.processes
    training = recipe.mix.training.model_copy(update={"micro_batch_sequences": recipe.mix.micro_batch(processes)})
    late = len(recipe.branch.domains) - when.at_least if when != "all" and mixture.has_branches else 0
    needs = []
    for count in range(experts - late, experts + 1):
        size = seed.mixed(mixture.model_copy(update={"num_experts": count}), count)
        sharing = gcd(recipe.mix.expert_parallel, count)
        needs.append(size.training_bytes(training, recipe.data.sequence_length, sharing))
    return max(needs)


def _timed(row: PlannedTask, simulated: SimulationResult) -> PlannedTask:
    attempts = simulated.attempts[row.task.id]
    if not attempts:
        return row
    names = [ended.node.name for ended in attempts if ended.node]
    nodes = tuple(name for number, name in enumerate(names) if number == 0 or name != names[number - 1])
    ends = attempts[-1].ended if simulated.committed(row.task.id) else None
    return replace(row, nodes=nodes, begins=attempts[0].placed, ends=ends)


def _training(task: Task, recipe: Recipe) -> TrainingSettings | None:
    match task.kind:
        case "seeds":
            return recipe.seed.training if recipe.seed.scratch else None
        case "branches":
            return recipe.branch.training
        case "mixtures":
            return recipe.mix.training
        case _:
            return None


def _size(task: Task, recipe: Recipe, seed: ModelSize | None) -> ModelSize | None:
    """The model that `task` makes."""
    if seed is None or task.kind in ("corpora", "reports"):
        return None
    if task.kind in ("seeds", "branches"):
        return seed
    return seed.mixed(recipe.upcycle.mixtures[task.name], 1 + len(recipe.branch.domains))


def _speeds(recipe: Recipe, seed: ModelSize | None) -> SpeedOf:
    """Tokens a second of one worker, by the size of what it trains."""
    context = recipe.data.sequence_length

    def speed_of(task: Task, group: NodeGroup) -> float | None:
        if not task.step_tokens:
            return None
        size = _size(task, recipe, seed)
        if group.tokens_per_second is not None:
            larger = size.training_flops(context) / seed.training_flops(context) if size and seed else 1.0
            return group.tokens_per_second / larger
        if size is None:
            raise SettingsError(
                "the cluster file gives tflops, but how large the seed is cannot be known before the run "
                f"(no config.json in {recipe.seed.folder or recipe.data.tokenizer.folder}): give tokens_per_second"
            )
        assert group.tflops is not None
        return group.tflops * 1e12 / size.training_flops(context)

    return speed_of


def _at_best(tasks: Sequence[Task], nodes: Sequence[NodeFacts], cluster: ClusterFile, speed_of: SpeedOf) -> float:
    """Seconds that these tasks take at the least, on all nodes that can hold them."""
    trained = [task for task in tasks if task.total_steps]
    if not trained:
        return 0.0
    demands = [satisfiable_request(task, nodes)[0] for task in trained]
    slots: list[float] = []
    for group in cluster.nodes.values():
        fitting = [ray_resources(demand) for demand in demands if selects(demand.labels, group.all_labels)]
        rooms = max(
            (count_fitting(wanted, group.resources, len(trained) * trained[0].workers) for wanted in fitting), default=0
        )
        slots += [speed_of(trained[0], group) or 0.0] * (group.count * rooms)
    slots.sort(reverse=True)
    workers = trained[0].workers
    groups = [sum(slots[first : first + workers]) for first in range(0, len(slots) - workers + 1, workers)]
    return bound([task.total_steps * task.step_tokens for task in trained], groups)
