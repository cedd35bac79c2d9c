"""The groups of processes that share a mixture's experts: the bytes that they exchange, and the nodes that hold them.

The tokens of a process travel to the experts of its whole group in every layer, which is more than everything else that
the processes of a mixture send. A group should therefore stay on one node, whose GPUs are connected with each other.
"""

from collections.abc import Mapping, Sequence
from math import gcd

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.cluster_file import NodeGroup
from bam_ray.planning.model_size import ModelSize
from bam_ray.scheduling.nodes import count_fitting, ray_resources, selects
from bam_ray.settings import Recipe, TrainingSettings
from bam_ray.units import format_bytes

Nodes = Mapping[str, NodeGroup]
"""The nodes of a cluster file, by kind."""


def sent_bytes(size: ModelSize, training: TrainingSettings, tokens: int, processes: int, on_gpu: bool) -> int:
    """Return the bytes that a process sends to the others of its group for `tokens` tokens of its own.

    Attention experts get all tokens and return a weighted sum for each; FFN experts get the tokens that chose them. The
    backward pass sends as many. Embedding experts, which are exchanged once for all layers, are left out.

    Args:
        size: The mixture.
        training: The settings of its training.
        tokens: The number of tokens.
        processes: The number of processes in the group.
        on_gpu: True if precision `auto` is bf16.
    """
    is_bf16 = training.precision == "bf16" or (training.precision == "auto" and on_gpu)
    passes = 3 if training.recompute else 2
    to_others = 2 * size.ffn_active * (processes - 1) / processes  # of the hidden states of a token
    if size.attention > 1:
        to_others += 2 * (processes - 1)
    layers = size.layers - size.dense_layers
    return int(passes * layers * tokens * size.hidden * to_others * (2 if is_bf16 else 4))


def straddling_warnings(tasks: Sequence[Task], recipe: Recipe, seed: ModelSize | None, nodes: Nodes) -> list[str]:
    """Return a line for each mixture whose processes that share experts may be on several nodes.

    Ray fills one node after the other, and neighboring processes share experts, so groups stay on one node if their
    size divides the number of processes that the node holds.
    """
    lines = []
    for task in tasks:
        if task.kind != ArtifactKind.MIXTURES:
            continue
        mixture = recipe.upcycle.mixtures[task.name]
        shared = 1 if mixture.is_dense else gcd(recipe.mix.expert_parallel, recipe.experts_of(mixture))
        held = {kind: _processes_on(task, group) for kind, group in nodes.items()}
        kinds = [kind for kind, count in held.items() if 0 < count < task.workers and count % shared]
        if not kinds:
            continue
        sent = ""
        if seed is not None:
            size, training = seed.mixed(mixture, 1 + len(recipe.branch.domains)), recipe.mix_of(task.name).training
            tokens = task.step_tokens // task.workers
            sent = f", and each sends {format_bytes(sent_bytes(size, training, tokens, shared, task.needs.gpus > 0))} "
            sent += "to the others in every step"
        lines.append(
            f"{task.full_name}: the {shared} processes that share experts are on several nodes of {', '.join(kinds)}"
            f"{sent}: let mix.needs select nodes that hold a multiple of {shared} processes, or change "
            "mix.expert_parallel"
        )
    return lines


def _processes_on(task: Task, group: NodeGroup) -> int:
    """Return the number of processes of a task that a node of a group holds; 0 if they may not run there."""
    demands = [demand for demand in (task.needs, *task.needs.fallback) if selects(demand.labels, group.all_labels)]
    return max((count_fitting(ray_resources(each), group.resources, task.workers) for each in demands), default=0)
