"""Evaluate every model of a run on every domain, and write the report.

The scores of each model are an artifact of their own (`evaluations/<id>`), with the NLL of each token. Its identity
depends on the model, the corpus and the number of tokens. So an interrupted evaluation resumes with the next model, and
another report on the same models reuses their scores. The scores of the output ensembles follow from those of their
members and are a part of the report alone.

A mixture with experts of domains is also scored with oracle routing, before and after the mixing phase (see
`evaluation.decomposition`). These scores are artifacts of their own too.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import ArtifactKind, ComputeCost, Manifest, identity
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data import Corpus
from bam_ray.errors import CheckpointError, DigestMismatch, Interrupted
from bam_ray.evaluation.decomposition import expert_of_domain
from bam_ray.evaluation.ensemble import MEMBER_KINDS, document_starts, ensemble_scores
from bam_ray.evaluation.findings import make_results
from bam_ray.evaluation.lm_eval_tasks import digest_of_tasks, score_tasks
from bam_ray.evaluation.perplexity import DomainEvaluation, score
from bam_ray.evaluation.results import MEAN, DomainScore, LmEvalScore, ModelKind, ModelScore, OracleScore, model_label
from bam_ray.evaluation.routing import combine_domains
from bam_ray.evaluation.serving_cost import ServingCost
from bam_ray.model import is_mixture
from bam_ray.model.loading import load_folder
from bam_ray.model.one_expert import routed_to
from bam_ray.model.parameters import count_parameters
from bam_ray.pipeline.graph import subset
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.stages.publish import CURVE
from bam_ray.stages.task_run import TaskRun
from bam_ray.training.devices import inference_dtype, requested_device
from bam_ray.training.document_mask import mask_documents
from bam_ray.training.flops import forward_flops_per_token

Content = TypeVar("Content")

MODEL_KINDS: tuple[ModelKind, ...] = get_args(ModelKind)
SCORE = "score.json"
ORACLE = "oracle.json"
ORACLE_SCORES = TypeAdapter(dict[str, tuple[str, DomainScore]])
LM_EVAL = "lm_eval.json"
LM_EVAL_SCORES = TypeAdapter(tuple[LmEvalScore, ...])
TOKEN_NLL = "token_nll.safetensors"  # by domain: the NLL of each predicted token in nats, float32 [S, L - 1]


def evaluate(run: TaskRun) -> Manifest:
    """Score all models of the run, write the report, and return its manifest.

    Raises `CheckpointError` if a model is not committed yet, and `Interrupted` if the context asks to stop. The scores
    that were committed by then are kept.
    """
    started = time.perf_counter()
    lease = run.take_lease()
    made = committed_artifacts(run)
    evaluator = Evaluator(run, lease)
    damaged = damaged_branches(run, made)
    models = [
        (task, kind)
        for task in run.pipeline.tasks
        for kind in MODEL_KINDS
        if task.kind == kind and task.id in made and task.id not in damaged
    ]
    scores = []
    for step, (task, kind) in enumerate(models):
        lineage = [made[id] for id in ancestors(task.id, made)]
        progress = Progress(step, len(models))
        model_score = evaluator.model_score(task, kind, lineage, progress)
        update: dict[str, Any] = {**training_record(lineage), "serving": evaluator.serving_cost(task, model_score)}
        if run.recipe.evaluate.lm_eval_tasks is not None:
            update["lm_eval"] = evaluator.lm_eval(task, Path(run.recipe.evaluate.lm_eval_tasks), progress)
        if kind == "mixtures" and run.recipe.upcycle.mixtures[task.name].has_branch_experts:
            upcycled = run.pipeline.task(ArtifactKind.UPCYCLED, task.name)
            update["oracle"] = evaluator.oracle(upcycled, task, progress)
        scores.append(model_score.model_copy(update=update))
    run.context.report(Progress(step=len(models), total_steps=len(models), note="writing the report"))
    scores += evaluator.ensembles([task for task, kind in models if kind in MEMBER_KINDS], scores, made)
    results = make_results(run.recipe.name, scores)
    from bam_ray.evaluation.report import write_report  # imports matplotlib, which no other stage needs

    with scratch_folder("report") as folder:
        write_report(
            folder,
            results,
            list(made.values()),
            {task.id: _curve(made[task.id], run.store) for task, _ in models},
            evaluator.corpus.facts,
            run.recipe.model_dump(mode="json"),
        )
        wall = time.perf_counter() - started
        manifest = Manifest(
            id=run.task.id,
            kind=run.task.kind,
            name=run.task.name,
            parents=tuple(id for id in run.task.parents if id in made),
            settings=run.recipe.evaluate.model_dump(mode="json"),
            compute=ComputeCost(device_seconds=wall, wall_seconds=wall),
            metrics={f"perplexity/{MEAN}/{model.label}": results.means[model.id] for model in results.models},
            facts={
                "evaluations": [evaluator.id_of(task) for task, _ in models],
                "left_out": [made[id].name for id in damaged],
                "findings": {finding.claim: finding.holds for finding in results.findings},
            },
            attempt=str(lease.number),
        )
        return run.artifact.publish(folder, manifest, lease)


class Evaluator:
    """The evaluation of models on all domains of one corpus. It commits scores, and reads those that are committed."""

    def __init__(self, run: TaskRun, lease: Lease) -> None:
        corpus = run.parent(ArtifactKind.CORPORA, "corpus")
        self.corpus = Corpus(corpus.fetch())
        self._corpus_id = corpus.id
        self._settings = run.recipe.evaluate
        self._general = run.recipe.data.general
        self._device = requested_device(run.task.needs.gpus)
        self._store = run.store
        self.lease = lease
        self._context = run.context

    def id_of(self, task: Task) -> str:
        """Return the identity of the evaluation of the model that `task` makes."""
        content = {**self._settings.identity(), "files": [SCORE, TOKEN_NLL]}
        return identity(task.name, content, (task.id, self._corpus_id))

    def model_score(self, task: Task, kind: ModelKind, lineage: Sequence[Manifest], progress: Progress) -> ModelScore:
        """Return the scores of the model that `task` made.

        Args:
            task: The task of the model.
            kind: The task's kind.
            lineage: The model's manifest, followed by those of everything that it was made from.
            progress: The progress of the whole report, which is reported while the model is scored.
        """
        artifact = Artifact(self._store, ArtifactKind.EVALUATIONS, self.id_of(task))
        return read_or_make(
            artifact,
            lambda: _read_score(artifact),
            lambda: self._publish_score(artifact, task, kind, lineage, progress),
        )

    def oracle(self, upcycled: Task, mixture: Task, progress: Progress) -> dict[str, OracleScore]:
        """Return the scores of a mixture with oracle routing, by domain.

        Domains are left out if the mixture had no expert of them before the mixing phase, as that of a late branch.

        Args:
            upcycled: The task of the mixture before the mixing phase.
            mixture: The task of the mixture.
            progress: The progress of the whole report, which is reported while the mixture is scored.
        """
        unmixed, mixed = (self._oracle_scores(task, progress) for task in (upcycled, mixture))
        return {
            domain: OracleScore(expert=expert, unmixed=unmixed[domain][1], mixed=score)
            for domain, (expert, score) in mixed.items()
            if domain in unmixed
        }

    def _oracle_scores(self, task: Task, progress: Progress) -> dict[str, tuple[str, DomainScore]]:
        """Return the expert of each domain, and the score of the mixture that `task` made if it alone is used."""
        content = {**self._settings.identity(), "routing": "oracle", "files": [ORACLE]}
        id = identity(task.name, content, (task.id, self._corpus_id))
        artifact = Artifact(self._store, ArtifactKind.EVALUATIONS, id)
        return read_or_make(
            artifact,
            lambda: ORACLE_SCORES.validate_json((artifact.fetch() / ORACLE).read_bytes()),
            lambda: self._publish_oracle_scores(artifact, task, progress),
        )

    def lm_eval(self, task: Task, folder: Path, progress: Progress) -> tuple[LmEvalScore, ...]:
        """Return the scores of the model that `task` made on the tasks of lm-eval in a folder.

        Args:
            task: The task of the model.
            folder: The folder with the tasks.
            progress: The progress of the whole report, which is reported while the model is scored.
        """
        content = {"lm_eval_tasks": digest_of_tasks(folder), "dtype": self._settings.dtype, "files": [LM_EVAL]}
        artifact = Artifact(self._store, ArtifactKind.EVALUATIONS, identity(task.name, content, (task.id,)))
        return read_or_make(
            artifact,
            lambda: LM_EVAL_SCORES.validate_json((artifact.fetch() / LM_EVAL).read_bytes()),
            lambda: self._publish_lm_eval_scores(artifact, task, folder, progress),
        )

    def serving_cost(self, task: Task, model_score: ModelScore) -> ServingCost:
        """Return the cost of serving a token with the model that `task` made."""
        plain = json.loads(Artifact(self._store, task.kind, task.id).read_file("config.json"))
        config = AutoConfig.for_model(**plain)
        return ServingCost.of(config, model_score.active_parameters, self.corpus.sequence_length)

    def ensembles(
        self, tasks: Sequence[Task], scores: Sequence[ModelScore], made: Mapping[str, Manifest]
    ) -> list[ModelScore]:
        """Return the scores of the output ensembles of the models that `tasks` made; empty if none is a branch.

        Args:
            tasks: The tasks of the members. Their models are scored.
            scores: The scores of all models.
            made: The manifests of all artifacts, by id.
        """
        of = {score.id: score for score in scores}
        lineage = [made[id] for id in dict.fromkeys(id for task in tasks for id in ancestors(task.id, made))]
        end_of_text_id = None if self.corpus.attend_across_documents else self.corpus.end_of_text_id
        tokens, flops = _training_cost(lineage)
        return ensemble_scores(
            [of[task.id] for task in tasks],
            [self._token_nll(task) for task in tasks],
            {domain: document_starts(self._held_out(domain), end_of_text_id) for domain in self.corpus.domains},
            lineage_tokens=tokens,
            lineage_flops=flops,
        )

    def _token_nll(self, task: Task) -> dict[str, np.ndarray]:
        """Return the NLL of each token by domain, [S, L - 1], of the model that `task` made."""
        return load_file(Artifact(self._store, ArtifactKind.EVALUATIONS, self.id_of(task)).fetch() / TOKEN_NLL)

    def _publish_score(
        self, artifact: Artifact, task: Task, kind: ModelKind, lineage: Sequence[Manifest], progress: Progress
    ) -> None:
        """Score the model that `task` made, and commit the scores.

        Evaluations have no leases: if several reports score one model at the same time, the first commit counts.
        """
        started = time.perf_counter()
        model = self._load(task)
        domains = self._score_domains(model, replace(progress, note=model_label(kind, task.name)))
        result = describe(task, kind, lineage, model, domains)
        manifest = self._manifest(artifact, task, domains, model, started)
        metrics = {f"perplexity/{column}": result.perplexity(column) for column in (*domains, MEAN)}
        with scratch_folder("evaluation") as temporary:
            (temporary / SCORE).write_text(result.model_dump_json(indent=1), encoding="utf-8")
            save_file({domain: each.token_nll for domain, each in domains.items()}, temporary / TOKEN_NLL)
            self.lease.check()
            artifact.publish(temporary, manifest.model_copy(update={"metrics": metrics}))

    def _publish_oracle_scores(self, artifact: Artifact, task: Task, progress: Progress) -> None:
        """Score the mixture that `task` made with oracle routing, and commit the scores."""
        started = time.perf_counter()
        model = self._load(task)
        names: list[str] = model.config.expert_names
        experts = {domain: expert_of_domain(names, domain, self._general) for domain in self.corpus.domains}
        chosen = {domain: names.index(expert) for domain, expert in experts.items() if expert is not None}
        stage = "before mixing" if task.kind == "upcycled" else "after mixing"
        note = f"oracle routing of {model_label('mixtures', task.name)} {stage}"
        domains = self._score_domains(model, replace(progress, note=note), chosen)
        scores = {domain: (names[chosen[domain]], each.score) for domain, each in domains.items()}
        with scratch_folder("evaluation") as temporary:
            (temporary / ORACLE).write_bytes(ORACLE_SCORES.dump_json(scores, indent=1))
            self.lease.check()
            artifact.publish(temporary, self._manifest(artifact, task, domains, model, started))

    def _publish_lm_eval_scores(self, artifact: Artifact, task: Task, folder: Path, progress: Progress) -> None:
        """Score the model that `task` made on the tasks of lm-eval in a folder, and commit the scores."""
        started = time.perf_counter()
        self._context.report(replace(progress, note=f"lm-eval of {task.full_name}"))
        scores = score_tasks(
            self._load(task),
            AutoTokenizer.from_pretrained(Artifact(self._store, task.kind, task.id).fetch()),
            folder,
            batch=self._settings.batch_sequences,
            max_length=self.corpus.sequence_length,
        )
        wall = time.perf_counter() - started
        manifest = Manifest(
            id=artifact.id,
            kind=ArtifactKind.EVALUATIONS,
            name=task.name,
            parents=(task.id,),
            settings=self._settings.model_dump(mode="json"),
            compute=ComputeCost(device_seconds=wall, wall_seconds=wall),
            metrics={f"lm_eval/{each.task}/{each.metric}": each.value for each in scores},
            attempt=str(self.lease.number),
        )
        with scratch_folder("evaluation") as temporary:
            (temporary / LM_EVAL).write_bytes(LM_EVAL_SCORES.dump_json(scores, indent=1))
            self.lease.check()
            artifact.publish(temporary, manifest)

    def _load(self, task: Task) -> PreTrainedModel:
        """Return the model that `task` made, on the device of the evaluation."""
        folder = Artifact(self._store, task.kind, task.id).fetch()
        dtype = inference_dtype(self._device, self._settings.dtype)
        model = load_folder(folder, dtype)
        model.to(torch.device(self._device))
        if not self.corpus.attend_across_documents:
            mask_documents(model, self.corpus.end_of_text_id)
        return model

    def _manifest(
        self,
        artifact: Artifact,
        task: Task,
        domains: Mapping[str, DomainEvaluation],
        model: PreTrainedModel,
        started: float,
    ) -> Manifest:
        """Return the manifest of the scores of the model that `task` made, whose evaluation has `started`."""
        wall = time.perf_counter() - started
        tokens = sum(len(each.token_nll) for each in domains.values()) * self.corpus.sequence_length
        flops = forward_flops_per_token(model.config, self.corpus.sequence_length) * tokens
        return Manifest(
            id=artifact.id,
            kind=ArtifactKind.EVALUATIONS,
            name=task.name,
            parents=(task.id, self._corpus_id),
            settings=self._settings.model_dump(mode="json"),
            compute=ComputeCost(flops=flops, device_seconds=wall, wall_seconds=wall),
            attempt=str(self.lease.number),
        )

    def _score_domains(
        self, model: PreTrainedModel, progress: Progress, experts: Mapping[str, int] | None = None
    ) -> dict[str, DomainEvaluation]:
        """Return the scores, the NLLs of the tokens and the routing by domain.

        With `experts`, only their domains are scored, and all tokens of a domain are routed to its expert.
        """

        def stop_if_asked() -> None:
            if self._context.should_stop():
                raise Interrupted(
                    f"evaluation stopped at model {progress.step + 1} of {progress.total_steps}: "
                    "run the same command again to resume"
                )

        domains: dict[str, DomainEvaluation] = {}
        for domain in self.corpus.domains if experts is None else experts:
            self._context.report(replace(progress, note=f"{progress.note} on {domain}"))
            stop_if_asked()
            rows = self._held_out(domain)
            with nullcontext() if experts is None else routed_to(model, experts[domain]):
                domains[domain] = score(model, rows, self._settings.batch_sequences, stop_if_asked)
        return domains

    def _held_out(self, domain: str) -> np.ndarray:
        """Return the sequences that every model is scored on, [S, L]."""
        return held_out_rows(self.corpus.held_out(domain), self._settings.tokens_per_domain)


def read_or_make(artifact: Artifact, read: Callable[[], Content], make: Callable[[], None]) -> Content:
    """Return what `read` returns. If the artifact is not committed, or is damaged, it is made before."""
    manifest = artifact.manifest()
    if manifest is not None:
        try:
            return read()
        except DigestMismatch as error:
            artifact.set_aside(manifest, str(error))
    make()
    return read()


def _read_score(artifact: Artifact) -> ModelScore:
    return ModelScore.model_validate_json((artifact.fetch() / SCORE).read_bytes())


def describe(
    task: Task,
    kind: ModelKind,
    lineage: Sequence[Manifest],
    model: PreTrainedModel,
    domains: Mapping[str, DomainEvaluation],
) -> ModelScore:
    """Return the scores of a model together with its size, lineage and cost."""
    total, active = count_parameters(model)
    mixture = is_mixture(model.config) and bool(model.config.mixture_layers)
    routings = {domain: each.routing for domain, each in domains.items() if each.routing is not None}
    lineage_tokens, lineage_flops = _training_cost(lineage)
    return ModelScore(
        id=task.id,
        name=task.name,
        kind=kind,
        attention_experts=model.config.attention_experts if mixture else None,
        experts=model.config.num_experts if mixture else 1,
        experts_per_token=model.config.num_experts_per_tok if mixture else 1,
        parameters=total,
        active_parameters=active,
        tokens=lineage[0].tokens,
        lineage_tokens=lineage_tokens,
        flops=lineage[0].compute.flops,
        lineage_flops=lineage_flops,
        domains={domain: each.score for domain, each in domains.items()},
        routing=combine_domains(model.config, routings) if mixture else None,
    )


def training_record(lineage: Sequence[Manifest]) -> dict[str, Any]:
    """Return the fields of a `ModelScore` that describe the training of the first model in `lineage`."""
    model, *parents = lineage
    segments = model.facts.get("computed_on", [])
    return {
        "steps": model.step,
        "processes": segments[-1]["processes"] if segments else 1,
        "worker_seconds": model.compute.device_seconds,
        "branches": tuple(parent.name for parent in parents if parent.kind == ArtifactKind.BRANCHES),
    }


def _training_cost(lineage: Sequence[Manifest]) -> tuple[int, float]:
    """Return the training tokens of all models in `lineage`, and the FLOPs of everything in it."""
    tokens = sum(manifest.tokens for manifest in lineage if manifest.kind in MODEL_KINDS)
    return tokens, sum(manifest.compute.flops for manifest in lineage)


def held_out_rows(rows: np.ndarray, tokens: int) -> np.ndarray:
    """Return as many of the sequences [S, L] as hold `tokens` tokens, at least one, spread evenly over all of them."""
    count = min(len(rows), max(1, tokens // rows.shape[1]))
    return np.asarray(rows[np.arange(count) * len(rows) // max(1, count)])


def ancestors(id: str, made: Mapping[str, Manifest]) -> list[str]:
    """Return `id`, followed by the ids of everything that it was made from, each once; `made` maps ids to manifests."""
    found = [id]
    for current in found:  # grows while it is walked
        found += [parent for parent in made[current].parents if parent not in found]
    return found


def committed_artifacts(run: TaskRun) -> dict[str, Manifest]:
    """Return the manifests of all artifacts that the report is about, by id.

    Branches that the report can do without are left out if they are not committed. Raises `CheckpointError` if another
    artifact is missing.
    """
    optional = {id for id, _ in run.task.quorum.branches} if run.task.quorum else set()
    made: dict[str, Manifest] = {}
    for task in subset(run.pipeline.tasks, [ArtifactKind.REPORTS]):  # a report says nothing about adapters
        if task.id == run.task.id:
            continue
        artifact = Artifact(run.store, task.kind, task.id)
        manifest = artifact.manifest()
        if manifest is not None:
            made[task.id] = manifest
        elif task.id not in optional:
            raise CheckpointError(f"{artifact.uri} is not committed: make all models of the run before its report")
    return made


def damaged_branches(run: TaskRun, made: Mapping[str, Manifest]) -> list[str]:
    """Return the ids of the branches in `made` that are damaged, of those that the report can do without."""

    def is_whole(id: str) -> bool:
        try:
            Artifact(run.store, ArtifactKind.BRANCHES, id).fetch()
        except CheckpointError:
            return False
        return True

    branches = run.task.quorum.branches if run.task.quorum else ()
    return [id for id, _ in branches if id in made and not is_whole(id)]


def _curve(manifest: Manifest, store: BlobStore) -> list[tuple[int, float]]:
    """Return (step, NLL) of the model's own training; empty if no curve was recorded."""
    if CURVE not in manifest.files:
        return []
    points = json.loads(Artifact(store, manifest.kind, manifest.id).read_file(CURVE))
    return [(point["step"], point["nll"]) for point in points]
