"""Adapters in files: bundles of up to 64 adapters, and an index with the digest of each.

    adapters.json               the base model, the settings of the adapters, and each adapter's file and digest
    bundle-0000.safetensors     tensors `<adapter>/<layer>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]

The tensors of one adapter lie next to each other, so that a server reads an adapter with one request. Thousands of
adapters are a few files, which can be listed and copied at once.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from bam_ray.adapters.weights import AdapterWeights, LoraPair, lora_scale
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader, TensorSpec, encode_header
from bam_ray.errors import BlobNotFound, CheckpointError, DigestMismatch

INDEX = "adapters.json"
BUNDLE_SIZE = 64  # adapters of a bundle
SUFFIXES = (".lora_A.weight", ".lora_B.weight")  # as in peft's files


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseIdentity(_Frozen):
    """The model that adapters belong to: the id of its artifact, and the SHA-256 over its weight files."""

    id: str
    sha256: str

    @staticmethod
    def of(manifest: Manifest) -> "BaseIdentity":
        """Return the identity of the model that `manifest` describes; no weights are read."""
        digest = hashlib.sha256()
        for name in sorted(manifest.files):
            if name.endswith(".safetensors"):
                digest.update(f"{name} {manifest.files[name].sha256}\n".encode())
        return BaseIdentity(id=manifest.id, sha256=digest.hexdigest())


class AdapterEntry(_Frozen):
    """One adapter of an index.

    Attributes:
        name: The name of the adapter, which is that of its topic.
        file: The bundle that has its tensors.
        sha256: The digest of its tensors (`tensor_digest`).
        tokens: The number of tokens that it was trained on; 0 if it was imported.
        losses: The NLL of training steps in nats per token, by name (`first`, `last`).
    """

    name: str
    file: str = ""
    sha256: str = ""
    tokens: int = 0
    losses: dict[str, float] = {}


class AdapterIndexFile(_Frozen):
    """The content of `adapters.json`."""

    version: Literal[1] = 1
    base: BaseIdentity
    rank: int
    alpha: float
    rank_stabilized: bool = False  # the change is multiplied by alpha / sqrt(rank) instead of alpha / rank
    targets: tuple[str, ...]  # ends of the names of the layers, as in peft's configuration
    adapters: tuple[AdapterEntry, ...] = ()

    @property
    def scale(self) -> float:
        """The factor of the change of a layer."""
        return lora_scale(self.rank, self.alpha, self.rank_stabilized)


class AdapterIndex:
    """The adapters of one artifact, which are read one by one.

    Args:
        artifact: A committed artifact of adapters.
        base: The model that the adapters must belong to; None accepts every model.

    Raises:
        CheckpointError: The artifact is not committed, its index is missing or damaged, or its adapters belong to
            another model.
    """

    def __init__(self, artifact: Artifact, base: BaseIdentity | None = None) -> None:
        manifest = artifact.manifest()
        if manifest is None:
            raise CheckpointError(f"{artifact.uri} is not committed: run the stage that makes it")
        self.artifact, self.manifest = artifact, manifest
        self.file = _read_index(artifact, manifest)
        if base is not None and self.file.base != base:
            raise CheckpointError(
                f"the adapters of {artifact.uri} belong to {self.file.base.id} (digest {self.file.base.sha256[:12]}), "
                f"not to {base.id} (digest {base.sha256[:12]}): train them again or choose their own model"
            )
        self._entries = {entry.name: entry for entry in self.file.adapters}
        self._bundles: dict[str, tuple[TensorReader, dict[str, list[str]]]] = {}

    @property
    def names(self) -> list[str]:
        """The names of the adapters."""
        return list(self._entries)

    def entry(self, name: str) -> AdapterEntry:
        """Return the entry of an adapter; raises `CheckpointError` if there is no such adapter."""
        if name not in self._entries:
            raise CheckpointError(f"{self.artifact.uri} has no adapter {name!r}: `bam adapters list` shows all")
        return self._entries[name]

    def read(self, name: str) -> AdapterWeights:
        """Read one adapter with one request for its tensors, and compare its digest.

        Raises:
            CheckpointError: There is no such adapter, or its bundle is missing or truncated.
            DigestMismatch: Its tensors are damaged.
        """
        entry = self.entry(name)
        reader, names = self._bundle(entry.file)
        try:
            tensors = reader.read_together(names[name]) if name in names else {}
        except BlobNotFound:
            raise CheckpointError(f"{self.artifact.uri}: {entry.file} is missing") from None
        plain = {tensor.partition("/")[2]: value for tensor, value in tensors.items()}
        if tensor_digest(plain) != entry.sha256:
            raise DigestMismatch(
                f"adapter {name} of {self.artifact.uri} does not match its digest: {entry.file} is damaged, so train "
                "or import the adapter again"
            )
        return AdapterWeights(name, self.file.scale, pairs_of(plain))

    def _bundle(self, file: str) -> tuple[TensorReader, dict[str, list[str]]]:
        """Return the reader of a bundle, and the names of the tensors of each adapter. The header is read once."""
        if file not in self._bundles:
            reader = TensorReader(self.artifact.store, f"{self.artifact.prefix}/{self.manifest.folder}", files=[file])
            names: dict[str, list[str]] = {}
            for tensor in reader.specs:
                names.setdefault(tensor.partition("/")[0], []).append(tensor)
            self._bundles[file] = reader, names
        return self._bundles[file]


def pairs_of(tensors: Mapping[str, Tensor]) -> dict[str, LoraPair]:
    """Return the factors of each layer, for tensors `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    layers = [name.removesuffix(SUFFIXES[0]) for name in tensors if name.endswith(SUFFIXES[0])]
    return {layer: LoraPair(*(tensors[layer + suffix] for suffix in SUFFIXES)) for layer in layers}


def tensors_of(weights: AdapterWeights) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names in files; the inverse of `pairs_of`."""
    return {
        layer + suffix: factor.contiguous()
        for layer, pair in weights.pairs.items()
        for suffix, factor in zip(SUFFIXES, (pair.a, pair.b), strict=True)
    }


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def write_bundles(
    folder: Path,
    index: AdapterIndexFile,
    entries: Sequence[AdapterEntry],
    load: Callable[[str], AdapterWeights],
) -> AdapterIndexFile:
    """Write adapters of equal layers and ranks to bundles in `folder`, and their index.

    Args:
        folder: An existing folder.
        index: The index without adapters.
        entries: The adapters to write; `file` and `sha256` are replaced.
        load: Returns the weights of an adapter. One adapter is in memory at a time.

    Returns:
        The complete index.
    """
    written: list[AdapterEntry] = []
    for number, start in enumerate(range(0, len(entries), BUNDLE_SIZE)):
        chosen, file = entries[start : start + BUNDLE_SIZE], f"bundle-{number:04d}.safetensors"
        template = tensors_of(load(chosen[0].name))
        specs = [
            TensorSpec(f"{entry.name}/{name}", tensor.dtype, tuple(tensor.shape))
            for entry in chosen
            for name, tensor in template.items()
        ]
        with (folder / file).open("wb") as out:
            out.write(encode_header(specs, {"format": "pt"}))
            for entry in chosen:
                tensors = tensors_of(load(entry.name))
                for name, tensor in template.items():
                    assert tensors[name].shape == tensor.shape and tensors[name].dtype is tensor.dtype, name
                    out.write(_bytes(tensors[name]))
                written.append(entry.model_copy(update={"file": file, "sha256": tensor_digest(tensors)}))
    complete = index.model_copy(update={"adapters": tuple(written)})
    (folder / INDEX).write_text(complete.model_dump_json(indent=1))
    return complete


def _read_index(artifact: Artifact, manifest: Manifest) -> AdapterIndexFile:
    uri = f"{artifact.uri}/{INDEX}"
    try:
        data = artifact.store.get(artifact.key(manifest, INDEX))
    except BlobNotFound:
        raise CheckpointError(f"{uri} is missing: train or import the adapters again") from None
    if hashlib.sha256(data).hexdigest() != manifest.files[INDEX].sha256:
        raise DigestMismatch(f"{uri} does not match its manifest: it was changed or damaged")
    try:
        return AdapterIndexFile.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{uri} is not an index of adapters: {error.errors()[0]['msg']}") from None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
