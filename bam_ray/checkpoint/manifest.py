"""Manifests: the record of an artifact's identity, its origin and the digest of every file in it.

Problem: a task may be interrupted at any moment, started twice, or requested again with other settings. A reader must
be able to distinguish a complete artifact from a partial one, and a task must find the result of an earlier run.

Design choice: an artifact is a set of files under one prefix of the blob store. Its manifest is written last, by a
conditional put, so an artifact without a manifest is not committed. The identity of an artifact is its name and a hash
of everything that determines its content: its settings and its parents. A finished artifact that is requested again is
therefore found, an interrupted one is resumed under the same name, and changed settings give a new artifact.

Limits: an identity covers settings and parents, not the version of the code. The manifest records the version.

    corpora/<id>/              packed tokens and the tokenizer
    seeds/<id>/                a Hugging Face folder
    branches/<id>/             a Hugging Face folder per domain
    upcycled/<id>/             a mixture at step 0, as a Hugging Face folder
    upcycled/<id>/quorum/      the time since when branches were awaited, and the branches that were used
    mixtures/<id>/             a trained mixture
    evaluations/<id>/          the perplexities and the routing of one model
    reports/<id>/              results.json and report.html
    <any of these>/steps/<attempt>-<step>/   training checkpoints, each with its own manifest
"""

import hashlib
import json
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bam_ray.errors import CheckpointError

MANIFEST = "manifest.json"


class ArtifactKind(StrEnum):
    """The kind of an artifact, which is the first part of its prefix in the store."""

    CORPORA = "corpora"
    SEEDS = "seeds"
    BRANCHES = "branches"
    UPCYCLED = "upcycled"
    MIXTURES = "mixtures"
    EVALUATIONS = "evaluations"
    REPORTS = "reports"

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
        return self in (ArtifactKind.SEEDS, ArtifactKind.BRANCHES, ArtifactKind.MIXTURES)


_LABELS = {
    ArtifactKind.CORPORA: "corpus",
    ArtifactKind.SEEDS: "seed",
    ArtifactKind.BRANCHES: "branch",
    ArtifactKind.UPCYCLED: "upcycled mixture",
    ArtifactKind.MIXTURES: "mixture",
    ArtifactKind.EVALUATIONS: "evaluation",
    ArtifactKind.REPORTS: "report",
}
_SETTINGS = {
    ArtifactKind.CORPORA: "the recipe",  # a fixed request, which no setting changes
    ArtifactKind.SEEDS: "seed.needs",
    ArtifactKind.BRANCHES: "branch.needs (or its override)",
    ArtifactKind.UPCYCLED: "upcycle.needs",
    ArtifactKind.MIXTURES: "mix.needs",
    ArtifactKind.EVALUATIONS: "evaluate.needs",
    ArtifactKind.REPORTS: "evaluate.needs",
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
    """The record of one artifact; `files` maps names relative to the manifest's prefix to lengths and digests."""

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
    attempt: int = 0
    code_version: str = Field(default_factory=lambda: code_version())
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
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
