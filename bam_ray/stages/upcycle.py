"""Upcycle: make a mixture at step 0 from the seed and its branches, reading from and writing to the store."""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import artifact_writer
from bam_ray.data import Corpus
from bam_ray.errors import BlobExists, CheckpointError, Interrupted
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import BranchedMixture, MixtureSettings, RoutedMixture
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.token_counts import read_token_counts
from bam_ray.units import MIB
from bam_ray.upcycling import DomainText, UpcyclingPhase, upcycle


def upcycle_mixture(run: TaskRun) -> Manifest:
    """Make one mixture of `recipe.upcycle`.

    Weights are read from the store by byte range and written as they are computed.
    """
    name, lease = run.task.name, run.take_lease()
    settings: MixtureSettings = run.recipe.upcycle.mixtures[name]
    origins = {"seed": run.parent(ArtifactKind.SEEDS, "seed")}
    branches = starting_branches(run)
    if isinstance(settings, BranchedMixture):
        origins |= {domain: run.parent(ArtifactKind.BRANCHES, domain) for domain in branches}
        settings = without_missing_branches(settings, len(run.recipe.branch.domains) - len(branches), origins)
    for artifact in origins.values():
        artifact.check()  # before a damaged header could fail in another way
    sources = {source: TensorReader(run.store, artifact.prefix) for source, artifact in origins.items()}

    manifest = Manifest(
        id=run.task.id,
        kind=run.task.kind,
        name=name,
        parents=tuple(artifact.id for artifact in origins.values()),
        settings=settings.model_dump(mode="json"),
        attempt=str(lease.number),
    )
    made = upcycle(
        sources,
        settings,
        artifact_writer(run.artifact, lease),
        manifest,
        run.recipe.mix.losses,
        _domain_text(settings, run, branches),
        UpcyclingProgress(name, run.context),
    )
    return made.manifest


class UpcyclingProgress:
    """The progress of upcycling, of which each phase has its own unit, speed and ETA.

    Args:
        name: The name of the mixture.
        context: Receives the progress, and may ask to stop.
        clock: Returns the time in seconds.
    """

    def __init__(self, name: str, context: StageContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._context, self._clock = name, context, clock
        self._phase: UpcyclingPhase | None = None
        self._started = 0.0
        self._before = 0  # what was done when the phase was first reported

    def __call__(self, done: int, total: int, phase: UpcyclingPhase) -> None:
        """Report progress. Raises `Interrupted` if the context asks to stop."""
        if self._context.should_stop():
            raise Interrupted(f"upcycling {self._name} is not finished: run the same command again to repeat it")
        now = self._clock()
        if phase != self._phase:
            self._phase, self._started, self._before = phase, now, done
        advanced = done - self._before
        eta = (now - self._started) * (total - done) / advanced if advanced else None
        if phase == "writing":
            progress = Progress(done // MIB, total // MIB, note="MiB written", eta_seconds=eta)
        else:
            progress = Progress(done, total, note="layers whose routers are fitted to text", eta_seconds=eta)
        self._context.report(progress)


def starting_branches(run: TaskRun) -> list[str]:
    """Return the branches that the mixture starts with: all of them, or those committed at the first call.

    The first call writes its answer to the store, so that every later attempt uses the same branches. If one of them is
    no longer committed, because it was damaged, the answer is replaced by the branches that are committed now. Raises
    `CheckpointError` if fewer branches are committed than `upcycle.when` requires.
    """
    quorum = run.task.quorum
    if quorum is None:
        return run.recipe.branch.domains
    committed = [name for _, name in quorum.branches if run.parent(ArtifactKind.BRANCHES, name).is_committed()]
    if len(committed) < quorum.at_least:
        raise CheckpointError(
            f"{len(committed)} of the {len(quorum.branches)} branches are committed, but upcycle.when requires at "
            f"least {quorum.at_least}: run the branch stage first"
        )
    key = f"{run.artifact.prefix}/quorum/branches.json"
    with contextlib.suppress(BlobExists):
        run.store.put_if_absent(key, json.dumps(committed).encode())
    decided: list[str] = json.loads(run.store.get(key))
    if not set(decided) <= set(committed):
        run.store.put(key, json.dumps(committed).encode())
        return committed
    return decided


def without_missing_branches(settings: BranchedMixture, missing: int, models: Collection[str]) -> BranchedMixture:
    """Return the settings for a mixture of `models` alone, with one expert less for each missing branch."""
    if not missing:
        return settings
    weights = {name: weight for name, weight in settings.average.weights.items() if name in models}
    update: dict[str, Any] = {"average": settings.average.model_copy(update={"weights": weights})}
    if isinstance(settings, RoutedMixture) and settings.num_experts is not None:
        update["num_experts"] = settings.num_experts - missing
    return settings.model_copy(update=update)


def _domain_text(settings: MixtureSettings, run: TaskRun, branches: Sequence[str]) -> DomainText:
    """Return the text that the settings need, from each domain's training text; the seed gets general text.

    Rows are spread evenly over the text, and all of it is counted. Without an expert of the seed, there is no text for
    the seed.
    """
    if not settings.text_sequences and not settings.needs_token_counts:
        return DomainText()
    folder = run.parent(ArtifactKind.CORPORA, "corpus").fetch()
    domains = {name: name for name in branches}
    if settings.includes_seed:
        domains = {"seed": run.recipe.data.general, **domains}
    rows = {}
    if settings.text_sequences:
        corpus = Corpus(folder)
        for expert, domain in domains.items():
            train = corpus.train(domain)
            count = min(settings.text_sequences, len(train))
            rows[expert] = torch.from_numpy(train[np.arange(count) * len(train) // count].astype(np.int64))
    counts = {}
    if settings.needs_token_counts:
        counted = read_token_counts(folder, set(domains.values()))
        counts = {expert: counted[domain] for expert, domain in domains.items()}
    return DomainText(rows, counts)
