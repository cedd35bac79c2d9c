"""Evaluate every model of a run on every domain, and write the report.

Each model's scores are an artifact of their own (`evaluations/<id>`), whose identity is that of the model, the corpus
and the number of tokens. So an interrupted evaluation goes on with the next model, and another report over the same
models evaluates none of them again.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import bam_ray.model  # noqa: F401  registers the mixture with AutoModelForCausalLM
from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import ArtifactKind, ComputeCost, Manifest, identity
from bam_ray.data import Corpus
from bam_ray.errors import CheckpointError, Interrupted
from bam_ray.evaluation.perplexity import score
from bam_ray.evaluation.results import MEAN, DomainRouting, DomainScore, ModelKind, ModelScore, Results, label
from bam_ray.evaluation.routing import routing_of
from bam_ray.model.parameters import count_parameters
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.tasks import Progress, StageContext, Task
from bam_ray.settings import Recipe
from bam_ray.stages.lineage import Place
from bam_ray.stages.train import CURVE
from bam_ray.training.document_mask import keep_apart
from bam_ray.training.flops import forward_flops_per_token

MODEL_KINDS: tuple[ModelKind, ...] = get_args(ModelKind)
SCORE = "score.json"


def evaluate(name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> Manifest:
    """Score all models of `recipe`, write the report called `name`, and return its manifest.

    Raises `CheckpointError` where a model is not committed yet, `Interrupted` where `context` says stop: what was
    scored by then is kept.
    """
    started = time.perf_counter()
    graph = task_graph(recipe)
    place = Place(recipe, store, ArtifactKind.REPORTS, name)
    finished = place.artifact.manifest()
    if finished is not None:
        return finished
    missing = missing_branches(place.task, store)
    graph = [task for task in graph if task.id not in missing]
    made = {task.id: _committed(task, store) for task in graph if task.id != place.task.id}
    lease = Lease.take(store, place.artifact.prefix)
    evaluator = Evaluator(recipe, store, place.other(ArtifactKind.CORPORA, "corpus"), lease, context)
    spoilt = spoilt_branches(place.task, made, store)
    models = [(task, kind) for task in graph for kind in MODEL_KINDS if task.kind == kind and task.id not in spoilt]
    scores = []
    for step, (task, kind) in enumerate(models):
        lineage = [made[id] for id in ancestors(task.id, made)]
        scores.append(evaluator.model_score(task, kind, lineage, step, len(models)))
    context.report(Progress(step=len(models), total_steps=len(models), note="writing the report"))
    results = Results.of(recipe.name, scores)
    curves = {task.id: _curve(made[task.id], store) for task, _ in models}
    with tempfile.TemporaryDirectory(prefix="bam-report-") as folder:
        from bam_ray.evaluation.report import write_report  # matplotlib: a second that no other stage's start needs

        write_report(
            Path(folder),
            results,
            list(made.values()),
            curves,
            evaluator.corpus.facts,
            recipe.model_dump(mode="json"),
        )
        wall = time.perf_counter() - started
        manifest = Manifest(
            id=place.task.id,
            kind=ArtifactKind.REPORTS,
            name=name,
            parents=tuple(id for id in place.task.parents if id in made),
            settings=recipe.evaluate.model_dump(mode="json"),
            compute=ComputeCost(device_seconds=wall, wall_seconds=wall),
            metrics={f"perplexity/{MEAN}/{model.label}": results.means[model.id] for model in results.models},
            facts={
                "evaluations": [evaluator.id_of(task) for task, _ in models],
                "left_out": [made[id].name for id in spoilt],
                "findings": {finding.claim: finding.holds for finding in results.findings},
            },
            attempt=lease.number,
        )
        lease.check()
        return place.artifact.publish(Path(folder), manifest)


class Evaluator:
    """Scores models on all domains of one corpus: read where they are committed, else made and committed."""

    def __init__(self, recipe: Recipe, store: BlobStore, corpus: Artifact, lease: Lease, context: StageContext) -> None:
        self.corpus = Corpus(corpus.fetch())
        self._corpus_id = corpus.id
        self._settings = recipe.evaluate
        self._store = store
        self._lease = lease
        self._context = context

    def id_of(self, task: Task) -> str:
        """The identity of a model's evaluation."""
        tokens = self._settings.tokens_per_domain
        return identity(task.name, {"tokens_per_domain": tokens}, (task.id, self._corpus_id))

    def model_score(
        self, task: Task, kind: ModelKind, lineage: Sequence[Manifest], step: int, total_steps: int
    ) -> ModelScore:
        """The scores of the model that `task` made, the `step`th of `total_steps`.

        `lineage`: its manifest, first, and those of everything it was made from.
        """
        artifact = Artifact(self._store, ArtifactKind.EVALUATIONS, self.id_of(task))
        if artifact.manifest() is None:
            started = time.perf_counter()
            folder = Artifact(self._store, ArtifactKind(kind), task.id).fetch()
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            if not self.corpus.attend_across_documents:
                keep_apart(model, self.corpus.end_of_text_id)
            progress = Progress(step=step, total_steps=total_steps, note=label(kind, task.name))
            domains, routings = self._on_all_domains(model, progress)
            result = describe(task, kind, lineage, model, domains, routings)
            wall = time.perf_counter() - started
            tokens = sum(len(each.sequence_nll) for each in domains.values()) * self.corpus.sequence_length
            flops = forward_flops_per_token(model.config, self.corpus.sequence_length) * tokens
            manifest = Manifest(
                id=artifact.id,
                kind=ArtifactKind.EVALUATIONS,
                name=task.name,
                parents=(task.id, self._corpus_id),
                settings=self._settings.model_dump(mode="json"),
                compute=ComputeCost(flops=flops, device_seconds=wall, wall_seconds=wall),
                metrics={f"perplexity/{column}": result.perplexity(column) for column in (*domains, MEAN)},
                attempt=self._lease.number,
            )
            with tempfile.TemporaryDirectory(prefix="bam-evaluation-") as temporary:
                (Path(temporary) / SCORE).write_text(result.model_dump_json(indent=1), encoding="utf-8")
                self._lease.check()
                artifact.publish(Path(temporary), manifest)
        return ModelScore.model_validate_json((artifact.fetch() / SCORE).read_bytes())

    def _on_all_domains(
        self, model: PreTrainedModel, progress: Progress
    ) -> tuple[dict[str, DomainScore], dict[str, DomainRouting]]:
        """Scores by domain, and for a mixture the routing by domain."""

        def stop_if_asked() -> None:
            if self._context.should_stop():
                raise Interrupted(
                    f"evaluation stopped at model {progress.step + 1} of {progress.total_steps}; "
                    "the same command goes on from there"
                )

        domains: dict[str, DomainScore] = {}
        routings: dict[str, DomainRouting] = {}
        for domain in self.corpus.domains:
            self._context.report(replace(progress, note=f"{progress.note} on {domain}"))
            stop_if_asked()
            rows = held_out_rows(self.corpus.held_out(domain), self._settings.tokens_per_domain)
            domains[domain], routing = score(model, rows, self._settings.batch_sequences, stop_if_asked)
            if routing is not None:
                routings[domain] = routing
        return domains, routings


def describe(
    task: Task,
    kind: ModelKind,
    lineage: Sequence[Manifest],
    model: PreTrainedModel,
    domains: dict[str, DomainScore],
    routings: dict[str, DomainRouting],
) -> ModelScore:
    """The scores of a model with what it is and what it cost."""
    total, active = count_parameters(model)
    is_mixture = model.config.model_type == "bam"
    return ModelScore(
        id=task.id,
        name=task.name,
        kind=kind,
        attention_experts=model.config.attention_experts if is_mixture else None,
        experts=model.config.num_experts if is_mixture else 1,
        experts_per_token=model.config.num_experts_per_tok if is_mixture else 1,
        parameters=total,
        active_parameters=active,
        tokens=lineage[0].tokens,
        lineage_tokens=sum(manifest.tokens for manifest in lineage if manifest.kind in MODEL_KINDS),
        flops=lineage[0].compute.flops,
        lineage_flops=sum(manifest.compute.flops for manifest in lineage),
        domains=domains,
        routing=routing_of(model.config, routings) if is_mixture else None,
    )


def held_out_rows(rows: np.ndarray, tokens: int) -> np.ndarray:
    """`tokens` tokens' worth of the sequences [S, L], at least one, spread evenly over all of them."""
    count = min(len(rows), max(1, tokens // rows.shape[1]))
    return np.asarray(rows[np.arange(count) * len(rows) // max(1, count)])


def ancestors(id: str, made: Mapping[str, Manifest]) -> list[str]:
    """`id`, first, and the ids of everything it was made from, each once; `made` are all of these, by id."""
    found = [id]
    for current in found:  # grows while it is walked
        found += [parent for parent in made[current].parents if parent not in found]
    return found


def missing_branches(report: Task, store: BlobStore) -> set[str]:
    """The ids of branches that are not committed, of those that a report can do without."""
    branches = report.quorum.branches if report.quorum else ()
    return {id for id, _ in branches if Artifact(store, ArtifactKind.BRANCHES, id).manifest() is None}


def spoilt_branches(report: Task, made: Mapping[str, Manifest], store: BlobStore) -> list[str]:
    """The ids of branches that are `made` but damaged, of those that a report can do without."""

    def is_whole(id: str) -> bool:
        try:
            Artifact(store, ArtifactKind.BRANCHES, id).fetch()
        except CheckpointError:
            return False
        return True

    branches = report.quorum.branches if report.quorum else ()
    return [id for id, _ in branches if id in made and not is_whole(id)]


def _committed(task: Task, store: BlobStore) -> Manifest:
    artifact = Artifact(store, task.kind, task.id)
    manifest = artifact.manifest()
    if manifest is None:
        raise CheckpointError(f"{artifact.uri} is not committed: a report needs all of the run's models, make it first")
    return manifest


def _curve(manifest: Manifest, store: BlobStore) -> list[tuple[int, float]]:
    """(step, NLL) of a model's own training; empty where none was recorded."""
    if CURVE not in manifest.files:
        return []
    points = json.loads(store.get(f"{manifest.kind}/{manifest.id}/{CURVE}"))
    return [(point["step"], point["nll"]) for point in points]
