"""Copy a training checkpoint to a Hugging Face folder, file by file.

The parts that the ranks of a process group have written are put together, tensor by tensor. No model is loaded, and no
file is held in memory as a whole.
"""

import json
import re
from dataclasses import dataclass
from functools import partial

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import DAMAGED, Artifact
from bam_ray.checkpoint.digests import check_digests
from bam_ray.checkpoint.manifest import ArtifactKind, FileEntry, Manifest
from bam_ray.checkpoint.model_folder import is_part
from bam_ray.checkpoint.output_folder import check_disk_space, new_model_folder
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.control import status
from bam_ray.errors import BlobNotFound, CheckpointError
from bam_ray.settings import StoreSettings
from bam_ray.training.checkpoints import TRAINER, committed_checkpoints

MAX_TRIES = 3  # at copying the newest checkpoint, while the run prunes older ones


@dataclass(frozen=True)
class StepCheckpoint:
    """One training checkpoint: its location below the artifact that is trained, and its manifest."""

    artifact: Artifact
    manifest: Manifest


def export_step(run: BlobStore, kind: ArtifactKind, name: str, out: StoreSettings, step: int | None = None) -> Manifest:
    """Copy a training checkpoint of `kind/name` to a new folder with the tokenizer, and return its manifest.

    The run may be training meanwhile. If the newest checkpoint is pruned while it is copied, the one that is the newest
    by then is copied.

    Args:
        run: The store of the run.
        kind: ArtifactKind of the artifact that is trained.
        name: Name of the artifact that is trained.
        out: Location of the new folder.
        step: Step of the checkpoint. None stands for the newest.

    Raises:
        CheckpointError: There is no such checkpoint, or it was pruned before it was copied.
        DigestMismatch: One of its files is damaged.
        BlobNotFound: One of its files is missing.
    """
    for _ in range(MAX_TRIES if step is None else 1):
        found = find_step(run, kind, name, step)
        try:
            return _copy(run, found, name, out)
        except (BlobNotFound, CheckpointError):
            if found.artifact.manifest() == found.manifest:
                raise  # it was not pruned, so it is damaged
    raise CheckpointError(
        f"{found.artifact.uri} was pruned while it was copied: set training.keep_every to keep some checkpoints"
    )


def _copy(run: BlobStore, found: StepCheckpoint, name: str, out: StoreSettings) -> Manifest:
    """Copy `found` to a new folder at `out`; if that fails, nothing is left there."""
    corpus = Artifact(run, ArtifactKind.CORPORA, find_id(run, ArtifactKind.CORPORA, "corpus"))
    files = _model_files(found)
    parts = {file: files.pop(file)[1] for file in list(files) if is_part(file)}
    files |= _tokenizer_files(corpus)
    check_disk_space(out.uri, sum(entry.size for entry in (*parts.values(), *(entry for _, entry in files.values()))))
    with new_model_folder(out) as writer:
        for file, (key, entry) in files.items():
            writer.copy_file(file, run, key, entry)
        if parts:
            _put_together(run, found, parts, writer)
        curve = json.loads(run.get(found.artifact.key(found.manifest, TRAINER)))["curve"]
        manifest = Manifest(
            id=found.artifact.id,
            kind=found.artifact.kind,
            name=name,
            parents=(found.artifact.uri, corpus.id),
            step=found.manifest.step,
            attempt=found.manifest.attempt,
            metrics={"loss/nll": curve[-1]["nll"]} if curve else {},
        )
        return writer.commit(run.get(found.artifact.key(found.manifest, "config.json")).decode(), manifest)


def _put_together(run: BlobStore, found: StepCheckpoint, parts: dict[str, FileEntry], writer: ModelWriter) -> None:
    """Write the weights whose parts are in the files `parts`, after comparing the digests of these."""
    of_parts = found.manifest.model_copy(update={"files": parts})
    check_digests(run, of_parts, partial(found.artifact.key, of_parts), found.artifact.uri, DAMAGED)
    reader = TensorReader(run, found.artifact.prefix)
    writer.write_tensors(list(reader.specs.values()), lambda spec: reader.chunks(spec.name))


def _model_files(found: StepCheckpoint) -> dict[str, tuple[str, FileEntry]]:
    """Return the key and the digest of each file of the model; the configuration is written separately."""
    return {
        name: (found.artifact.key(found.manifest, name), entry)
        for name, entry in found.manifest.files.items()
        if name not in (TRAINER, "config.json") and not name.startswith("optimizer.")
    }


def _tokenizer_files(corpus: Artifact) -> dict[str, tuple[str, FileEntry]]:
    """Return the key and the digest of each file of the corpus's tokenizer, by its name in a model folder."""
    manifest = corpus.manifest()
    if manifest is None:
        raise CheckpointError(f"{corpus.uri} is not committed, so there is no tokenizer: run the corpus stage first")
    return {
        name.removeprefix("tokenizer/"): (corpus.key(manifest, name), entry)
        for name, entry in manifest.files.items()
        if name.startswith("tokenizer/")
    }


def find_step(run: BlobStore, kind: ArtifactKind, name: str, step: int | None) -> StepCheckpoint:
    """Return the checkpoint of `step` that the newest attempt wrote; for None, the newest of all checkpoints."""
    artifact = Artifact(run, kind, find_id(run, kind, name))
    names = committed_checkpoints(artifact)
    steps = sorted({int(each.partition("-")[2]) for each in names})
    matching = [each for each in names if step is None or int(each.partition("-")[2]) == step]
    for each in reversed(matching):
        checkpoint = Artifact(run, kind, artifact.id, "steps", each)
        manifest = checkpoint.manifest()
        if manifest is not None:  # None if it was pruned since the keys were listed
            return StepCheckpoint(checkpoint, manifest)
    missing = "no checkpoint" if step is None else f"no checkpoint of step {step} (available: {steps})"
    hint = "; its last step is the artifact itself" if artifact.manifest() else ""
    raise CheckpointError(f"{artifact.uri} has {missing}{hint}: set training.keep_every to keep some checkpoints")


def find_id(run: BlobStore, kind: ArtifactKind, name: str) -> str:
    """Return the id of `kind/name` in the run's last status, or the only id in the store if there is no status."""
    now = status.read(run)
    rows = [row.id for row in now.rows if (row.kind, row.name) == (kind, name)] if now else []
    ids = rows or sorted({key.split("/")[1] for key in run.list(f"{kind}/{name}-")})
    ids = [id for id in ids if re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{12}}", id)]
    if len(ids) != 1:
        raise CheckpointError(
            f"{run.uri} has {len(ids)} artifacts named {kind}/{name}: `bam status {run.uri}` shows its artifacts"
        )
    return ids[0]
