"""The plan of a run: tokens, memory and stored bytes, and with a cluster file also nodes and times."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import SettingsError
from bam_ray.pipeline.graph import subset, task_graph
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.cluster_file import ClusterFile, NodeGroup
from bam_ray.planning.memory import WorkerMemory, task_memory, with_memory_requests
from bam_ray.planning.model_size import WEIGHT_BYTES, ModelSize, control_size, diloco_bytes, seed_size
from bam_ray.planning.simulate import SimulationPace, SimulationResult, simulate
from bam_ray.planning.simulated_launcher import SpeedOf
from bam_ray.scheduling.matching import bound
from bam_ray.scheduling.nodes import NodeFacts, count_fitting, ray_resources, satisfiable_request, selects
from bam_ray.settings import DILOCO, Recipe, TrainingSettings, with_training_seed
from bam_ray.units import format_duration

STEPS_PER_STAGE = 150  # controller steps between events, over the shortest possible time of the longest stage
MAX_RETRY_DELAY = 300.0  # seconds that the simulation may start the next attempt at a task too late
TIMEOUT_FACTOR = 10  # the simulation ends after this many times the shortest possible time of the run
FROZEN_FLOPS = 2 / 3  # of training on a frozen model: its weights need no gradients
TRAINED = tuple(kind for kind in ArtifactKind if kind.trains)


@dataclass(frozen=True)
class PlannedTask:
    """One task of a plan. Bytes are None if the size of the model is not known before the run."""

    task: Task
    tokens: int
    memory: WorkerMemory | None = None  # of each worker, as it would be with the first resource request
    written_bytes: int | None = None  # written to the blob store, including checkpoints that are deleted later
    final_bytes: int | None = None  # in the blob store at the end
    peak_bytes: int | None = None  # in the blob store at the same time, at most
    nodes: tuple[str, ...] = ()  # names of the nodes that the task ran on in the simulation, in order
    starts: float | None = None  # seconds from the start of the run
    ends: float | None = None


@dataclass(frozen=True)
class StageTime:
    """The duration of all trained tasks of one kind in a simulated run that finished them."""

    kind: ArtifactKind
    seconds: float
    least_seconds: float  # lower bound of every schedule on these nodes without preemptions


@dataclass(frozen=True)
class Plan:
    """The plan of a whole run."""

    recipe: Recipe
    rows: tuple[PlannedTask, ...]
    size: ModelSize | None  # of the seed
    cluster: ClusterFile | None = None
    simulated: SimulationResult | None = None
    stages: tuple[StageTime, ...] = ()
    compared: tuple[PlannedTask, ...] = ()  # what `bam compare` makes for all its training seeds; empty without compare

    @property
    def failure(self) -> str | None:
        """The reason in one line why the simulated run did not finish; None if it did, or if none was simulated."""
        run = self.simulated
        if not run or run.outcome == "finished":
            return None
        first = next(
            (f"{row.task.full_name}: {error}" for row in self.rows if (error := run.errors.get(row.task.id))), ""
        )
        if run.outcome == "failed":
            return f"the simulated run fails after {format_duration(run.seconds)}: {first}"
        unfinished = ", ".join(row.task.full_name for row in self.rows if row.ends is None)
        return (
            f"the simulated run has not finished after {format_duration(run.seconds)}, {TIMEOUT_FACTOR} times the "
            f"shortest possible time (unfinished: {unfinished}): write checkpoints more often, request fewer workers, "
            "or use nodes that are preempted less often"
        )


def make_plan(recipe: Recipe, cluster: ClusterFile | None = None, seed: int = 0) -> Plan:
    """Plan a run of `recipe`, and simulate it on `cluster` if there is one. Nothing is started.

    Args:
        recipe: The recipe of the run.
        cluster: The cluster to simulate the run on.
        seed: The seed of the simulated preemptions.

    Raises:
        PlacementError: The cluster can never satisfy the resource request of a task.
        SettingsError: The cluster file gives `tflops`, but the size of the seed is not known before the run.
    """
    size = seed_size(recipe)
    tasks = with_memory_requests(task_graph(recipe), recipe, size)
    rows = tuple(_plan_task(task, recipe, size) for task in tasks)
    compared = _compared_tasks(recipe, size)
    if cluster is None:
        return Plan(recipe, rows, size, compared=compared)
    nodes = [
        NodeFacts(f"{kind}-{number}", f"{kind}-{number}", "", group.resources, group.all_labels)
        for kind, group in cluster.nodes.items()
        for number in range(group.count)
    ]
    for task in tasks:
        satisfiable_request(task, nodes)
    speed_of = _worker_speed(recipe, size)
    by_kind = {kind: [task for task in tasks if task.kind == kind] for kind in TRAINED}
    least = {kind: _least_seconds(by_kind[kind], nodes, cluster, speed_of) for kind in TRAINED}
    checkpoint_every = {
        task.id: training.checkpoint_every for task in tasks if (training := _training_settings(task, recipe))
    }
    step_every = max(1.0, max(least.values()) / STEPS_PER_STAGE)
    overheads = [
        cluster.start_seconds + max(cluster.checkpoint_seconds, _untrained_seconds(task, cluster)) for task in tasks
    ]
    until = TIMEOUT_FACTOR * (sum(least.values()) + sum(overheads))
    pace = SimulationPace(step_every, min(step_every, MAX_RETRY_DELAY), until)
    simulated = simulate(tasks, cluster, speed_of, checkpoint_every, seed, pace)
    stages = []
    for kind in TRAINED:
        ids = [task.id for task in by_kind[kind]]
        if ids and least[kind] and all(map(simulated.committed, ids)):
            start, end = simulated.span(ids)
            stages.append(StageTime(kind, end - start, least[kind]))
    rows = tuple(_with_times(row, simulated) for row in rows)
    return Plan(recipe, rows, size, cluster, simulated, tuple(stages), compared)


def _compared_tasks(recipe: Recipe, size: ModelSize | None) -> tuple[PlannedTask, ...]:
    """Return the tasks of all training seeds of `recipe.compare`, each once; training seeds share the corpus."""
    if recipe.compare is None:
        return ()
    seeded = [with_training_seed(recipe, seed) for seed in recipe.compare.seeds]
    compared = ((task, each) for each in seeded for task in subset(task_graph(each), [ArtifactKind.REPORTS]))
    return tuple({task.id: _plan_task(task, each, size) for task, each in compared}.values())


def _untrained_seconds(task: Task, cluster: ClusterFile) -> float:
    """Return the duration of a task that does not train; 0 for the other tasks."""
    return 0.0 if task.total_steps else cluster.stage_seconds.get(task.kind, 0.0)


def _plan_task(task: Task, recipe: Recipe, seed: ModelSize | None) -> PlannedTask:
    tokens = task.total_steps * task.step_tokens
    memory = task_memory(task, recipe, seed, on_gpu=task.needs.gpus > 0)
    size = _model_size(task, recipe, seed)
    if size is None or (task.kind == "adapters" and not task.total_steps):  # the number of topics is not known
        return PlannedTask(task, tokens, memory)
    training = _training_settings(task, recipe)
    if task.kind == "adapters":
        adapters = _adapter_bytes(task, recipe, size)
        # Each adapter is written when it is trained, and again in a bundle
        return PlannedTask(task, tokens, memory, 2 * adapters, adapters, 2 * adapters)
    if training is None:
        return PlannedTask(task, tokens, memory, size.weight_bytes, size.weight_bytes, size.weight_bytes)
    is_diloco = task.name == DILOCO and task.kind == "controls"
    checkpoint = size.weight_bytes + diloco_bytes(size, task.workers) if is_diloco else size.checkpoint_bytes
    return PlannedTask(task, tokens, memory, *_stored_bytes(training, size.weight_bytes, checkpoint))


def _adapter_bytes(task: Task, recipe: Recipe, seed: ModelSize) -> int:
    """Return the bytes of all adapters of a task, in fp32 and for all linear layers."""
    steps = _adapter_training(task, recipe).steps
    assert recipe.adapters is not None
    return task.total_steps // steps * WEIGHT_BYTES * seed.lora_parameters(recipe.adapters.rank)


def _adapter_training(task: Task, recipe: Recipe) -> TrainingSettings:
    """Return the training of each adapter of a task whose steps are known."""
    settings = recipe.adapters
    assert settings is not None
    if task.name == settings.all_text_task:
        return settings.all_text_training(max(1, task.total_steps // settings.training.steps))
    return settings.training


def _stored_bytes(training: TrainingSettings, weights: int, checkpoint: int) -> tuple[int, int, int]:
    """Return the bytes that training writes, leaves in the store at the end, and has in the store at most.

    Args:
        training: The settings of the checkpoints.
        weights: The bytes of the model.
        checkpoint: The bytes of a checkpoint.
    """
    steps = range(0, training.steps, training.checkpoint_every)
    sizes = [checkpoint if step else weights for step in steps]  # at step 0, Adam has no states yet
    permanent = [
        size if training.keep_every and step % training.keep_every == 0 else 0
        for step, size in zip(steps, sizes, strict=True)
    ]

    def with_newest(count: int) -> int:
        return sum(permanent[:-count]) + sum(sizes[-count:])

    # A new checkpoint is written before the oldest is deleted. The model is written after the last of these deletions.
    peak = max(with_newest(training.keep_last + 1), with_newest(training.keep_last) + weights)
    return sum(sizes) + weights, sum(permanent) + weights, peak


def _with_times(row: PlannedTask, simulated: SimulationResult) -> PlannedTask:
    """Return the task with its nodes and times in the simulated run."""
    attempts = simulated.attempts[row.task.id]
    if not attempts:
        return row
    names = [attempt.node.name for attempt in attempts if attempt.node]
    nodes = tuple(name for number, name in enumerate(names) if number == 0 or name != names[number - 1])
    ends = attempts[-1].ended if simulated.committed(row.task.id) else None
    return replace(row, nodes=nodes, starts=attempts[0].placed, ends=ends)


def _training_settings(task: Task, recipe: Recipe) -> TrainingSettings | None:
    match task.kind:
        case "seeds":
            return recipe.seed.training if recipe.seed.scratch else None
        case "branches":
            return recipe.branch.training
        case "controls":
            return recipe.controls[task.name]
        case "adapters":
            training = _adapter_training(task, recipe)
            return training.model_copy(update={"checkpoint_every": training.steps})  # an adapter, when it is trained
        case "mixtures":
            return recipe.mix_of(task.name).training
        case _:
            return None


def _model_size(task: Task, recipe: Recipe, seed: ModelSize | None) -> ModelSize | None:
    """Return the size of the model that `task` makes; None if it makes none or the size is unknown."""
    if seed is None or task.kind in ("corpora", "topics", "evaluations", "reports"):
        return None
    if task.kind == "controls":
        return control_size(task.name, recipe, seed)
    if task.kind in ("seeds", "branches", "adapters"):
        return seed
    return seed.mixed(recipe.upcycle.mixtures[task.name], 1 + len(recipe.branch.domains))


def _worker_speed(recipe: Recipe, seed: ModelSize | None) -> SpeedOf:
    """Return the function that gives the tokens per second of one worker, by the size of the model that it trains."""
    context = recipe.data.sequence_length

    def speed_of(task: Task, group: NodeGroup) -> float | None:
        if not task.step_tokens:
            return None
        size = _model_size(task, recipe, seed)
        part = FROZEN_FLOPS if task.kind == "adapters" else 1.0
        if group.tokens_per_second is not None:
            ratio = size.training_flops(context) / seed.training_flops(context) if size and seed else 1.0
            return group.tokens_per_second / (part * ratio)
        if size is None:
            raise SettingsError(
                "the cluster file gives tflops, but the size of the seed is not known before the run "
                f"(no config.json in {recipe.seed.folder or recipe.data.tokenizer.folder}): give tokens_per_second"
            )
        assert group.tflops is not None
        return group.tflops * 1e12 / (part * size.training_flops(context))

    return speed_of


def _least_seconds(tasks: Sequence[Task], nodes: Sequence[NodeFacts], cluster: ClusterFile, speed_of: SpeedOf) -> float:
    """Return a lower bound of the time that these tasks take on all nodes that can hold them."""
    trained = [task for task in tasks if task.total_steps]
    if not trained:
        return 0.0
    demands = [satisfiable_request(task, nodes)[0] for task in trained]
    workers = trained[0].workers
    speeds: list[float] = []  # of each worker that fits
    for group in cluster.nodes.values():
        selected = [ray_resources(demand) for demand in demands if selects(demand.labels, group.all_labels)]
        capacities = (count_fitting(wanted, group.resources, len(trained) * workers) for wanted in selected)
        speeds += [speed_of(trained[0], group) or 0.0] * (group.count * max(capacities, default=0))
    speeds.sort(reverse=True)
    # A group is as fast as its slowest worker
    groups = [workers * speeds[slowest] for slowest in range(workers - 1, len(speeds), workers)]
    # A larger model takes longer for a token, by the same factor on all nodes: the work is in tokens of the first model
    some_group = next(iter(cluster.nodes.values()))
    task_speeds = [speed_of(task, some_group) or 1.0 for task in trained]
    factors = [task_speeds[0] / speed for speed in task_speeds]
    tokens = (task.total_steps * task.step_tokens for task in trained)
    return bound([factor * number for factor, number in zip(factors, tokens, strict=True)], groups)
