"""The functions of the public API, which `bam_ray` exports.

Modules that load torch or Ray are imported inside the functions, so that importing this module takes no time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bam_ray.blobs.check import open_checked_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import SettingsError, UpcycleError
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.nodes import without_fallbacks
from bam_ray.settings import Recipe, StoreSettings, mixture_settings
from bam_ray.units import GIB

if TYPE_CHECKING:
    from bam_ray.model import BamForCausalLM
    from bam_ray.upcycling import CheckResult, Upcycled


def upcycle(
    seed: str,
    branches: Mapping[str, str],
    out: str,
    *,
    settings: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    text_length: int = 256,
    endpoint: str | None = None,
) -> "Upcycled":
    """Upcycle a seed and its branches to a mixture, without a cluster.

    All models are Hugging Face folders, given as local paths or `s3://` URIs. The mixture appears at `out` only when it
    is complete.

    Args:
        seed: The folder of the model that the branches were trained from.
        branches: The folder of each branch, by the name that its expert gets.
        out: The folder of the mixture. It must not exist yet.
        settings: The settings of the mixture, as under `upcycle.mixtures` of a recipe, for example
            `{"method": "btx", "num_experts_per_tok": 2}`. The default is the method `bam`.
        texts: Text to fit routers or splits to, or to count the tokens of, by the name of an expert; `seed` names the
            seed's expert. Each is a path, glob or URI of text, JSONL or Parquet files. Only some settings need it.
        text_length: The number of tokens in a sequence of `texts`.
        endpoint: The URL of an S3 server other than AWS.

    Returns:
        The configuration of the mixture, its manifest, and the separation of routers that were fitted to text.

    Raises:
        SettingsError: If `settings` are invalid.
        UpcycleError: If the models do not fit each other or contain values that are not finite.
    """
    from bam_ray.toolbox.folders import make_mixture, open_model, read_domain_text

    chosen = mixture_settings({"method": "bam", **(settings or {})})
    if "seed" in branches:
        raise SettingsError("the name 'seed' is reserved for the seed: give the branch another name")
    sources = {name: open_model(uri, endpoint) for name, uri in {"seed": seed, **branches}.items()}
    text = read_domain_text(texts or {}, sources["seed"], chosen, text_length)
    return make_mixture(sources, chosen, StoreSettings(uri=out, endpoint=endpoint), text)


def verify(folder: str, *, memory_gib: float = 4.0, endpoint: str | None = None) -> "list[CheckResult]":
    """Verify a mixture from its folder alone.

    The checks compare file digests, the lineage of every tensor, and the logits of the mixture with those of the dense
    models that it was made from.

    Args:
        folder: The mixture's folder, a path or an `s3://` URI.
        memory_gib: The memory for the layers that are compared at once, in GiB.
        endpoint: The URL of an S3 server other than AWS.

    Returns:
        One result for each check, with the attributes `name`, `passed`, `detail` and `error`.

    Raises:
        UpcycleError: If the folder is not a mixture.
    """
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling import verify as verify_model

    return verify_model(open_model(folder, endpoint), int(memory_gib * GIB))


def load_mixture(folder: str, *, endpoint: str | None = None) -> "BamForCausalLM":
    """Load a mixture into memory, in fp32 on the CPU and in evaluation mode.

    Args:
        folder: The mixture's folder, a path or an `s3://` URI.
        endpoint: The URL of an S3 server other than AWS.

    Raises:
        UpcycleError: If the folder is not a mixture.
        CheckpointError: If weights are missing or left over.
    """
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling import load_model

    reader = open_model(folder, endpoint)
    if reader.config.get("model_type") != "bam":
        raise UpcycleError(f"{folder} is a {reader.config.get('model_type')} model, not a mixture: upcycle it first")
    return cast("BamForCausalLM", load_model(reader))


def train_branch(recipe: Recipe, domain: str, *, on_progress: Callable[[Progress], None] | None = None) -> Path:
    """Train one branch in this process, without a cluster.

    The corpus and the seed are made first if the store does not have them. Artifacts that are committed are not made
    again, and training that was interrupted resumes from its newest checkpoint. Each task computes on a GPU if its
    `needs` request one; on a machine without GPUs, their first fallback without a GPU applies.

    Args:
        recipe: The recipe, from `load_recipe`.
        domain: The domain to train on, one of `branch.domains`.
        on_progress: A function that is called with the progress of each step.

    Returns:
        The Hugging Face folder of the branch, in the local cache.

    Raises:
        SettingsError: If the recipe has no branch of that name.
        StoreError: If the blob store cannot be used.
        TrainingError: If training fails.
    """
    from bam_ray.stages.run import run_stage
    from bam_ray.stages.task_run import TaskRun

    if domain not in recipe.branch.domains:
        raise SettingsError(f"the recipe has no branch {domain!r}: choose one of {', '.join(recipe.branch.domains)}")
    store, _ = open_checked_store(recipe.store)
    run = PipelineRun.of(recipe, store)
    branch = run.task(ArtifactKind.BRANCHES, domain)
    context = _Context(on_progress or (lambda progress: None))
    for task in run.tasks:
        if task.id == branch.id or task.id in branch.parents:
            run_stage(TaskRun(_on_this_machine(task), run, context))
    return run.artifact(ArtifactKind.BRANCHES, domain).fetch()


def run(recipe: Recipe) -> str:
    """Run a whole recipe on the Ray cluster that this machine belongs to or that `RAY_ADDRESS` names.

    Every artifact that is committed already is left as it is, so a run that was interrupted resumes. The progress is
    printed as a table and written to the store, where `bam status` reads it.

    Args:
        recipe: The recipe, from `load_recipe`.

    Returns:
        `"finished"`, `"failed"` or `"interrupted"`.

    Raises:
        StoreError: If the blob store cannot be used.
        PlacementError: If there is no cluster, or no node of it can ever run a task.
    """
    from bam_ray.on_deepspeed import deepspeed_engine
    from bam_ray.on_ray.run import run_tasks

    return run_tasks(recipe, engine_factory=deepspeed_engine)


def _on_this_machine(task: Task) -> Task:
    """Return `task` with the first of its resource requests whose GPUs this machine has; the first if there is none."""
    import torch

    if not task.needs.gpus or torch.cuda.is_available():
        return task
    demand = next((demand for demand in task.needs.fallback if not demand.gpus), task.needs)
    return replace(task, needs=without_fallbacks(demand))


@dataclass(frozen=True)
class _Context:
    """The `StageContext` of a stage that runs in the calling thread."""

    report: Callable[[Progress], None]
    node: str = "local"

    def should_stop(self) -> bool:
        """Return False: an exception, such as `KeyboardInterrupt`, is what stops the stage."""
        return False
