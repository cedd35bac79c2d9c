"""Corpus: text of all domains, near-deduplicated, split, tokenised and packed once."""

import tempfile
from pathlib import Path

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.data import build_corpus
from bam_ray.errors import Interrupted
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import Recipe
from bam_ray.stages.lineage import Place


def make_corpus(name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> Manifest:
    """Build the corpus of `recipe.data` and publish it."""
    place = Place(recipe, store, ArtifactKind.CORPORA, name)
    steps = 0

    def note(text: str) -> None:
        nonlocal steps
        if context.should_stop():
            raise Interrupted("the corpus was not finished; the same command builds it anew")
        context.report(Progress(step=steps, total_steps=2 * len(recipe.data.domains) + 1, note=text))
        steps += 1

    with tempfile.TemporaryDirectory(prefix="bam-corpus-") as folder:
        facts = build_corpus(recipe.data, Path(folder), note)
        note("uploading")
        manifest = Manifest(
            id=place.task.id,
            kind=ArtifactKind.CORPORA,
            name=name,
            settings=recipe.data.model_dump(mode="json"),
            tokens=sum(domain["train_tokens"] for domain in facts["domains"].values()),
            facts=facts,
        )
        return place.artifact.publish(Path(folder), manifest)
