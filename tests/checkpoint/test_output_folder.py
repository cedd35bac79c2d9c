"""Commands that write a model to a store delete what they wrote themselves, and nothing else."""

import json
from collections.abc import Callable, Iterator

import pytest
import torch

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.output_folder import RESERVATION, new_model_folder
from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import CheckpointError, StoreUnavailable
from bam_ray.settings import StoreSettings

MANIFEST = Manifest(id="x-1", kind=ArtifactKind.UPCYCLED, name="x")
FILES = {"config.json", "model.safetensors", "manifest.json"}


class LosingStore(MemoryStore):
    """A store that loses the answers to puts of the manifest, and that can be down."""

    lost_answers = 0
    down = False

    def put_if_absent(self, key: str, data: bytes) -> None:
        super().put_if_absent(key, data)
        if key.endswith("manifest.json") and self.lost_answers:
            self.lost_answers -= 1
            raise StoreUnavailable("the answer was lost")

    def delete(self, key: str) -> None:
        if self.down:
            raise StoreUnavailable("the endpoint is down")
        super().delete(key)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> LosingStore:
    store = LosingStore.named(f"output-{request.node.name}")
    assert isinstance(store, LosingStore)
    return store


def write(writer: ModelWriter, value: float = 1.0) -> Manifest:
    def produce(spec: TensorSpec) -> Iterator[torch.Tensor]:
        yield torch.full((spec.elements,), value)

    writer.write_tensors([TensorSpec("weight", torch.float32, (8,))], produce)
    return writer.commit(json.dumps({"model_type": "x"}), MANIFEST)


def test_a_lost_answer_to_the_commit_is_no_failure(store: LosingStore) -> None:
    store.lost_answers = 2
    with new_model_folder(StoreSettings(uri=store.uri)) as writer:
        write(writer)
    assert set(store.list()) == FILES
    assert TensorReader(store).check_digests() == 2


def test_two_commands_do_not_write_to_one_location(store: LosingStore) -> None:
    out = StoreSettings(uri=store.uri)
    with new_model_folder(out) as writer:
        with pytest.raises(CheckpointError, match=rf"writes to .*: wait for it, or delete .*/{RESERVATION}"):
            new_model_folder(out).__enter__()
        write(writer)
    assert set(store.list()) == FILES
    with pytest.raises(CheckpointError, match="is not empty: name a new location"):
        new_model_folder(out).__enter__()
    assert set(store.list()) == FILES


def write_and_fail(store: LosingStore, error: BaseException, then: Callable[[ModelWriter], object]) -> None:
    """Write a tokenizer, call `then`, and end the command with `error`."""
    with new_model_folder(StoreSettings(uri=store.uri)) as writer:
        writer.write_file("tokenizer.json", b"{}")
        then(writer)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreUnavailable("down"), ValueError("too bad")])
def test_a_failed_command_deletes_what_it_wrote(error: BaseException, store: LosingStore) -> None:
    with pytest.raises(type(error)):
        write_and_fail(store, error, lambda writer: store.put("theirs/model.safetensors", b"of a colleague"))
    assert set(store.list()) == {"theirs/model.safetensors"}


def test_a_model_that_is_committed_is_never_deleted(store: LosingStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(store, KeyboardInterrupt(), write)
    assert set(store.list()) == FILES | {"tokenizer.json"}


def test_a_store_that_fails_during_the_cleanup_is_reported(store: LosingStore) -> None:
    message = r"ValueError: too bad; .* was not cleaned up, because the store failed \(the endpoint is down\)"
    with pytest.raises(CheckpointError, match=message):
        write_and_fail(store, ValueError("too bad"), lambda writer: setattr(store, "down", True))
