"""Upcycle: seed and branches to a mixture at step 0, from store to store."""

import contextlib
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.data import Corpus
from bam_ray.errors import BlobExists, CheckpointError, Interrupted
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import BranchedMixture, MixtureSettings, Recipe, RoutedMixture
from bam_ray.stages.lineage import Place
from bam_ray.upcycling import upcycle

MIB = 1 << 20


def upcycle_mixture(name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> Manifest:
    """The mixture `name` of `recipe.upcycle`: weights are read from the store by byte range, and written as they are
    made."""
    place = Place(recipe, store, ArtifactKind.UPCYCLED, name)
    settings: MixtureSettings = recipe.upcycle.mixtures[name]
    origins = {"seed": place.other(ArtifactKind.SEEDS, "seed")}
    branches = branches_of(place, recipe, store)
    if isinstance(settings, BranchedMixture):
        origins |= {domain: place.other(ArtifactKind.BRANCHES, domain) for domain in branches}
        settings = without_missing_branches(settings, len(recipe.branch.domains) - len(branches), origins)
    sources = {source: TensorReader(store, artifact.prefix) for source, artifact in origins.items()}
    for source in sources.values():
        source.check_digests()

    def progress(done: int, total: int) -> None:
        if context.should_stop():
            raise Interrupted(f"upcycling {name} was not finished; the same command does it anew")
        context.report(Progress(step=done // MIB, total_steps=total // MIB, note="MiB written"))

    task = place.task
    manifest = Manifest(
        id=task.id,
        kind=task.kind,
        name=name,
        parents=tuple(artifact.id for artifact in origins.values()),
        settings=settings.model_dump(mode="json"),
    )
    try:
        made = upcycle(
            sources,
            settings,
            ModelWriter(store, place.artifact.prefix),
            manifest,
            recipe.mix.losses,
            _texts(settings, recipe, place, branches),
            progress,
        )
    except BlobExists:  # another attempt was faster; what has one identity has one content
        committed = place.artifact.manifest()
        assert committed is not None
        return committed
    return made.manifest


def branches_of(place: Place, recipe: Recipe, store: BlobStore) -> list[str]:
    """The branches that the mixture starts with: all, or those that have arrived when this is first asked.

    That is decided once, in the store, for every attempt. Raises `CheckpointError` where they are too few.
    """
    quorum = place.task.quorum
    if quorum is None:
        return recipe.branch.domains
    arrived = [name for _, name in quorum.branches if place.other(ArtifactKind.BRANCHES, name).manifest() is not None]
    if len(arrived) < quorum.at_least:
        raise CheckpointError(
            f"{len(arrived)} of the {len(quorum.branches)} branches are committed, and upcycle.when asks for at least "
            f"{quorum.at_least}: run the stage that makes them"
        )
    key = f"{place.artifact.prefix}/quorum/branches.json"
    with contextlib.suppress(BlobExists):
        store.put_if_absent(key, json.dumps(arrived).encode())
    decided: list[str] = json.loads(store.get(key))
    return decided


def without_missing_branches(settings: BranchedMixture, missing: int, models: Collection[str]) -> BranchedMixture:
    """Return the settings of a mixture of `models` alone: it has one expert less for each missing branch."""
    if not missing:
        return settings
    weights = {name: weight for name, weight in settings.average.weights.items() if name in models}
    update: dict[str, Any] = {"average": settings.average.model_copy(update={"weights": weights})}
    if isinstance(settings, RoutedMixture) and settings.num_experts is not None:
        update["num_experts"] = settings.num_experts - missing
    return settings.model_copy(update=update)


def _texts(settings: MixtureSettings, recipe: Recipe, place: Place, branches: Sequence[str]) -> dict[str, Tensor]:
    """Rows of tokens by expert, spread evenly over each domain's training text; the seed stands for general text."""
    if not settings.text_sequences:
        return {}
    corpus = Corpus(place.other(ArtifactKind.CORPORA, "corpus").fetch())
    domains = {"seed": recipe.data.general, **{name: name for name in branches}}
    count = settings.text_sequences

    def rows(domain: str) -> Tensor:
        train = corpus.train(domain)
        chosen = np.arange(min(count, len(train))) * len(train) // min(count, len(train))
        return torch.from_numpy(train[chosen].astype(np.int64))

    return {expert: rows(domain) for expert, domain in domains.items()}
