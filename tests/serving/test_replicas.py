"""The replicas of an endpoint on a real Ray cluster: their death, their number and their metrics."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve
from ray._private.state import actors
from ray.cluster_utils import Cluster

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.on_ray.serve_app import APP, deploy
from bam_ray.serving import DecodeEngine, SamplingParams
from bam_ray.settings import Needs, ReplicaRange, ServeSettings
from tests.support.decoding import run as decode
from tests.support.serve_cluster import SteadyClients, free_port, publish_model, serve_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STREAMS = 8
TOKENS = 900
PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster, and connect to it."""
    with serve_cluster(tmp_path_factory.mktemp("cache")) as running:
        ray.init(address=running.address, log_to_driver=False)
        yield running


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, models_by_family: Any, tokenizer: Any) -> Artifact:
    """Return a committed mixture."""
    artifact = Artifact(FolderStore(tmp_path_factory.mktemp("store")), ArtifactKind.MIXTURES, "bam")
    publish_model(artifact, models_by_family["bam"], tokenizer, tmp_path_factory.mktemp("model"), "bam")
    return artifact


@pytest.fixture(scope="module")
def port() -> int:
    """Return the port of the endpoint."""
    return free_port()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, serve.status()
        time.sleep(0.5)


def running_replicas() -> int:
    """Return the number of replicas that serve."""
    (deployment,) = serve.status().applications[APP].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def replica_pids() -> set[int]:
    """Return the process ids of the replicas that live."""
    alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return {actor["Pid"] for actor in alive if actor["ActorClassName"].startswith("ServeReplica:")}


def test_a_killed_replica_ends_its_own_streams_only(
    cluster: Cluster, artifact: Artifact, port: int, models_by_family: Any, tokenizer: Any
) -> None:
    settings = ServeSettings(port=port, replicas=2, slots=STREAMS, max_length=1024, needs=Needs(cpus=0.5))
    url = deploy([artifact], "demo", settings)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    engine = DecodeEngine(models_by_family["bam"], tokenizer, slots=1, max_length=1024)
    expected = decode(engine, [tokenizer(PROMPT).input_ids], lambda _: params)[0].text
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    started = Barrier(STREAMS + 1)

    def stream() -> tuple[str, str]:
        request: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        chunks = client.completions.create(stream=True, extra_body={"ignore_eos": True}, **request)
        text = next(chunks).choices[0].text
        started.wait(120)
        try:
            for chunk in chunks:
                text += chunk.choices[0].text
        except openai.APIError as error:
            return text, error.message
        return text, ""

    pids = replica_pids()
    assert len(pids) == 2
    victim = min(pids)
    with ThreadPoolExecutor(STREAMS) as pool:
        answers = [pool.submit(stream) for _ in range(STREAMS)]
        started.wait(120)
        os.kill(victim, signal.SIGKILL)
        results = [answer.result() for answer in answers]
    lost = [text for text, message in results if message]
    assert 0 < len(lost) < STREAMS, results
    assert {message for _, message in results} == {"", "the replica that computed this response has died: retry"}
    assert all(expected.startswith(text) for text in lost)
    assert {text for text, message in results if not message} == {expected}
    wait_until(lambda: running_replicas() == 2)
    assert victim not in replica_pids()
    assert client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, temperature=0).choices[0].text


def test_each_replica_has_metrics_in_rays_endpoint(cluster: Cluster, artifact: Artifact, port: int) -> None:
    settings = ServeSettings(port=port, replicas=2, slots=3, max_length=64, needs=Needs(cpus=0.5))
    client = openai.OpenAI(base_url=deploy([artifact], "demo", settings), api_key="none", max_retries=0)
    for _ in range(20):
        client.completions.create(model="demo", prompt=PROMPT, max_tokens=3, extra_body={"ignore_eos": True})
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]

    def values(name: str) -> dict[str, float]:
        """Return the value of a metric for each replica of the present deployment."""
        found: dict[str, float] = {}
        for line in "".join(httpx.get(url).text for url in urls).splitlines():
            match = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
            replica = match and re.search(r'replica="([^"]+)"', match[1])
            if match and replica and 'application="bam"' in match[1]:
                found[replica[1]] = float(match[2])
        return found

    def new(name: str) -> dict[str, float]:
        """Return the values of the replicas with three slots, which are those of this deployment."""
        slots = values("ray_bam_slots")
        return {replica: value for replica, value in values(name).items() if slots.get(replica) == 3}

    wait_until(lambda: sum(new("ray_vllm_generation_tokens_total").values()) == 60)
    assert len(new("ray_vllm_num_requests_running")) == 2
    assert sum(new("ray_vllm_e2e_request_latency_seconds_count").values()) == 20
    assert all(seconds > 0 for seconds in new("ray_vllm_time_to_first_token_seconds_sum").values())


def test_the_number_of_replicas_follows_the_load(cluster: Cluster, artifact: Artifact, port: int) -> None:
    replicas = ReplicaRange(max=2, up_seconds=1, down_seconds=5)
    settings = ServeSettings(port=port, replicas=replicas, slots=2, max_length=64, needs=Needs(cpus=0.5))
    url = deploy([artifact], "demo", settings)
    wait_until(lambda: running_replicas() == 1)
    with SteadyClients(url, "demo", [PROMPT], 50) as one:
        with SteadyClients(url, "demo", [PROMPT] * 5, 50) as many:
            wait_until(lambda: running_replicas() == 2)
        wait_until(lambda: running_replicas() == 1)
    assert [*one.failures, *many.failures] == []
    assert len({*one.texts, *many.texts}) == 1
    serve.shutdown()
