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
from bam_ray.evaluation.compare import compare
from bam_ray.evaluation.comparison import COMPARISON, PAGE, Comparison
from bam_ray.evaluation.results import Results
from bam_ray.evaluation.wall_clock import Cluster
from bam_ray.settings import Strict

Model = TypeVar("Model", bound=Strict)

NAME = "comparison"
RESULTS = "results.json"


def compare_reports(store: BlobStore, reports: Mapping[int, Artifact], cluster: Cluster) -> tuple[Artifact, Comparison]:
    """Compare the reports of all training seeds; return the committed artifact and the comparison in it.

    Args:
        store: The store of the run.
        reports: The committed report of each training seed.
        cluster: The cluster for the comparison in equal time.

    Raises:
        CheckpointError: A report is missing or cannot be read, or the training seeds differ in their models or in their
            held-out text.
    """
    ids = tuple(report.id for report in reports.values())
    content = {"training_seeds": list(reports), "files": [COMPARISON, PAGE], "cluster": cluster.model_dump()}
    artifact = Artifact(store, ArtifactKind.COMPARISONS, identity(NAME, content, ids))
    manifest = artifact.manifest()
    if manifest is not None:
        try:
            return artifact, read_comparison(artifact)
        except DigestMismatch as error:
            artifact.set_aside(manifest, str(error))
    results = {seed: _read(report, RESULTS, Results) for seed, report in reports.items()}
    comparison = compare(results, cluster, ids)
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
