"""Manifests: the record of an artifact's identity, its origin and the digest of every file in it.

Problem: a task may be interrupted at any moment, started twice, or requested again with other settings. A reader must
be able to distinguish a complete artifact from a partial one, and a task must find the result of an earlier run.

Design choice: an artifact is a set of files under one prefix of the blob store. Its manifest is written last, by a
conditional put, so an artifact without a manifest is not committed. The identity of an artifact is its name and a hash
of everything that determines its content: its settings and its parents. A finished artifact that is requested again is
therefore found, an interrupted one is resumed under the same name, and changed settings give a new artifact.

A manifest is never changed or deleted. If its files turn out to be damaged, `manifest-0000.damaged.json` says so, and
the artifact is made again and committed as `manifest-0001.json`. The files of an artifact are in a folder that no other
attempt writes to, and the manifest names it.

Limits: an identity covers settings and parents, not the version of the code. The manifest records the version.

    corpora/<id>/manifest.json               names the folder and the files that count
    corpora/<id>/files/<attempt>-<random>/   packed tokens, their counts, the tokenizer, discovered domains
    seeds/<id>/                              the same, with a Hugging Face folder
    branches/<id>/                           a Hugging Face folder per domain
    controls/<id>/                           a dense model that mixtures are compared with
    topics/<id>/                             topics of the corpus, and the topic of each document
    adapters/<id>/                           bundles of LoRA adapters, and their index
    upcycled/<id>/                           a mixture at step 0, as a Hugging Face folder
    upcycled/<id>/quorum/                    since when branches were awaited, and the branches that were used
    mixtures/<id>/                           a trained mixture
    evaluations/<id>/                        the perplexities, the NLL of each token and the routing of one model
    reports/<id>/                            results.json and report.html
    comparisons/<id>/                        comparison.json and index.html, from the reports of several training seeds
    <any of these>/leases/<attempt>.json     the attempts that have started
    <any of these>/steps/<attempt>-<step>/   training checkpoints, each with its own manifest
    epochs/<epoch>.json                      the drivers that have worked on this store
    heartbeats/<driver>.json                 what each of them makes, written again every few seconds
    endpoints/<name>.json                    what an endpoint serves, and has served before
"""

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bam_ray.blobs import BlobStore
from bam_ray.errors import BlobNotFound, CheckpointError

MANIFEST = "manifest.json"


class ArtifactKind(StrEnum):
    """The kind of an artifact, which is the first part of its prefix in the store."""

    CORPORA = "corpora"
    SEEDS = "seeds"
    BRANCHES = "branches"
    CONTROLS = "controls"
    UPCYCLED = "upcycled"
    MIXTURES = "mixtures"
    TOPICS = "topics"
    ADAPTERS = "adapters"
    EVALUATIONS = "evaluations"
    REPORTS = "reports"
    COMPARISONS = "comparisons"

    @property
    def label(self) -> str:
        """The singular noun for messages, for example "branch"."""
        return _LABELS[self]

    @property
    def setting(self) -> str:
        """The recipe setting of the resource request of a task that makes this kind, for messages."""
        return _SETTINGS[self]

    @property
    def trains(self) -> bool:
        """True if a task that makes this kind trains a model."""
        return self in (
            ArtifactKind.SEEDS,
            ArtifactKind.BRANCHES,
            ArtifactKind.CONTROLS,
            ArtifactKind.ADAPTERS,
            ArtifactKind.MIXTURES,
        )


_LABELS = {
    ArtifactKind.CORPORA: "corpus",
    ArtifactKind.SEEDS: "seed",
    ArtifactKind.BRANCHES: "branch",
    ArtifactKind.CONTROLS: "control",
    ArtifactKind.UPCYCLED: "upcycled mixture",
    ArtifactKind.MIXTURES: "mixture",
    ArtifactKind.TOPICS: "topics",
    ArtifactKind.ADAPTERS: "adapters",
    ArtifactKind.EVALUATIONS: "evaluation",
    ArtifactKind.REPORTS: "report",
    ArtifactKind.COMPARISONS: "comparison",
}
_SETTINGS = {
    ArtifactKind.CORPORA: "the recipe",  # a fixed request, which no setting changes
    ArtifactKind.SEEDS: "seed.needs",
    ArtifactKind.BRANCHES: "branch.needs (or its override)",
    ArtifactKind.CONTROLS: "compare.needs",
    ArtifactKind.UPCYCLED: "upcycle.needs",
    ArtifactKind.MIXTURES: "mix.needs",
    ArtifactKind.TOPICS: "topics.needs",
    ArtifactKind.ADAPTERS: "adapters.needs",
    ArtifactKind.EVALUATIONS: "evaluate.needs",
    ArtifactKind.REPORTS: "evaluate.needs",
    ArtifactKind.COMPARISONS: "the recipe",  # made by the job itself, without a request
}


class FileEntry(BaseModel):
    """One file of an artifact: its length in bytes and its SHA-256 digest in hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


class ComputeCost(BaseModel):
    """The compute that an artifact took, without its parents."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    flops: float = 0.0
    device_seconds: float = 0.0
    wall_seconds: float = 0.0


class Manifest(BaseModel):
    """The record of one artifact.

    `files` maps the names of the files to their lengths and digests. Names are relative to `folder`, which is relative
    to the prefix of the manifest.
    """

    # A diverged model's perplexity is infinite, which JSON cannot express; null could not be read back
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")
    id: str
    kind: ArtifactKind
    name: str
    parents: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    step: int = 0
    tokens: int = 0
    compute: ComputeCost = ComputeCost()
    metrics: dict[str, float] = {}
    facts: dict[str, Any] = {}
    attempt: Annotated[str, BeforeValidator(str)] = ""  # earlier releases wrote a number
    code_version: str = Field(default_factory=lambda: code_version())
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    folder: str = ""
    files: dict[str, FileEntry] = {}

    def to_bytes(self) -> bytes:
        """Serialize the manifest to indented JSON."""
        return self.model_dump_json(indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes, uri: str) -> "Manifest":
        """Parse a manifest; raise a `CheckpointError` that names `uri` if `data` is not one."""
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise CheckpointError(f"{uri} is not a manifest: {error.errors()[0]['msg']}") from None


class ManifestGeneration:
    """The place of the manifest that counts among the manifests under a prefix.

    Attributes:
        number: How many manifests before it were set aside because their files were damaged.
        committed: True if the manifest exists.
    """

    def __init__(self, names: Iterable[str]) -> None:
        found = [match for name in names if (match := _MANIFEST_NAME.fullmatch(name))]
        damaged = {int(match[1]) for match in found if match[2]}
        self.number = max(damaged, default=-1) + 1
        self.committed = any(int(match[1] or 0) == self.number for match in found if not match[2])

    @staticmethod
    def find(store: BlobStore, prefix: str) -> "ManifestGeneration":
        """Find the current generation of the manifest under `prefix` in one request to the store."""
        start = f"{prefix}/" if prefix else ""
        return ManifestGeneration(key.removeprefix(start) for key in store.list(f"{start}manifest"))

    @property
    def manifest_name(self) -> str:
        """The name of the manifest."""
        return f"manifest-{self.number:04d}.json" if self.number else MANIFEST

    @property
    def damaged_name(self) -> str:
        """The name of the blob that marks the files of this generation as damaged."""
        return f"manifest-{self.number:04d}.damaged.json"


_MANIFEST_NAME = re.compile(r"manifest(?:-(\d{4}))?(\.damaged)?\.json")


def is_manifest(key: str) -> bool:
    """Return True if `key` is that of a manifest of any generation."""
    match = _MANIFEST_NAME.fullmatch(key.rpartition("/")[2])
    return match is not None and not match[2]


def read_manifest(store: BlobStore, prefix: str) -> Manifest | None:
    """Return the manifest under `prefix`, or None if nothing is committed there."""
    generation = ManifestGeneration.find(store, prefix)
    if not generation.committed:
        return None
    key = f"{prefix}/{generation.manifest_name}" if prefix else generation.manifest_name
    try:
        return Manifest.from_bytes(store.get(key), f"{store.uri}/{key}")
    except BlobNotFound:  # a training checkpoint that was pruned in the meantime
        return None


def identity(name: str, settings: BaseModel | dict[str, Any], parents: tuple[str, ...] = ()) -> str:
    """Return `<name>-<12 hexadecimal digits>`, a hash of everything that determines an artifact's content."""
    plain = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    text = json.dumps([name, plain, list(parents)], sort_keys=True, separators=(",", ":"))
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def code_version() -> str:
    """Return the version of this package, or "unknown" if it is not installed."""
    try:
        return version("bam-ray")
    except PackageNotFoundError:
        return "unknown"
