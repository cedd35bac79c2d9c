"""Bundles of adapters: read one by one, and refused if they are damaged, missing or foreign."""

from pathlib import Path

import pytest
import torch

from bam_ray.adapters import bundles
from bam_ray.adapters.bundles import AdapterEntry, AdapterIndex, AdapterIndexFile, BaseIdentity, write_bundles
from bam_ray.adapters.weights import AdapterWeights, LoraPair
from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.errors import CheckpointError, DigestMismatch

BASE = BaseIdentity(id="seed-1", sha256="ab" * 32)
LAYERS = {"model.layers.0.q_proj": (8, 6), "model.layers.0.down_proj": (6, 10)}


def random_adapter(name: str) -> AdapterWeights:
    generator = torch.Generator().manual_seed(int(name))
    pairs = {
        layer: LoraPair(torch.randn(2, rows, generator=generator), torch.randn(out, 2, generator=generator))
        for layer, (out, rows) in LAYERS.items()
    }
    return AdapterWeights(name, 2.0, pairs)


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Return an artifact of five adapters in bundles of two."""
    monkeypatch.setattr(bundles, "BUNDLE_SIZE", 2)
    names = [str(number) for number in range(5)]
    index = AdapterIndexFile(base=BASE, rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    write_bundles(tmp_path, index, [AdapterEntry(name=name) for name in names], random_adapter)
    found = Artifact(MemoryStore(), ArtifactKind.ADAPTERS, "part-00-1")
    found.publish(tmp_path, Manifest(id=found.id, kind=found.kind, name="part-00"))
    return found


def damage(artifact: Artifact, file: str, position: int) -> None:
    manifest = artifact.manifest()
    assert manifest is not None
    key = artifact.key(manifest, file)
    data = bytearray(artifact.store.get(key))
    data[position] ^= 1
    artifact.store.put(key, bytes(data))


def test_every_adapter_is_read_as_it_was_written(artifact: Artifact) -> None:
    index = AdapterIndex(artifact, BASE)
    assert [entry.file[:11] for entry in index.file.adapters] == ["bundle-0000"] * 2 + ["bundle-0001"] * 2 + [
        "bundle-0002"
    ]
    for name in index.names:
        read, written = index.read(name), random_adapter(name)
        assert (read.name, read.scale, read.pairs.keys()) == (name, 2.0, written.pairs.keys())
        for layer, pair in read.pairs.items():
            assert torch.equal(pair.a, written.pairs[layer].a) and torch.equal(pair.b, written.pairs[layer].b)


def test_an_adapter_is_read_with_one_request(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    index = AdapterIndex(artifact)
    index.read("2")  # reads the header of the bundle too
    lengths: list[int] = []
    get_range = MemoryStore.get_range

    def counted(self: MemoryStore, key: str, start: int, length: int) -> bytes:
        lengths.append(length)
        return get_range(self, key, start, length)

    monkeypatch.setattr(MemoryStore, "get_range", counted)
    assert lengths == [] and index.read("3").bytes == lengths[0]
    assert len(lengths) == 1


def test_a_damaged_adapter_is_refused_and_others_are_not(artifact: Artifact) -> None:
    damage(artifact, "bundle-0001.safetensors", -1)
    index = AdapterIndex(artifact)
    with pytest.raises(DigestMismatch, match=r"adapter 3 of .* does not match its digest"):
        index.read("3")
    assert index.read("2").pairs


def test_a_damaged_index_is_refused(artifact: Artifact) -> None:
    damage(artifact, "adapters.json", 40)
    with pytest.raises(DigestMismatch, match=r"adapters.json does not match its manifest"):
        AdapterIndex(artifact)


def test_missing_files_and_names_are_one_error(artifact: Artifact) -> None:
    index = AdapterIndex(artifact)
    with pytest.raises(CheckpointError, match="has no adapter '7'"):
        index.read("7")
    artifact.store.delete(artifact.key(index.manifest, "bundle-0000.safetensors"))
    with pytest.raises(CheckpointError, match=r"bundle-0000.safetensors is missing"):
        index.read("0")
    assert index.read("4").pairs
    artifact.store.delete(artifact.key(index.manifest, "adapters.json"))
    with pytest.raises(CheckpointError, match=r"adapters.json is missing"):
        AdapterIndex(artifact)


def test_adapters_of_another_model_are_refused(artifact: Artifact) -> None:
    with pytest.raises(CheckpointError, match=r"belong to seed-1 .* not to seed-2"):
        AdapterIndex(artifact, BaseIdentity(id="seed-2", sha256="cd" * 32))
    with pytest.raises(CheckpointError, match="is not committed"):
        AdapterIndex(Artifact(artifact.store, ArtifactKind.ADAPTERS, "part-01-1"))
