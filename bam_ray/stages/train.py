"""Training to an artifact: what seed, branches and mixtures have in common."""

import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ComputeCost, Manifest
from bam_ray.data import BlendedSampler, Corpus
from bam_ray.errors import SettingsError
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import Blend, DynamicBlend, MetricsSettings, TrainingSettings
from bam_ray.stages.attempt import Attempt, attempting
from bam_ray.stages.lineage import Place
from bam_ray.training.blending import FollowingSampler
from bam_ray.training.checkpoints import Checkpoints, Retention, patient
from bam_ray.training.document_mask import keep_apart
from bam_ray.training.engine import Engine
from bam_ray.training.flops import peak_flops, training_flops
from bam_ray.training.loop import Point, Training
from bam_ray.training.memory import GIB
from bam_ray.training.metrics import Metrics
from bam_ray.training.objective import as_mixture
from bam_ray.training.router_metrics import RoutingReport, RoutingWatch
from bam_ray.training.state import TensorFiles

CURVE = "curve.json"
NOTES = {  # what a person who looks at the run's table should know
    "refused": "passed over a damaged checkpoint: {error}",
    "micro_batch": "out of memory: micro batch {before} halved to {sequences}",
    "skipped": "left out a batch at step {step}: {error}",
    "absorbed": "took in {branch}, which came late, at step {step}",
    "left_out": "left out {branch}, which came late: {error}",
    "shared": "{experts} experts on {workers} processes are shared by {processes} of them, not by {wanted}",
    "experts": "experts without work: {dead}; with too much: {overloaded}",
    "rolled_back": "went back from step {step} to {to}: {error}",
}


News = tuple[str, dict[str, Any]]
"""An event and its facts."""


@dataclass(frozen=True)
class Following:
    """How a blend follows held-out losses. `reference(domain, rows)`: what a domain's mean NLL on rows [S, L] should
    be, in nats."""

    settings: DynamicBlend
    reference: Callable[[str, np.ndarray], float]


@dataclass(frozen=True)
class Job:
    """What is trained on what, and how."""

    corpus_folder: Path
    blend: Blend
    training: TrainingSettings
    metrics: MetricsSettings
    following: Following | None = None
    began: Path | None = None  # a mixture's folder at step 0
    carried: tuple[Path, ...] = ()  # further files for the folders of the artifact and its checkpoints
    parents: tuple[str, ...] = ()  # of the artifact, beside the task's
    facts: Mapping[str, Any] = field(default_factory=dict)  # further ones, for its manifest
    news: Sequence[News] = ()  # events of this attempt, from before it trains
    grew: Sequence[tuple[int, int]] = ()  # (step, experts): up to that step a mixture had so few


def train_to_artifact(
    place: Place,
    store: BlobStore,
    job: Job,
    model: PreTrainedModel,
    make_engine: Callable[[PreTrainedModel], Engine],
    context: StageContext,
    attempt: Attempt | None = None,
) -> Manifest | None:
    """Train `model` and publish it as a Hugging Face folder; called on every rank, None on those above 0.

    `attempt`: of which this is a part; None: it is the whole of one. Raises `Interrupted` after a checkpoint where the
    context says stop.
    """
    corpus = Corpus(job.corpus_folder)
    if not corpus.attend_across_documents:
        keep_apart(model, corpus.end_of_text_id)
    engine = make_engine(model)
    with nullcontext(attempt) if attempt else attempting(store, place.artifact.prefix, context, engine.rank) as whole:
        return _Work(place, store, job, corpus, engine, whole, context).make()


def sampler_of(place: Place, corpus: Corpus, blend: Blend, training: TrainingSettings) -> BlendedSampler:
    """What a task trains on, from its begin."""
    # Another order a stage, so that a branch does not begin with what the seed began with; the same for all mixtures
    order = zlib.crc32(f"{place.task.kind}/{training.seed}".encode())
    return BlendedSampler(corpus, blend, order)


def in_words(experts: Sequence[str], most: int = 4) -> str:
    """Some of them, and how many more there are."""
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return ", ".join(experts[:most]) + more if experts else "none"


class _Work:
    """The work of an attempt: the training loop, with those who listen to it, and the artifact at its end."""

    def __init__(
        self,
        place: Place,
        store: BlobStore,
        job: Job,
        corpus: Corpus,
        engine: Engine,
        attempt: Attempt,
        context: StageContext,
    ) -> None:
        lease = attempt.lease
        self._place, self._job, self._engine, self._lease = place, job, engine, lease
        self._events, self._context = attempt.events, context
        self._started = time.monotonic()
        self._note = ""
        self._point: Point | None = None
        self._corpus = corpus
        settings = job.training
        retention = Retention(settings.keep_last, settings.keep_every)
        task = place.task
        self._checkpoints = Checkpoints(store, task.kind, task.id, lease, retention, self._tell, carried=job.carried)
        self._sampler = sampler_of(place, corpus, job.blend, settings)
        mixture = as_mixture(engine.model)
        self._experts = tuple(mixture.config.expert_names or ()) if mixture is not None else ()
        self._watch: RoutingWatch | None = None
        if lease is not None and mixture is not None and mixture.config.mixture_layers and job.began is not None:
            began = TensorFiles(sorted(job.began.glob("model*.safetensors")))
            self._watch = RoutingWatch(mixture, job.metrics.routing, began, tuple(self._sampler.weights))
        following = self._following(job.following) if job.following else None
        self._training = Training(
            engine,
            following or self._sampler,
            self._corpus.sequence_length,
            settings,
            self._checkpoints,
            self._report,
            self._tell,
            context.should_stop,
            following.follow if following else lambda step: None,
            self._watch,
        )
        attempt.step = lambda: self.step
        self._store = store
        self._metrics: Metrics | None = None
        self._left_out = tuple(facts["branch"] for what, facts in job.news if what == "left_out")
        self._routing: RoutingReport | None = None
        self._curves: dict[str, float] = {}  # the last value of each

    def _following(self, following: Following) -> FollowingSampler:
        """The sampler whose blend follows losses, on this rank's share of held-out rows."""
        ranks, sequences = self._engine.world_size, following.settings.sequences
        rows: dict[str, np.ndarray] = {}
        for domain in self._sampler.weights:
            found = self._corpus.held_out(domain)
            count = min(len(found), sequences) // ranks * ranks
            if not count:
                raise SettingsError(
                    f"mix.dynamic_blend looks at {min(len(found), sequences)} held-out sequences of {domain}, fewer "
                    f"than the {ranks} processes: raise its sequences or data.held_out_fraction"
                )
            spread = found[np.arange(count) * len(found) // count]
            rows[domain] = spread[self._engine.rank :: ranks].astype(np.int64)
        return FollowingSampler(
            self._sampler,
            following.settings,
            {domain: torch.from_numpy(mine) for domain, mine in rows.items()},
            lambda domain: following.reference(domain, rows[domain]),
            self._engine,
            self._tell,
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return self._training.step

    def make(self) -> Manifest | None:
        """Train from the newest checkpoint to the end, and publish."""
        self._training.resume()
        self._tell("resumed", step=self.step)
        for what, facts in self._job.news:
            self._tell(what, **facts)
        task = self._place.task
        prefix, metrics = self._place.artifact.prefix, self._job.metrics
        attempt = self._lease.number if self._lease else None
        self._metrics = Metrics(metrics, self._store, prefix, task.name, attempt, self.step)
        try:
            curve = self._training.run()
        finally:
            self._metrics.close()
        manifest = self._publish(curve)
        if manifest is not None:
            self._checkpoints.clear()
        return manifest

    def _report(self, point: Point) -> None:
        """A step is done."""
        self._point = point
        routing = self._watched(point.step)
        seen, fine = (routing.scalars, routing.by_domain_and_layer) if routing else ({}, {})
        self._draw(point.step, self._scalars(point) | seen, fine)
        self._say()

    def _draw(self, step: int, scalars: dict[str, float], fine: dict[str, float] | None = None) -> None:
        """Add a step to curves; `fine` ones are too many to be reported, and only written."""
        self._curves = self._curves | scalars  # the one before is read by the thread that reports it
        if self._metrics is not None:
            self._metrics.write(step, scalars | (fine or {}))

    def _watched(self, step: int) -> RoutingReport | None:
        """What a mixture's routers did, from time to time."""
        load = self._engine.last_load
        if self._watch is None or load is None:
            return None
        self._watch.add(load)
        if step % self._job.metrics.routing.every:
            return None
        before, self._routing = self._routing, self._watch.report()
        dead, overloaded = self._routing.dead, self._routing.overloaded
        if (dead, overloaded) != ((before.dead, before.overloaded) if before else ((), ())):
            self._tell("experts", step=step, dead=in_words(dead), overloaded=in_words(overloaded))
        return self._routing

    def _say(self) -> None:
        """Report how far it is."""
        self._context.report(
            Progress(
                step=self.step,
                total_steps=self._job.training.steps,
                loss=self._point.nll if self._point else None,
                tokens_per_second=self._point.tokens_per_second if self._point else None,
                checkpoint_step=self._checkpoints.committed_step,
                note=self._note,
                load_imbalance=self._routing.imbalance if self._routing else None,
                dead_experts=len(self._routing.dead) if self._routing else None,
                experts=self._experts,
                left_out=self._left_out,
                curves=self._curves,
            )
        )

    def _tell(self, what: str, **facts: Any) -> None:
        """Something happened. `checkpoint` is told by the thread that uploads, all else by the one that trains."""
        self._events.tell(what, **facts)
        if what == "checkpoint" and self._metrics is not None:
            self._metrics.flush()
        if what == "rolled_back" and self._metrics is not None:
            self._metrics.go_back(facts["to"])
        if what == "blend":
            named = (("blend", facts["weights"]), ("held_out", facts["held_out"]))
            self._draw(facts["step"], {f"{name}/{domain}": value for name, by in named for domain, value in by.items()})
        if what in NOTES:
            self._note = NOTES[what].format(**facts)
            self._say()

    def _scalars(self, point: Point) -> dict[str, float]:
        """A point by the names that curves have."""
        engine = self._engine
        scalars = {
            "loss/nll": point.nll,
            "grad_norm": point.grad_norm,
            "lr": point.lr,
            "throughput/tokens_per_second": point.tokens_per_second,
            "memory/peak_gib": engine.memory.peak() / GIB,
        }
        if point.load_balance or point.router_z:
            scalars |= {"loss/load_balance": point.load_balance, "loss/router_z": point.router_z}
        scalars |= {f"time/{what}": seconds for what, seconds in self._training.times.items()}
        given = self._job.metrics.peak_tflops
        peak = given * 1e12 if given else peak_flops(engine.device_name)
        if peak is not None:
            flops = point.tokens_per_second * self._flops(1)
            scalars["throughput/mfu"] = flops / (peak * engine.world_size)
        return scalars

    def _flops(self, tokens: int) -> float:
        return training_flops(self._engine.model.config, self._corpus.sequence_length, tokens)

    def _spent(self) -> float:
        """FLOPs of all steps, each with the experts that there were."""
        settings, config = self._job.training, self._engine.model.config
        spent, done = 0.0, 0
        for step, experts in (*self._job.grew, (settings.steps, None)):
            had = copy(config)
            if experts is not None:
                had.num_experts = experts
            spent += training_flops(had, self._corpus.sequence_length, (step - done) * settings.batch_tokens)
            done = step
        return spent

    def _publish(self, curve: list[Point]) -> Manifest | None:
        state = self._engine.state()
        if state is None or self._lease is None:
            return None
        settings = self._job.training
        task = self._place.task
        tokens = settings.steps * settings.batch_tokens
        with tempfile.TemporaryDirectory(prefix="bam-model-") as temporary:
            folder = Path(temporary)
            state.write_model(folder)
            shutil.copytree(self._corpus.tokenizer_folder, folder, dirs_exist_ok=True)
            for path in self._job.carried:
                shutil.copy(path, folder)
            (folder / CURVE).write_text(json.dumps([asdict(point) for point in curve]))
            facts = {
                "sequences_drawn": self._sampler.drawn,
                "computed_on": [asdict(leg) for leg in self._training.legs],
                "refused_checkpoints": self._training.refused,
                **self._job.facts,
            }
            manifest = Manifest(
                id=task.id,
                kind=task.kind,
                name=task.name,
                parents=(*task.parents, *self._job.parents),
                settings={"training": settings.model_dump(mode="json"), "blend": self._job.blend},
                step=settings.steps,
                tokens=tokens,
                compute=ComputeCost(
                    flops=self._spent(),
                    device_seconds=round(self._training.device_seconds(), 1),
                    wall_seconds=round(time.monotonic() - self._started, 1),
                ),
                metrics={"loss/nll": curve[-1].nll},
                facts=facts,
                attempt=self._lease.number,
            )
            return patient()(self._place.artifact.publish, folder, manifest, self._lease.check)
