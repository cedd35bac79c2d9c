"""A Ray cluster for tests of the endpoint, models for it, and clients that send requests all the time."""

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import openai
import pytest
import ray
from ray.cluster_utils import Cluster

from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import Manifest


@contextlib.contextmanager
def serve_cluster(cache: Path, cpus: int = 4) -> Iterator[Cluster]:
    """Start a head and one node, with all their files in a temporary folder and the cache of models in `cache`."""
    folder = tempfile.mkdtemp(prefix="bam-")  # short: the paths of Ray's sockets have at most 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("BAM_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        # Ray writes the address of the cluster below it, but does not create the folder
        patch.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        node: dict[str, Any] = {"object_store_memory": 100 << 20, "temp_dir": folder}
        running = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node})
        running.add_node(num_cpus=cpus, **node)
        yield running
        ray.shutdown()
        running.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def publish_model(artifact: Artifact, model: Any, tokenizer: Any, folder: Path, name: str) -> None:
    """Commit a model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    artifact.publish(folder, Manifest(id=artifact.id, kind=artifact.kind, name=name))


@dataclass
class SteadyClients:
    """Clients that send one request after the other to an endpoint, without retries, until the block ends.

    Attributes:
        texts: The responses, as (prompt, text).
        failures: The errors.
    """

    url: str
    model: str
    prompts: list[str]
    max_tokens: int
    texts: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._send, args=(prompt,)) for prompt in self.prompts]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _send(self, prompt: str) -> None:
        client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)
        request: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": self.max_tokens}
        request["temperature"] = 0
        number = 0
        while not self._stopped.is_set():
            number += 1
            try:
                if number % 2:
                    chunks = client.completions.create(stream=True, **request)
                    text = "".join(chunk.choices[0].text for chunk in chunks)
                else:
                    text = client.completions.create(**request).choices[0].text
            except Exception as error:  # of any type: the test shows it
                self.failures.append(repr(error))
            else:
                self.texts.append((prompt, text))
