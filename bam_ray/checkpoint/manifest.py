"""Manifests: what an artifact is, where it came from, and the digest of every file in it.

An artifact is a set of files under one prefix of the blob store. Its manifest is written last, by a conditional put:
no manifest, no artifact. Its identity is its name and a hash of what determines its content (settings and parents), so
asking for a finished artifact again finds it, an interrupted one goes on under the same name, and changed settings
make a new one.

    corpora/<id>/              packed tokens and the tokenizer
    seeds/<id>/                a Hugging Face folder
    branches/<id>/             the same, one a domain
    upcycled/<id>/             a mixture at step 0, a Hugging Face folder
    upcycled/<id>/quorum/      since when branches were waited for, and which it was made of
    mixtures/<id>/             a trained mixture
    evaluations/<id>/          one model's perplexities and routing
    reports/<id>/              results.json, report.html
    <any of these>/steps/<attempt>-<step>/   training checkpoints, each with a manifest of its own
"""

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bam_ray.errors import CheckpointError

MANIFEST = "manifest.json"

Kind = Literal["corpora", "seeds", "branches", "upcycled", "mixtures", "evaluations", "reports"]


class FileEntry(BaseModel):
    """One file of an artifact: its length in bytes and its SHA-256 as hex."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


class Compute(BaseModel):
    """What an artifact cost, its parents not counted."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    flops: float = 0.0
    device_seconds: float = 0.0
    wall_seconds: float = 0.0


class Manifest(BaseModel):
    """What an artifact is. `files` maps names relative to the manifest's prefix."""

    # A diverged model's perplexity is infinite; as null it could not be read back
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")
    id: str
    kind: Kind
    name: str
    parents: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    step: int = 0
    tokens: int = 0
    compute: Compute = Compute()
    metrics: dict[str, float] = {}
    facts: dict[str, Any] = {}
    attempt: int = 0
    code_version: str = Field(default_factory=lambda: code_version())
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    files: dict[str, FileEntry] = {}

    def to_bytes(self) -> bytes:
        """Indented JSON."""
        return self.model_dump_json(indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Manifest":
        """Parse; raises `CheckpointError` naming `where`."""
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise CheckpointError(f"{where} is not a manifest: {error.errors()[0]['msg']}") from None


def identity(name: str, settings: BaseModel | dict[str, Any], parents: tuple[str, ...] = ()) -> str:
    """`<name>-<12 hex digits>` from everything that determines an artifact's content."""
    plain = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    text = json.dumps([name, plain, list(parents)], sort_keys=True, separators=(",", ":"))
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def code_version() -> str:
    """The version of this package."""
    try:
        return version("bam-ray")
    except PackageNotFoundError:
        return "unknown"
