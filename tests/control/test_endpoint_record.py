"""The record of what an endpoint serves, and has served before."""

from pathlib import Path

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control.endpoint_record import (
    MOST_BEFORE,
    EndpointRecord,
    committed_mixtures,
    read_endpoint,
    read_endpoints,
    write_endpoint,
)
from bam_ray.control.status_table import render_endpoints
from bam_ray.errors import CheckpointError, StoreError
from bam_ray.terminal import terminal_console

A, B, C = (("mixtures/bam-a",), ("mixtures/bam-b",), ("mixtures/bam-c",))


def test_rollback_goes_through_what_was_served() -> None:
    record = EndpointRecord(name="bam", served=A).serve(B).serve(B).serve(C)
    assert (record.served, record.before) == (C, (B, A))
    back = record.roll_back()
    assert (back.served, back.before, back.note) == (B, (A,), "rolled back from mixtures/bam-c")
    assert back.serve(A).before == (B,)
    with pytest.raises(CheckpointError, match="no models were served as bam before mixtures/bam-a: serve others"):
        back.roll_back().roll_back()
    for number in range(MOST_BEFORE + 5):
        record = record.serve((f"mixtures/bam-{number}",))
    assert len(record.before) == MOST_BEFORE


def test_records_are_read_by_name() -> None:
    store = MemoryStore()
    assert read_endpoint(store, "bam") is None
    record = EndpointRecord(name="bam", served=A, url="http://127.0.0.1:8000/v1", note="rolled back").see([B, B])
    assert record.seen == (B,)
    write_endpoint(store, record)
    write_endpoint(store, EndpointRecord(name="btx", served=B))
    assert read_endpoint(store, "bam") == record
    assert [each.name for each in read_endpoints(store)] == ["bam", "btx"]
    console = terminal_console(width=200)
    with console.capture() as captured:
        console.print(render_endpoints(read_endpoints(store)))
    lines = captured.get().splitlines()
    assert lines[0].startswith("endpoint bam: mixtures/bam-a since ")
    assert lines[0].endswith(" at http://127.0.0.1:8000/v1")
    assert lines[1].strip() == "endpoint bam: rolled back"
    store.put("endpoints/bam.json", b"{}")
    with pytest.raises(StoreError, match=r"endpoints/bam\.json is not a valid record"):
        read_endpoint(store, "bam")


def test_mixtures_of_a_name_are_listed_by_commit(tmp_path: Path) -> None:
    store = MemoryStore()
    (tmp_path / "weights").write_bytes(b"weights")
    committed = {"bam-00000000000b": "2026-01-01", "bam-00000000000a": "2026-01-02", "bam-2-00000000000c": "2026-01-03"}
    for id, created in committed.items():
        manifest = Manifest(id=id, kind=ArtifactKind.MIXTURES, name="bam", created=created)
        Artifact(store, ArtifactKind.MIXTURES, id).publish(tmp_path, manifest)
    store.put("mixtures/bam-00000000000d/leases/0001.json", b"{}")  # in training
    assert [mixture.id for mixture in committed_mixtures(store, "bam")] == ["bam-00000000000b", "bam-00000000000a"]
    (new,) = committed_mixtures(store, "bam", [("mixtures/bam-00000000000b",)])
    assert new.id == "bam-00000000000a"
    assert [mixture.id for mixture in committed_mixtures(store, "bam-2")] == ["bam-2-00000000000c"]
