"""The memory of each worker of a task, estimated from the size of its model before anything starts.

A worker that trains holds weights, gradients and Adam's states in fp32, what a micro batch keeps for the backward pass,
and on rank 0 a copy of the whole state for each checkpoint that is being written. `benchmarks/host_memory.py` compares
the estimates with processes that train.
"""

from dataclasses import dataclass

from bam_ray.planning.model_size import CHECKPOINT_BYTES, WEIGHT_BYTES, ModelSize
from bam_ray.settings import TrainingSettings
from bam_ray.units import GIB, MIB

PROCESS_BYTES = 450 * MIB  # Python with torch, transformers and Ray
GPU_PROCESS_BYTES = 3 * GIB  # the same with CUDA's libraries and page-locked buffers
GROUP_BYTES = 150 * MIB  # DeepSpeed, Ray Train, and the buffers of collectives
ACTIVATION_FACTOR = (
    1.5  # what autograd keeps beside the inputs of the matrix products: norms, rotary, transient gradients
)
BUCKET_PARAMETERS = 500_000_000  # `reduce_bucket_size` of the DeepSpeed engine
BF16_COPY_BYTES = 2  # of each weight that autocast converts; kept for the backward pass


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
    device_bytes: int | None = None  # of its GPU; None if it computes on CPUs


def training_memory(size: ModelSize, training: TrainingSettings, context: int, share: WorkerShare) -> WorkerMemory:
    """Return the memory of the worker that needs most, rank 0, which also writes the checkpoints.

    Args:
        size: The model.
        training: The settings of the training. A micro batch that is fitted to the memory counts as one sequence.
        context: The tokens of a sequence.
        share: The part of the worker.
    """
    compute = state_bytes(size, training, share) + activation_bytes(size, training, context)
    checkpoint = CHECKPOINT_BYTES * size.parameters
    process = GROUP_BYTES if share.is_group else 0
    if share.on_gpu:
        loading = WEIGHT_BYTES * size.parameters
        return WorkerMemory(GPU_PROCESS_BYTES + process + max(loading, checkpoint), compute)
    return WorkerMemory(PROCESS_BYTES + process + compute + checkpoint)


def state_bytes(size: ModelSize, training: TrainingSettings, share: WorkerShare) -> int:
    """Return the bytes of weights, gradients, Adam's states and ZeRO's buffers of one worker."""
    local = size.shared_parameters + size.expert_parameters // share.expert_parallel
    if not share.is_group:
        return 16 * local
    part = size.parameters // share.workers  # of what ZeRO partitions over the ranks that hold the same parameters
    bucket = 4 * min(BUCKET_PARAMETERS, local)
    optimizer = 16 * part  # master weights, Adam's two states, and their gradient
    if training.zero_stage == 1:
        return 8 * local + optimizer + bucket
    if training.zero_stage == 2:
        return 4 * local + optimizer + bucket
    return 4 * part + optimizer + bucket


def activation_bytes(size: ModelSize, training: TrainingSettings, context: int) -> int:
    """Return the bytes that a micro batch keeps for the backward pass, with the largest that its head holds."""
    sequences = 1 if training.micro_batch_sequences == "auto" else training.micro_batch_sequences
    tokens = sequences * context
    value_bytes = 2 if training.precision == "bf16" else 4
    kept = size.hidden * size.layers + size.layer_values if training.recompute else size.layers * size.layer_values
    copies = 0
    if training.precision == "bf16" and not training.recompute:
        copies = BF16_COPY_BYTES * (size.parameters - size.vocabulary * size.hidden)
    return int(ACTIVATION_FACTOR * tokens * value_bytes * kept) + size.head_bytes(tokens) + copies
