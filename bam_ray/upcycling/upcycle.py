"""Seed and branches to a mixture at step 0: checked, planned, then written while it is read.

sources = {"seed": TensorReader(store, "seeds/..."), "code": ..., "law": ...}
upcycle(sources, MixtureSettings(method="bam"), ModelWriter(target), manifest)
"""

import json
from collections.abc import Mapping

from torch import Tensor

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.settings import Losses, MixtureSettings
from bam_ray.upcycling.plan import Planner, experts_of, mixture_config
from bam_ray.upcycling.preflight import check_seed, check_sources
from bam_ray.upcycling.split.slices import partitions_of
from bam_ray.upcycling.write import PARTITION, Planned, Progress, Upcycled, write_mixture


def upcycle(
    sources: Mapping[str, TensorReader],
    settings: MixtureSettings,
    writer: ModelWriter,
    manifest: Manifest,
    losses: Losses | None = None,
    texts: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Upcycled:
    """Write the mixture of `sources` (the seed first) and commit it with `manifest`.

    `texts` are rows of tokens, int64 [S, L], by the name of the expert whose domain they are; the settings say whether
    any are needed. Raises `UpcycleError` where the sources do not fit each other or hold values that are not finite,
    `BlobExists` where there is a committed mixture.
    """
    planned = plan(sources, settings, losses or Losses(), texts or {})
    return write_mixture(planned, sources, writer, manifest, texts, progress)


def plan(
    sources: Mapping[str, TensorReader], settings: MixtureSettings, losses: Losses, texts: Mapping[str, Tensor]
) -> Planned:
    """What `upcycle` would write, all checks made."""
    family = check_sources(sources)
    if settings.same_seed:
        check_seed(sources, family)
    seed = next(iter(sources.values()))
    if not settings.has_branches and len(sources) > 1:
        raise UpcycleError(f"method {settings.method} makes its experts of the seed alone: leave out the branches")
    if settings.has_branches and len(sources) < 2:
        raise UpcycleError(
            f"method {settings.method} needs branches beside the seed: name some, or use sparse or split"
        )
    unknown = sorted(set(settings.average.weights) - set(sources))
    if unknown:
        raise UpcycleError(f"average.weights names {unknown}, which is none of the models {list(sources)}")
    if settings.average.weights and not any(settings.average.weights.get(name, 1.0) for name in sources):
        raise UpcycleError("average.weights are all 0: give at least one model a weight")
    if settings.needs_text and not texts:
        raise UpcycleError("these settings are fitted to text: give some of each domain (--text NAME=URI)")
    experts = experts_of(list(sources), settings)
    partitions = partitions_of(family, seed, settings, texts) if settings.method == "split" else []
    config = mixture_config(family, seed, experts, settings, losses, partitions)
    planner = Planner(family, sources, experts, config, settings, partitions)
    chosen = settings.model_dump(mode="json", exclude_defaults=True)  # all of them are in the configuration
    history = [{"upcycle": chosen, "of": {name: each.uri for name, each in sources.items()}}]
    plain = [{"experts": each.experts, "shared": each.shared} for each in partitions]
    more = {PARTITION: json.dumps(plain, separators=(",", ":")).encode()} if plain else {}
    return Planned(config, planner.outputs(), planner.routers(), history, settings.seed, more)
