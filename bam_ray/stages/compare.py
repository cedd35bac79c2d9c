"""Compare the reports of several training seeds, and write the comparison.

A comparison is an artifact of its own (`comparisons/<id>`), whose parents are the reports. The job makes it from
`results.json` of each report in a second, so it is not a task of a run.
"""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest, identity
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.errors import CheckpointError, DigestMismatch
from bam_ray.evaluation.comparison import COMPARISON, PAGE, Comparison, compare
from bam_ray.evaluation.results import Results
from bam_ray.settings import Strict

Model = TypeVar("Model", bound=Strict)

NAME = "comparison"
RESULTS = "results.json"


def compare_reports(store: BlobStore, reports: Mapping[int, Artifact]) -> tuple[Artifact, Comparison]:
    """Compare the reports of all training seeds; return the committed artifact and the comparison in it.

    Args:
        store: The store of the run.
        reports: The committed report of each training seed.

    Raises:
        CheckpointError: A report is missing or cannot be read, or the training seeds differ in their models or in their
            held-out text.
    """
    ids = tuple(report.id for report in reports.values())
    content = {"training_seeds": list(reports), "files": [COMPARISON, PAGE]}
    artifact = Artifact(store, ArtifactKind.COMPARISONS, identity(NAME, content, ids))
    manifest = artifact.manifest()
    if manifest is not None:
        try:
            return artifact, read_comparison(artifact)
        except DigestMismatch as error:
            artifact.set_aside(manifest, str(error))
    comparison = compare({seed: _read(report, RESULTS, Results) for seed, report in reports.items()}, ids)
    from bam_ray.evaluation.comparison_page import write_comparison  # imports matplotlib

    with scratch_folder(NAME) as folder:
        write_comparison(folder, comparison)
        verdicts = {f"{each.model}, {each.other}": each.verdict for each in comparison.differences}
        artifact.publish(
            folder,
            Manifest(
                id=artifact.id,
                kind=artifact.kind,
                name=NAME,
                parents=ids,
                settings=content,
                facts={"statements": list(comparison.statements), "verdicts": verdicts},
            ),
        )
    return artifact, read_comparison(artifact)


def read_comparison(artifact: Artifact) -> Comparison:
    """Return the comparison in a committed artifact; raises `CheckpointError`."""
    return _read(artifact, COMPARISON, Comparison)


def _read(artifact: Artifact, name: str, model: type[Model]) -> Model:
    try:
        return model.model_validate_json((artifact.fetch() / name).read_bytes())
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise CheckpointError(
            f"{artifact.uri}/{name} cannot be read ({reason}): it was written by another version of bam-ray"
        ) from None
