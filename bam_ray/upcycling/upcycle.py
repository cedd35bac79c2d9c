"""Upcycling of a seed and its branches: they are checked, and the mixture at step 0 is planned and written.

sources = {"seed": TensorReader(store, "seeds/..."), "code": ..., "law": ...}
upcycle(sources, BamSettings(method="bam"), ModelWriter(target), manifest)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.families import Family, Role
from bam_ray.settings import BranchedMixture, Losses, MixtureSettings, RoutedMixture, SplitSettings
from bam_ray.upcycling.methods import experts_of, models_of, weights_embedding_rows
from bam_ray.upcycling.plan import Planner, averaged_model
from bam_ray.upcycling.plan_config import mixture_config
from bam_ray.upcycling.preflight import check_seed, check_sources
from bam_ray.upcycling.routers.counts import TokenCounts
from bam_ray.upcycling.split.slices import partitions_of
from bam_ray.upcycling.write import PARTITION, ModelPlan, ProgressCallback, Upcycled, write_model


@dataclass(frozen=True)
class DomainText:
    """The text of the experts' domains, by the name of the expert. The settings decide what is needed.

    Attributes:
        rows: Some rows of tokens, int64 [S, L] (`text_sequences`).
        counts: The counts of all text of the model that the expert is made from (`needs_token_counts`).
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, TokenCounts] = field(default_factory=dict)


def upcycle(
    sources: Mapping[str, TensorReader],
    settings: MixtureSettings,
    writer: ModelWriter,
    manifest: Manifest,
    losses: Losses | None = None,
    text: DomainText | None = None,
    progress: ProgressCallback | None = None,
) -> Upcycled:
    """Write the mixture of `sources`, or their average if the method makes a dense model, and commit it.

    Args:
        sources: The models by name, the seed first.
        settings: The method and its settings.
        writer: The writer of the folder.
        manifest: The manifest to commit. The digests of the files are added.
        losses: The losses of the routers, which the mixture's configuration states.
        text: The text of the experts' domains.
        progress: Called after each chunk and each layer of routers.

    Raises:
        UpcycleError: The sources do not fit each other, or hold values that are not finite.
        BlobExists: The folder has a committed model already.
    """
    text = text or DomainText()
    planned = plan(sources, settings, losses or Losses(), text)
    return write_model(planned, sources, writer, manifest, text.rows, progress)


def plan(sources: Mapping[str, TensorReader], settings: MixtureSettings, losses: Losses, text: DomainText) -> ModelPlan:
    """Make all checks, and return what `upcycle` would write.

    Raises:
        UpcycleError: The sources do not fit each other or the settings.
    """
    family = check_sources(sources)
    check_branches(sources, settings, family)
    if settings.text_sequences and not text.rows:
        raise UpcycleError("these settings need text: give some of each domain (--text NAME=URI)")
    counts = text.counts if settings.needs_token_counts else {}
    if settings.needs_token_counts:
        check_counts(sources, settings, family, counts)
    seed = next(iter(sources.values()))
    chosen = settings.model_dump(mode="json", exclude_defaults=True)  # config.json and manifest.json have the others
    history = [{"upcycle": chosen, "of": {name: each.uri for name, each in sources.items()}}]
    if not isinstance(settings, RoutedMixture):
        config = {key: value for key, value in seed.config.items() if key != "auto_map"}  # its code is not copied
        return ModelPlan(config, averaged_model(family, sources, settings, counts), [], history)
    experts = experts_of(list(sources), settings)
    partitions = partitions_of(family, seed, settings, text.rows) if isinstance(settings, SplitSettings) else []
    with_prior = settings.router.prior != "none"
    any_counts = counts[experts[0].source] if with_prior else None
    config = mixture_config(family, seed, experts, settings, losses, partitions, any_counts)
    planner = Planner(family, sources, experts, config, settings, partitions, counts)
    plain = [{"experts": each.experts, "shared": each.shared} for each in partitions]
    extra_files = {PARTITION: json.dumps(plain, separators=(",", ":")).encode()} if plain else {}
    return ModelPlan(config, planner.outputs(), planner.routers(), history, settings.seed, extra_files)


def check_branches(sources: Mapping[str, TensorReader], settings: MixtureSettings, family: Family) -> None:
    """Check that there are enough branches, or none if the method uses none, and that they descend from the seed.

    Raises:
        UpcycleError: They do not.
    """
    if not isinstance(settings, BranchedMixture):
        if len(sources) > 1:
            raise UpcycleError(f"method {settings.method} makes all experts from the seed: leave out the branches")
        return
    if settings.same_seed:
        check_seed(sources, family)
    if len(sources) < 2:
        raise UpcycleError(f"method {settings.method} needs branches: name some, or use method sparse or split")
    models = models_of(list(sources), settings)
    if len(models) < 2:
        raise UpcycleError(
            f"with seed_expert=false, method {settings.method} needs two branches or more: name another one, or leave "
            "out seed_expert"
        )
    weights = settings.average.weights
    unknown = sorted(set(weights) - set(models))
    if unknown:
        raise UpcycleError(f"average.weights names {unknown}, which are not among the models {models}")
    if weights and not any(weights.get(name, 1.0) for name in models):
        raise UpcycleError("average.weights are all 0: give at least one model a weight")


def check_counts(
    sources: Mapping[str, TensorReader],
    settings: MixtureSettings,
    family: Family,
    counts: Mapping[str, TokenCounts],
) -> None:
    """Check that there are counts of the text of each model and of no other, and that they fit the embedding.

    Raises:
        UpcycleError: They do not.
    """
    models = models_of(list(sources), settings)
    setting = "embeddings: counts" if weights_embedding_rows(settings) else "router.prior: bigram"
    missing = [name for name in models if name not in counts or not counts[name].total]
    if missing:
        raise UpcycleError(
            f"{setting} needs text of every model, but there is none of {missing}: give it "
            "(--text NAME=SOURCE), or leave out this setting"
        )
    unknown = sorted(set(counts) - set(models))
    if unknown:
        raise UpcycleError(f"there is text for {unknown}, which are not among the models {models}: leave it out")
    rows = next(iter(sources.values())).specs[family.name_of(Role.EMBEDDING)].shape[0]
    most = max(len(each.tokens) for each in counts.values())
    if most > rows:
        raise UpcycleError(
            f"the text was counted with a vocabulary of {most} tokens, but the embedding has only {rows} rows: use the "
            "tokenizer of the models"
        )
