"""A training checkpoint as a Hugging Face folder, copied file by file: no model is loaded, no file is held whole."""

import json
import re
from dataclasses import dataclass

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import MANIFEST, ArtifactKind, Manifest
from bam_ray.checkpoint.output_folder import check_disk_space, new_model_folder
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.control import status
from bam_ray.errors import BlobNotFound, CheckpointError, DigestMismatch
from bam_ray.settings import StoreSettings
from bam_ray.training.checkpoints import TRAINER
from bam_ray.training.state import OPTIMIZER

MOST_TRIES = 3  # at the newest checkpoint, while the run prunes those that were


@dataclass(frozen=True)
class Step:
    """One training checkpoint of an artifact."""

    place: Artifact  # below the artifact that is trained
    manifest: Manifest


def export_step(run: BlobStore, kind: ArtifactKind, name: str, out: StoreSettings, step: int | None = None) -> Manifest:
    """Copy the newest checkpoint of `kind/name` (or that of `step`) to a new folder at `out`, with the tokenizer.

    The run may be training: where the newest was pruned while it was copied, the one that is newest then is copied.

    Returns its manifest. Raises `CheckpointError` where there is no such checkpoint, or none that stays long enough;
    `DigestMismatch` where one of its files is damaged, `BlobNotFound` where one is missing.
    """
    for _ in range(MOST_TRIES if step is None else 1):
        found = find_step(run, kind, name, step)
        try:
            return _copy(run, found, name, out)
        except (BlobNotFound, DigestMismatch):
            if found.place.manifest() == found.manifest:
                raise  # nobody pruned it
    raise CheckpointError(
        f"{found.place.uri} was pruned while it was copied: training.keep_every keeps some checkpoints for good"
    )


def _copy(run: BlobStore, found: Step, name: str, out: StoreSettings) -> Manifest:
    """`found` as a new folder at `out`; where that fails, nothing is left there."""
    corpus = Artifact(run, ArtifactKind.CORPORA, id_of(run, ArtifactKind.CORPORA, "corpus"))
    tokenizer = corpus.manifest()
    if tokenizer is None:
        raise CheckpointError(f"{corpus.uri} is not committed: {run.uri} has no tokenizer")
    prefix = found.place.prefix
    files = {
        name: (f"{prefix}/{name}", entry)
        for name, entry in found.manifest.files.items()
        if name not in (OPTIMIZER, TRAINER, "config.json")
    } | {
        name.removeprefix("tokenizer/"): (f"{corpus.prefix}/{name}", entry)
        for name, entry in tokenizer.files.items()
        if name.startswith("tokenizer/")
    }
    check_disk_space(out.uri, sum(entry.size for _, entry in files.values()))
    with new_model_folder(out) as store:
        writer = ModelWriter(store)
        for file, (key, entry) in files.items():
            writer.copy_file(file, run, key, entry)
        curve = json.loads(run.get(f"{prefix}/{TRAINER}"))["curve"]
        manifest = Manifest(
            id=found.place.id,
            kind=found.place.kind,
            name=name,
            parents=(f"{run.uri}/{prefix}", corpus.id),
            step=found.manifest.step,
            attempt=found.manifest.attempt,
            metrics={"loss/nll": curve[-1]["nll"]} if curve else {},
        )
        return writer.commit(run.get(f"{prefix}/config.json").decode(), manifest)


def find_step(run: BlobStore, kind: ArtifactKind, name: str, step: int | None) -> Step:
    """The checkpoint of `step` that the newest attempt wrote, or (None) the newest of all."""
    artifact = Artifact(run, kind, id_of(run, kind, name))
    names = [
        key.split("/")[-2] for key in run.list(f"{artifact.prefix}/steps/") if key.endswith(f"/{MANIFEST}")
    ]  # by attempt, then step
    there = sorted({int(below.partition("-")[2]) for below in names})
    fitting = [below for below in names if step is None or int(below.partition("-")[2]) == step]
    for below in reversed(fitting):
        place = Artifact(run, kind, artifact.id, "steps", below)
        manifest = place.manifest()
        if manifest is not None:  # else pruned since it was listed
            return Step(place, manifest)
    what = "no checkpoint" if step is None else f"no checkpoint of step {step} (of {there})"
    hint = "; its last step is the artifact itself" if artifact.manifest() else ""
    raise CheckpointError(f"{artifact.uri} has {what}{hint}: training.keep_every keeps some for good")


def id_of(run: BlobStore, kind: ArtifactKind, name: str) -> str:
    """The id of `kind/name` as the run was last told it, or the only one there is where no driver wrote a status."""
    now = status.read(run)
    rows = [row.id for row in now.rows if (row.kind, row.name) == (kind, name)] if now else []
    ids = rows or sorted({key.split("/")[1] for key in run.list(f"{kind}/{name}-")})
    ids = [id for id in ids if re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{12}}", id)]
    if len(ids) != 1:
        raise CheckpointError(
            f"{run.uri} has {len(ids)} artifacts called {kind}/{name}: `bam status {run.uri}` shows what it has"
        )
    return ids[0]
