"""`endpoints/<name>.json` at the run root: the models that the endpoint of a run serves, and those before them.

    endpoints/bam.json     of the endpoint that serves the mixture `bam`

`bam serve` writes it. `bam serve --rollback` reads which models were served before, follow mode reads which ones are
new, and `bam status` shows it.

Limits: two endpoints that serve the same name from the same store, on two clusters, share the record.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import BlobNotFound, CheckpointError, StoreError

ENDPOINTS = "endpoints"
MOST_BEFORE = 20  # models that a record keeps, besides those that are served

ServedIds = tuple[str, ...]
"""The models that are served together, as `kind/id`: one mixture, or the members of an ensemble."""


class EndpointRecord(BaseModel):
    """The models of one endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str  # of the model in requests
    served: ServedIds
    since: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    url: str = ""
    before: tuple[ServedIds, ...] = ()  # the models that were served before, newest first
    seen: tuple[ServedIds, ...] = ()  # the models that follow mode does not roll out, because they are not new
    note: str = ""  # the reason why newer models are not served

    def serve(self, models: ServedIds) -> "EndpointRecord":
        """Return the record after `models` have replaced those that were served."""
        before = tuple(each for each in (self.served, *self.before) if each != models)
        changes = {"served": models, "since": datetime.now(UTC), "before": before[:MOST_BEFORE], "note": ""}
        return self.model_copy(update=changes)

    def roll_back(self) -> "EndpointRecord":
        """Return the record after the models that were served before have replaced the present ones.

        Raises:
            CheckpointError: No models were served before.
        """
        if not self.before:
            raise CheckpointError(
                f"no models were served as {self.name} before {' + '.join(self.served)}: serve others first"
            )
        changes = {"served": self.before[0], "since": datetime.now(UTC), "before": self.before[1:]}
        return self.model_copy(update={**changes, "note": f"rolled back from {' + '.join(self.served)}"})

    def see(self, models: Sequence[ServedIds]) -> "EndpointRecord":
        """Return the record with `models` among those that follow mode does not roll out."""
        return self.model_copy(update={"seen": tuple(dict.fromkeys([*self.seen, *models]))})


def write_endpoint(store: BlobStore, record: EndpointRecord) -> None:
    """Write the record of an endpoint."""
    store.put(f"{ENDPOINTS}/{record.name}.json", record.model_dump_json(indent=1).encode())


def read_endpoint(store: BlobStore, name: str) -> EndpointRecord | None:
    """Return the record of the endpoint that serves `name`; None if there is none.

    Raises:
        StoreError: The file is not a valid record.
    """
    key = f"{ENDPOINTS}/{name}.json"
    try:
        return EndpointRecord.model_validate_json(store.get(key))
    except BlobNotFound:
        return None
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise StoreError(f"{store.uri}/{key} is not a valid record ({message}): delete it, then serve again") from None


def read_endpoints(store: BlobStore) -> list[EndpointRecord]:
    """Return the records of all endpoints of a run."""
    names = [key.removeprefix(f"{ENDPOINTS}/").removesuffix(".json") for key in store.list(f"{ENDPOINTS}/")]
    return [record for name in names if (record := read_endpoint(store, name)) is not None]


def committed_mixtures(store: BlobStore, name: str, seen: Sequence[ServedIds] = ()) -> list[Artifact]:
    """Return the committed mixtures of a name that are not in `seen`, in the order of their commit."""
    kind = ArtifactKind.MIXTURES
    ids = {key.split("/")[1] for key in store.list(f"{kind}/{name}-")}
    known = {models[0] for models in seen if models}
    found = []
    for id in sorted(ids):
        if re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{12}}", id) and f"{kind}/{id}" not in known:
            artifact = Artifact(store, kind, id)
            manifest = artifact.manifest()
            if manifest is not None:
                found.append((manifest.created, artifact))
    return [artifact for _, artifact in sorted(found, key=lambda each: each[0])]
