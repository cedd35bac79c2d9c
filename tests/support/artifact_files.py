"""Files and a manifest of an artifact, for tests that publish and fetch."""

from pathlib import Path

from bam_ray.checkpoint.manifest import Manifest

ID = "code-0123456789ab"
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "tokenizer/vocab.json": b"[1]"}


def write_artifact_files(folder: Path) -> Path:
    """Write `FILES`, one of them in a subfolder, and return their folder."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def manifest(**more: object) -> Manifest:
    """Return the manifest of a branch."""
    return Manifest.model_validate({"id": ID, "kind": "branches", "name": "code", **more})
