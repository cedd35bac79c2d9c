"""A tiny run whose branches are really trained, and the results that they reach without any fault."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.tasks import Progress
from bam_ray.settings import Recipe
from bam_ray.stages.run import run_stage
from bam_ray.stages.task_run import TaskRun

LETTERS = {"general": "abcdefgh", "code": "uvwxyz", "law": "klmnop", "prose": "qrst", "verse": "ijklab"}
BATCH_TOKENS = 128
ATTEMPTS = re.compile("/(leases|events|steps)/")  # keys that tell of attempts, and not of what they have made


@dataclass(frozen=True)
class BranchResult:
    """The losses and the weights of a finished branch."""

    nlls: tuple[float, ...]
    weights: str  # SHA-256 of model.safetensors


class SilentContext:
    """A `StageContext` that drops all reports and never asks the stage to stop."""

    node = "here"

    def report(self, progress: Progress) -> None:
        """Drop the report."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


class ReferenceRun:
    """A corpus, a seed and branches of `steps` steps of the given domains, made without faults in `folder`.

    `expected` holds the result of each branch. The branches are trained in this process with one thread, as a worker
    with one CPU trains them, so that the results of other runs are the same to the bit.
    """

    def __init__(self, folder: Path, domains: tuple[str, ...] = ("code", "law"), steps: int = 300) -> None:
        self.domains, self.steps = domains, steps
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for domain in ("general", *domains):
            words = random.Random(domain)
            lines = [
                json.dumps({"text": " ".join("".join(words.choices(LETTERS[domain], k=4)) for _ in range(60))})
                for _ in range(40)
            ]
            (folder / f"{domain}.jsonl").write_text("\n".join(lines))
        recipe = self.recipe(str(folder / "store"))
        self._store = open_store(recipe.store.uri)
        torch.set_num_threads(1)
        run = PipelineRun.of(recipe, self._store)
        for task in run.tasks:
            if task.kind in ("corpora", "seeds", "branches"):
                run_stage(TaskRun(task, run, SilentContext()))
        self.expected = {domain: read_branch(self._store, recipe, domain) for domain in domains}

    def recipe(
        self, store: str, endpoint: str | None = None, max_attempts: int = 4, **branch_training: object
    ) -> Recipe:
        """Return the recipe of this run over another store; `branch_training` are changes to `branch.training`."""
        training = {"batch_tokens": BATCH_TOKENS, "peak_lr": 0.01, "checkpoint_every": 20, "micro_batch_sequences": 4}
        plain = {
            "name": "reference",
            "store": {"uri": store, "endpoint": endpoint},
            "data": {
                "domains": {
                    domain: {"source": str(self._folder / f"{domain}.jsonl")} for domain in ("general", *self.domains)
                },
                "sequence_length": 32,
                "held_out_fraction": 0.2,
                "tokenizer": {"vocab_size": 300},
            },
            "seed": {
                "scratch": {"hidden_size": 16, "intermediate_size": 24, "layers": 1, "heads": 2, "kv_heads": 2},
                "training": training | {"tokens": 10 * BATCH_TOKENS},
            },
            "branch": {
                "domains": list(self.domains),
                "training": training | {"tokens": self.steps * BATCH_TOKENS} | branch_training,
                "max_attempts": max_attempts,
            },
            "upcycle": {"mixtures": {"bam": {"method": "bam"}}},
            "mix": {"training": training | {"tokens": 10 * BATCH_TOKENS}, "expert_parallel": 1},
        }
        return Recipe.model_validate(plain)

    def copy_seed_to(self, store: BlobStore) -> None:
        """Copy corpus and seed to an empty store, so that a run over it starts with its branches."""
        for kind in ("corpora", "seeds"):
            keys = [key for key in self._store.list(f"{kind}/") if not ATTEMPTS.search(key)]
            for key in sorted(keys, key=lambda key: key.endswith("/manifest.json")):
                store.put(key, self._store.get(key))


def read_branch(store: BlobStore, recipe: Recipe, domain: str) -> BranchResult:
    """Return the result of a committed branch."""
    manifest = branch_manifest(store, recipe, domain)
    curve = json.loads(Artifact(store, ArtifactKind.BRANCHES, manifest.id).read_file("curve.json"))
    assert [point["step"] for point in curve] == list(range(1, recipe.branch.training.steps + 1))
    return BranchResult(tuple(point["nll"] for point in curve), manifest.files["model.safetensors"].sha256)


def branch_manifest(store: BlobStore, recipe: Recipe, domain: str) -> Manifest:
    """Return the manifest of a branch, which must be committed."""
    manifest = Artifact(store, ArtifactKind.BRANCHES, branch_id(recipe, domain)).manifest()
    assert manifest is not None, f"{domain} is not committed"
    return manifest


def branch_id(recipe: Recipe, domain: str) -> str:
    """Return the identity of a branch."""
    return next(task.id for task in task_graph(recipe) if (task.kind, task.name) == ("branches", domain))
