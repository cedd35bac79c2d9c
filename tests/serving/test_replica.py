"""A replica of the endpoint, in the test's own process."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from bam_ray.adapters.embedders import seed_embedder
from bam_ray.adapters.topics import Topic, Topics
from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.errors import ServingError
from bam_ray.on_ray.replica import Endpoint, EndpointAccess
from bam_ray.serving import Scheduler
from bam_ray.settings import ServeAdapterSettings, ServeSettings
from bam_ray.settings.api_keys import hash_api_key
from tests.support.peft_adapters import write_adapter


def test_a_replica_with_a_dead_engine_is_unhealthy(
    models_by_family: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedulers = []

    class KnownScheduler(Scheduler):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            schedulers.append((self, settings))

    models_by_family["bam"].save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    artifact = Artifact(FolderStore(tmp_path / "store"), ArtifactKind.MIXTURES, "bam")
    artifact.publish(tmp_path / "model", Manifest(id="bam", kind=ArtifactKind.MIXTURES, name="bam"))
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bam_ray.serving.Scheduler", KnownScheduler)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    settings = ServeSettings(slots=1, max_length=32, max_queued_prompts=70, max_queued_tokens=80)
    replica = Endpoint.__new__(Endpoint)
    start: Any = Endpoint.__init__  # which Serve makes a coroutine
    asyncio.run(start(replica, [artifact], "bam", settings, EndpointAccess((), None)))
    ((scheduler, limits),) = schedulers
    assert limits == {"max_queued_prompts": 70, "max_queued_tokens": 80}
    replica.check_health()
    scheduler.failure = ServingError("the engine has stopped")
    with pytest.raises(ServingError, match="the engine has stopped"):
        replica.check_health()


def test_access_is_by_key_or_by_the_name_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{hash_api_key(b'key')} name=alice")
    local = EndpointAccess.of(ServeSettings(), is_local=True)
    assert (local.keys, local.hosts) == ((), {"localhost", "127.0.0.1", "[::1]"})
    assert EndpointAccess.of(ServeSettings(host="127.0.0.2"), is_local=True).hosts == {
        "localhost",
        "127.0.0.1",
        "[::1]",
        "127.0.0.2",
    }
    assert EndpointAccess.of(ServeSettings(open=True), is_local=True) == EndpointAccess((), None)
    with_keys = EndpointAccess.of(ServeSettings(api_keys=str(tmp_path / "keys")), is_local=True)
    assert ([key.name for key in with_keys.keys], with_keys.hosts) == (["alice"], None)


def test_a_replica_serves_adapters_and_chooses_one(
    models_by_family: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedder is the seed, and the prototypes of the topics are the vectors of two texts."""
    seed, texts = tmp_path / "model", {"law": "the court decides", "music": "la la la la"}
    models_by_family["llama"].save_pretrained(seed)
    tokenizer.save_pretrained(seed)
    artifact = Artifact(FolderStore(tmp_path / "store"), ArtifactKind.SEEDS, "seed")
    artifact.publish(seed, Manifest(id="seed", kind=ArtifactKind.SEEDS, name="seed"))
    embedder = seed_embedder(seed, prefix_tokens=16)
    topics = [Topic(name, 1, 1, (), threshold=0.99) for name in texts]
    (tmp_path / "topics").mkdir()
    prototypes = embedder.embed([*texts.values()])
    Topics(embedder.identity, topics, prototypes, torch.arange(2)).save(tmp_path / "topics")
    for number, name in enumerate(texts):
        write_adapter(tmp_path / "adapters" / name, models_by_family["llama"], number)
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    chosen = ServeAdapterSettings(source=str(tmp_path / "adapters"), topics=str(tmp_path / "topics"), slots=1)
    settings = ServeSettings(slots=1, max_length=32, mode="adapters", adapters=chosen)
    replica = Endpoint.__new__(Endpoint)
    start: Any = Endpoint.__init__
    asyncio.run(start(replica, [artifact], "seed", settings, EndpointAccess((), None)))
    with TestClient(replica.__serve_build_asgi_app__()) as client:
        for prompt, adapter in ((texts["law"], "law"), (texts["music"], "music"), ("☕☕ 99", "none")):
            body = {"model": "auto", "prompt": prompt, "max_tokens": 2}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200
            assert response.headers["x-bam-adapter"] == adapter
        assert response.headers["x-bam-adapter-reason"] == "far"
