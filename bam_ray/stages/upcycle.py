"""Upcycle: seed and branches to a mixture at step 0, from store to store."""

import tempfile
from pathlib import Path

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.control.tasks import Progress, StageContext
from bam_ray.errors import Interrupted
from bam_ray.settings import Recipe
from bam_ray.stages.lineage import Place
from bam_ray.upcycling import upcycle

MIB = 1 << 20


def upcycle_mixture(name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> Manifest:
    """The mixture `name` of `recipe.upcycle`, its weights read straight from the store by byte range."""
    place = Place(recipe, store, "upcycled", name)
    origins = {"seed": place.other("seeds", "seed")}
    origins |= {domain: place.other("branches", domain) for domain in recipe.branch.domains}
    settings = recipe.upcycle.mixtures[name]

    def progress(done: int, total: int) -> None:
        if context.should_stop():
            raise Interrupted(f"upcycling {name} was not finished; the same command does it anew")
        context.report(Progress(step=done // MIB, total_steps=total // MIB, note="MiB written"))

    with tempfile.TemporaryDirectory(prefix="bam-upcycle-") as folder:
        sources = {source: TensorReader(store, artifact.prefix) for source, artifact in origins.items()}
        upcycle(sources, settings, Path(folder), recipe.mix.losses, progress)
        return place.artifact.publish(
            Path(folder),
            Manifest(
                id=place.task.id,
                kind="upcycled",
                name=name,
                parents=place.task.parents,
                settings=settings.model_dump(mode="json"),
            ),
        )
