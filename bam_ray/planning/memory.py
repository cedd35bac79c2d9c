"""The memory of each worker of a task, estimated before anything starts, and requested if the recipe states none.

A worker that trains holds weights, gradients and Adam's states in fp32, what a micro batch keeps for the backward pass,
and a copy of its part of the state for the checkpoint that is being written. If no node has room for that, the worker
can do without the copy: checkpoints are then written while training waits. Two requests follow, of which the second is
a fallback of the first. `benchmarks/host_memory.py` compares the estimates with processes that train.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.model_size import PAIR_BUCKETS, WEIGHT_BYTES, ModelSize, control_size, diloco_bytes
from bam_ray.settings import DILOCO, Demand, MixtureSettings, Needs, Recipe, TrainingSettings
from bam_ray.units import GIB, MIB

PROCESS_BYTES = 480 * MIB  # Python with torch, transformers and Ray
GPU_PROCESS_BYTES = 3 * GIB  # the same with CUDA's libraries and page-locked buffers
GROUP_BYTES = 100 * MIB  # DeepSpeed, Ray Train, and the buffers of collectives
TEXT_BYTES = 512 * MIB  # chunks of text that a corpus is made of, and of tensors that are copied
ACTIVATION_FACTOR = 1.5  # autograd also keeps the inputs of norms and rotary embeddings, and transient gradients
AUTO_TOKENS = 1024  # of a micro batch that is fitted to the memory of CPUs: smaller ones compute more slowly
BUCKET_PARAMETERS = 500_000_000  # `reduce_bucket_size` of the DeepSpeed engine
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default of `stage3_max_live_parameters`
BF16_COPY_BYTES = 2  # of each weight that autocast converts; kept for the backward pass
TOPIC_BYTES = 1 * GIB  # the sample that is clustered, its products with all topics, and MiniLM
FIT_TOKENS = 8192  # `upcycling.routers.initialize.BATCH_TOKENS`, which run through a layer at the same time
REQUEST_MARGIN = 1.15  # of a request over the estimate
WORTHWHILE = 0.85  # of the estimate: the most that the second request asks for
REQUEST_STEP = 10  # requests are rounded up to a tenth of a GiB


@dataclass(frozen=True)
class WorkerShare:
    """The part of a model's training that one worker has."""

    workers: int = 1
    expert_parallel: int = 1
    is_group: bool = False  # True: a process group of the DeepSpeed engine
    on_gpu: bool = False


@dataclass(frozen=True)
class WorkerMemory:
    """The memory of one worker in bytes."""

    host_bytes: int
    least_host_bytes: int  # with checkpoints that are written while training waits
    device_bytes: int | None = None  # of its GPU; None if it computes on CPUs


def with_memory_requests(tasks: Sequence[Task], recipe: Recipe, seed: ModelSize | None) -> list[Task]:
    """Return `tasks` with the estimate in every resource request that states no memory.

    Nothing is requested if the size of the seed is not known before the run.
    """
    return [replace(task, needs=_with_estimates(task, recipe, seed)) for task in tasks]


def _with_estimates(task: Task, recipe: Recipe, seed: ModelSize | None) -> Needs:
    first, *others = [
        request for demand in (task.needs, *task.needs.fallback) for request in _requests(task, demand, recipe, seed)
    ]
    return Needs(**dict(first), fallback=tuple(others))


def _requests(task: Task, demand: Demand, recipe: Recipe, seed: ModelSize | None) -> list[Demand]:
    """Return `demand` with its own memory, or once with the estimate and once with the least that suffices."""
    plain = Demand(cpus=demand.cpus, gpus=demand.gpus, memory_gib=demand.memory_gib, labels=demand.labels)
    memory = task_memory(task, recipe, seed, on_gpu=demand.gpus > 0)
    if demand.memory_gib is not None or memory is None:
        return [plain]
    amounts = [_request_gib(memory.host_bytes)]
    if memory.least_host_bytes < WORTHWHILE * memory.host_bytes:
        amounts.append(_request_gib(memory.least_host_bytes))
    return [plain.model_copy(update={"memory_gib": amount}) for amount in amounts]


def _request_gib(estimate: int) -> float:
    return math.ceil(estimate * REQUEST_MARGIN / GIB * REQUEST_STEP) / REQUEST_STEP


def task_memory(task: Task, recipe: Recipe, seed: ModelSize | None, on_gpu: bool) -> WorkerMemory | None:
    """Return the memory of each worker of `task`; None if the size of the seed is not known before the run."""
    process = GPU_PROCESS_BYTES if on_gpu else PROCESS_BYTES
    if task.kind == ArtifactKind.CORPORA or (task.kind == ArtifactKind.SEEDS and not task.total_steps):
        work = TEXT_BYTES + (_corpus_bytes(recipe, seed) if task.kind == ArtifactKind.CORPORA else 0)
        return WorkerMemory(process + work, process + work)
    if task.kind == ArtifactKind.TOPICS and recipe.topics and recipe.topics.embedder != "seed":
        return WorkerMemory(process + TOPIC_BYTES, process + TOPIC_BYTES)
    if seed is None:
        return None
    context = recipe.data.sequence_length
    if task.kind == ArtifactKind.MIXTURES:
        return _mixing_memory(task, recipe, seed, on_gpu)
    if task.kind in (ArtifactKind.UPCYCLED, ArtifactKind.REPORTS, ArtifactKind.EVALUATIONS):
        upcycled = task.kind == ArtifactKind.UPCYCLED
        work = _upcycling_bytes(task, recipe, seed) if upcycled else _evaluation_bytes(recipe, seed)
        work += TOPIC_BYTES if task.kind == ArtifactKind.EVALUATIONS else 0  # of adapters, which embeds text
        return WorkerMemory(process + work, process + work)
    if task.kind == ArtifactKind.ADAPTERS:
        return _adapter_memory(recipe, seed, on_gpu)
    if task.kind == ArtifactKind.TOPICS:
        work = TOPIC_BYTES + seed.parameters * WEIGHT_BYTES
        return WorkerMemory(process + work, process + work)
    training = recipe.seed.training if task.kind == ArtifactKind.SEEDS else recipe.branch.training
    if task.kind == ArtifactKind.CONTROLS:
        training, seed = recipe.controls[task.name], control_size(task.name, recipe, seed)
        if task.name == DILOCO:
            return _diloco_memory(seed, training, context, task.workers, on_gpu)
    assert training is not None
    return training_memory(seed, training, context, WorkerShare(task.workers, 1, task.is_group, on_gpu))


def _adapter_memory(recipe: Recipe, seed: ModelSize, on_gpu: bool) -> WorkerMemory:
    """Return the memory of a worker that trains one adapter at a time on the frozen seed."""
    assert recipe.adapters is not None
    training, context = recipe.adapters.training, recipe.data.sequence_length
    states = seed.weight_bytes + 16 * seed.lora_parameters(recipe.adapters.rank)
    sequences = training.micro_batch_sequences
    least = 1 if sequences == "auto" else sequences
    fitted = max(1, AUTO_TOKENS // context) if sequences == "auto" and not on_gpu else least
    if on_gpu:
        device = states + activation_bytes(seed, training, least * context, 1)
        return WorkerMemory(GPU_PROCESS_BYTES + seed.weight_bytes, GPU_PROCESS_BYTES + seed.weight_bytes, device)
    process = PROCESS_BYTES + states
    return WorkerMemory(
        process + activation_bytes(seed, training, fitted * context, 1),
        process + activation_bytes(seed, training, least * context, 1),
    )


def _diloco_memory(
    size: ModelSize, training: TrainingSettings, context: int, workers: int, on_gpu: bool
) -> WorkerMemory:
    """Return the memory of a worker that trains a whole copy, and gathers all copies while a checkpoint is written."""
    alone = training_memory(size, training, context, WorkerShare(on_gpu=on_gpu))
    gathered = 2 * diloco_bytes(size, workers)
    if alone.device_bytes is not None:
        return replace(alone, device_bytes=alone.device_bytes + gathered)
    return replace(alone, host_bytes=alone.host_bytes + gathered, least_host_bytes=alone.least_host_bytes + gathered)


def training_memory(size: ModelSize, training: TrainingSettings, context: int, share: WorkerShare) -> WorkerMemory:
    """Return the memory of one worker.

    Args:
        size: The model.
        training: The settings of the training. A micro batch that is fitted to the memory counts as one sequence on a
            GPU, and as `AUTO_TOKENS` on CPUs.
        context: The tokens of a sequence.
        share: The part of the worker.
    """
    states = state_bytes(size, training, share)
    sequences = training.micro_batch_sequences
    least = 1 if sequences == "auto" else sequences
    fitted = max(1, AUTO_TOKENS // context) if sequences == "auto" and not share.on_gpu else least
    copy = size.checkpoint_bytes // share.workers if share.is_group else size.checkpoint_bytes
    process = (GPU_PROCESS_BYTES if share.on_gpu else PROCESS_BYTES) + (GROUP_BYTES if share.is_group else 0)
    if share.on_gpu:
        loading = WEIGHT_BYTES * size.local_parameters(share.expert_parallel) + size.count_bytes
        device = states + activation_bytes(size, training, least * context, share.expert_parallel)
        return WorkerMemory(process + max(loading, copy), process + loading, device)
    return WorkerMemory(
        process + states + activation_bytes(size, training, fitted * context, share.expert_parallel) + copy,
        process + states + activation_bytes(size, training, least * context, share.expert_parallel),
    )


def state_bytes(size: ModelSize, training: TrainingSettings, share: WorkerShare) -> int:
    """Return the bytes of weights, gradients, Adam's states, counts and ZeRO's buffers of one worker."""
    local = size.local_parameters(share.expert_parallel)
    if not share.is_group:
        return 16 * local + size.count_bytes
    part = size.parameters // share.workers  # ZeRO partitions parameters over the ranks that hold the same ones
    bucket = 4 * min(BUCKET_PARAMETERS, local)
    optimizer = 16 * part  # master weights, Adam's two states, and their gradient
    live = min(LIVE_PARAMETERS, local)  # whole weights and gradients that stage 3 holds at a time
    whole = {1: 8 * local, 2: 4 * local, 3: 4 * part + 8 * live}  # weights, and with stage 1 their gradients
    return whole[training.zero_stage] + optimizer + bucket + size.count_bytes


def activation_bytes(size: ModelSize, training: TrainingSettings, tokens: int, expert_parallel: int) -> int:
    """Return the bytes that a micro batch of `tokens` keeps for the backward pass, and those of its loss.

    The experts are divided among `expert_parallel` processes.
    """
    value_bytes = 2 if training.precision == "bf16" else 4
    kept = size.hidden * size.layers + size.layer_values if training.recompute else size.layers * size.layer_values
    kept += size.embedding_values
    copies = 0
    if training.precision == "bf16" and not training.recompute:
        table = size.table_parameters // (expert_parallel if size.tables > 1 else 1)
        copies = BF16_COPY_BYTES * (size.local_parameters(expert_parallel) - table)
    return int(ACTIVATION_FACTOR * tokens * value_bytes * kept) + size.head_bytes(tokens, expert_parallel) + copies


def _mixing_memory(task: Task, recipe: Recipe, seed: ModelSize, on_gpu: bool) -> WorkerMemory:
    """Return the maximum memory of a worker that trains a mixture.

    While branches are missing, the experts may be distributed over fewer processes, which then hold more of them.
    Before training, rank 0 holds the whole state if it adds a late branch.
    """
    mix, mixture = recipe.mix, recipe.upcycle.mixtures[task.name]
    training = mix.training.model_copy(update={"micro_batch_sequences": mix.micro_batch(mix.processes)})
    counts = _expert_counts(recipe, mixture)
    sizes = {
        count: seed.mixed(mixture.model_copy(update={"num_experts": count}), count) if count else seed
        for count in counts
    }
    found = [
        training_memory(
            size,
            training,
            recipe.data.sequence_length,
            WorkerShare(mix.processes, gcd(mix.expert_parallel, count) if count else 1, True, on_gpu),
        )
        for count, size in sizes.items()
    ]
    most = max(found, key=lambda memory: (memory.device_bytes or 0, memory.host_bytes))
    if len(counts) == 1:
        return most
    adding = PROCESS_BYTES + GROUP_BYTES + sizes[counts[-1]].checkpoint_bytes
    return replace(
        most,
        host_bytes=max(most.host_bytes, adding),
        least_host_bytes=max(most.least_host_bytes, adding),
    )


def _expert_counts(recipe: Recipe, mixture: MixtureSettings) -> range:
    """Return the possible numbers of experts of a mixture; 0 stands for a model soup, which is dense."""
    if mixture.is_dense:
        return range(1)
    when, experts = recipe.upcycle.when, recipe.experts_of(mixture)
    late = len(recipe.branch.domains) - when.at_least if when != "all" and mixture.has_branches else 0
    return range(experts - late, experts + 1)


def _corpus_bytes(recipe: Recipe, seed: ModelSize | None) -> int:
    """Return the bytes of the counts of all domains, which the corpus task holds until it writes them.

    Domains are discovered before that, in a process that holds what a search for topics holds.
    """
    vocabulary = recipe.data.tokenizer.vocab_size if seed is None else seed.vocabulary
    counts = len(recipe.data.names) * _text_count_bytes(vocabulary)
    return max(counts, TOPIC_BYTES if recipe.data.discover else 0)


def _text_count_bytes(vocabulary: int) -> int:
    """Return the bytes of the counts of one text: int64 for each token and each bucket of pairs."""
    return 8 * (vocabulary + PAIR_BUCKETS)


def _upcycling_bytes(task: Task, recipe: Recipe, seed: ModelSize) -> int:
    """Return the bytes that upcycling holds: chunks of tensors, the counts, and for fitted routers a layer and text."""
    mixture = recipe.upcycle.mixtures[task.name]
    texts = len(recipe.branch.domains) + (1 if mixture.includes_seed else 0)
    size = seed.mixed(mixture, 1 + len(recipe.branch.domains))
    needed = TEXT_BYTES + size.count_bytes
    if mixture.needs_token_counts:
        needed += texts * _text_count_bytes(seed.vocabulary)
        needed += 2 * texts * 8 * seed.vocabulary  # weights of the rows, while they are computed in double precision
    rows = mixture.text_sequences * texts
    if not rows:
        return needed
    hidden_states = 2 * WEIGHT_BYTES * rows * recipe.data.sequence_length * size.hidden
    moments = 8 * 8 * size.hidden**2  # of the inputs of a router, and their factors, in double precision
    layer = WEIGHT_BYTES * size.parameters // size.layers + WEIGHT_BYTES * FIT_TOKENS * size.layer_values
    embedding = WEIGHT_BYTES * (size.table_parameters + FIT_TOKENS * size.embedding_values)
    return needed + hidden_states + moments + max(layer, embedding)


def _evaluation_bytes(recipe: Recipe, seed: ModelSize) -> int:
    """Return the bytes of the largest model that the report is about, and of one batch through it."""
    models = [seed.mixed(mixture, 1 + len(recipe.branch.domains)) for mixture in recipe.upcycle.mixtures.values()]
    models += [control_size(name, recipe, seed) for name in recipe.controls]
    tokens = recipe.evaluate.batch_sequences * recipe.data.sequence_length
    largest = max([seed, *models], key=lambda size: size.weight_bytes)
    layer = WEIGHT_BYTES * tokens * max(size.layer_values for size in [seed, *models])
    head = WEIGHT_BYTES * tokens * largest.embedding_values + largest.head_bytes(tokens)
    return largest.weight_bytes + layer + head
