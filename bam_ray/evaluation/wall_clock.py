"""The time that a model takes on a number of nodes, computed from measured speeds, and what a dense model does in it.

All speeds are tokens per second of one worker, measured while the models were trained; a node is one worker.

- The branches are trained side by side, each on one node; the longest is placed first. Then the mixing phase follows,
  with as many workers as it was trained with, at most one for each node. Its communication is that of the network on
  which it was measured. Transfers of weights through the store, upcycling and waiting are left out.
- A dense model is trained with data parallelism. Each node computes an equal share of the batch, and after each step a
  ring all-reduce sums the gradients: `2 (n - 1) / n · bytes` through the network of each node. With overlap, a step
  takes as long as the longer of the two; without it, their sum. DiLoCo (arXiv 2311.08105) communicates as much, but
  only every 100 steps; its quality is taken to be that of the dense control.
"""

from collections.abc import Callable, Sequence

from pydantic import FiniteFloat

from bam_ray.evaluation.results import ModelScore
from bam_ray.settings import Strict

GRADIENT_BYTES = 4  # of one parameter: training computes fp32 gradients
DILOCO_STEPS = 100
STEP_SECONDS: dict[str, Callable[[float, float], float]] = {  # (computation, all-reduce) -> seconds of a step
    "data parallel": lambda compute, reduce: compute + reduce,
    "data parallel, overlapped": max,
    f"DiLoCo, {DILOCO_STEPS} steps": lambda compute, reduce: compute + reduce / DILOCO_STEPS,
}


class Cluster(Strict):
    """Equal nodes in a network."""

    nodes: int
    network_gbit_per_s: FiniteFloat  # of each node


class DenseSpeed(Strict):
    """The training of one dense model on all nodes."""

    tokens_per_second: FiniteFloat  # of one worker, measured
    batch_tokens: FiniteFloat
    all_reduce_seconds: FiniteFloat
    step_seconds: dict[str, FiniteFloat]  # by way to train
    efficiency: dict[str, FiniteFloat]  # by way to train: 1 if communication takes no time


class ModelTime(Strict):
    """The time of a model after the seed."""

    model: str
    branch_seconds: FiniteFloat  # until the last branch is finished
    mixing_seconds: FiniteFloat
    dense_tokens: FiniteFloat  # tokens of a dense model on all nodes in the same time, without communication
    break_even: FiniteFloat | None  # efficiency of dense training below which the model wins; None: not measured
    break_even_interval: tuple[FiniteFloat, FiniteFloat] | None  # 95 %, limited to the measured range

    @property
    def seconds(self) -> float:
        """Seconds of branches and mixing together."""
        return self.branch_seconds + self.mixing_seconds


class WallClock(Strict):
    """The times of all models on a cluster."""

    cluster: Cluster
    dense: DenseSpeed
    models: tuple[ModelTime, ...]

    def dense_tokens(self, time: ModelTime) -> dict[str, float]:
        """Return the tokens of a dense model in the time of a model, by way to train."""
        return {way: share * time.dense_tokens for way, share in self.dense.efficiency.items()}


def worker_seconds(models: Sequence[ModelScore]) -> float:
    """Return the time of training, summed over workers, as a mean over the training seeds; 0 if it is not known."""
    return sum(model.worker_seconds for model in models) / len(models)


def dense_speed(controls: Sequence[ModelScore], cluster: Cluster) -> DenseSpeed | None:
    """Return the speed of a dense model on a cluster, or None if the time of a control is not known.

    It is not known either if a control was trained by several workers: their time contains their communication.

    Args:
        controls: The dense controls of all training seeds, at least one.
        cluster: The cluster.
    """
    if not all(model.worker_seconds and model.steps and model.processes == 1 for model in controls):
        return None
    speed = sum(model.tokens for model in controls) / sum(model.worker_seconds for model in controls)
    batch, size = controls[0].tokens / controls[0].steps, GRADIENT_BYTES * controls[0].parameters
    nodes = cluster.nodes
    compute = batch / (nodes * speed)
    reduce = 2 * (nodes - 1) / nodes * 8 * size / (cluster.network_gbit_per_s * 1e9)
    steps = {way: seconds(compute, reduce) for way, seconds in STEP_SECONDS.items()}
    return DenseSpeed(
        tokens_per_second=speed,
        batch_tokens=batch,
        all_reduce_seconds=reduce,
        step_seconds=steps,
        efficiency={way: compute / seconds for way, seconds in steps.items()},
    )


def model_time(
    models: Sequence[ModelScore],
    branches: Sequence[Sequence[ModelScore]],
    dense: DenseSpeed,
    cluster: Cluster,
    equivalent: float | None,
    interval: tuple[float, float] | None,
) -> ModelTime | None:
    """Return the time of a model on a cluster, or None if a time is not known.

    Args:
        models: The model of each training seed.
        branches: The branches that it was made from, each for all training seeds.
        dense: The speed of a dense model on the cluster.
        cluster: The cluster.
        equivalent: The dense-equivalent tokens of the model, if they are measured.
        interval: Their 95 % interval, if they are measured.
    """
    own, parts = worker_seconds(models), [worker_seconds(branch) for branch in branches]
    if not all(parts) or (models[0].tokens and not own) or not (own or parts):
        return None
    branch_seconds = longest_path(parts, cluster.nodes)
    mixing_seconds = own / min(models[0].processes, cluster.nodes)
    tokens = (branch_seconds + mixing_seconds) * cluster.nodes * dense.tokens_per_second
    return ModelTime(
        model=models[0].label,
        branch_seconds=branch_seconds,
        mixing_seconds=mixing_seconds,
        dense_tokens=tokens,
        break_even=None if equivalent is None else equivalent / tokens,
        break_even_interval=None if interval is None else (interval[0] / tokens, interval[1] / tokens),
    )


def longest_path(seconds: Sequence[float], nodes: int) -> float:
    """Return the time in which tasks of these seconds finish on equal nodes: the longest goes to the next free node."""
    free = [0.0] * nodes
    for each in sorted(seconds, reverse=True):
        free.sort()
        free[0] += each
    return max(free)
