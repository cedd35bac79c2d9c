"""The endpoint on Ray Serve, on a separate cluster, called with the `openai` client."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.errors import CheckpointError, PlacementError, ServingError
from bam_ray.on_ray import serve_app
from bam_ray.on_ray.job import run_of
from bam_ray.on_ray.serve_app import deploy, served_models, shutdown
from bam_ray.serving import DecodeEngine, PosteriorEnsemble, SamplingParams
from bam_ray.settings import Needs, ServeSettings, load_recipe
from bam_ray.settings.api_keys import hash_api_key
from tests.support.decoding import members_of, run
from tests.support.serve_cluster import free_port, serve_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"
DRIVER = """
import json, sys
import ray
from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.on_ray.serve_app import deploy
from bam_ray.settings import ServeSettings
address, store, port = sys.argv[1:]
ray.init(address=address)
settings = ServeSettings(port=int(port), slots=4, max_length=64)
print(json.dumps(deploy([Artifact(open_store(store), "mixtures", "bam")], "demo", settings)))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, models_by_family: Any, tokenizer: Any) -> FolderStore:
    """Return a blob store that contains a mixture."""
    folder = tmp_path_factory.mktemp("model")
    models_by_family["bam"].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    store = FolderStore(tmp_path_factory.mktemp("store"))
    Artifact(store, "mixtures", "bam").publish(folder, Manifest(id="bam", kind="mixtures", name="bam"))
    return store


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a head and one node."""
    with serve_cluster(tmp_path_factory.mktemp("cache")) as running:
        yield running


@pytest.fixture(scope="module")
def port() -> int:
    """Return the port of the endpoint."""
    return free_port()


@pytest.fixture(scope="module")
def url(cluster: Cluster, store: FolderStore, port: int) -> str:
    """Deploy the endpoint from a driver that ends afterwards, and return its URL."""
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        ray.init(address=cluster.address, log_to_driver=False)
        with pytest.raises(ServingError, match=r"Address already in use.*serve\.port"):
            deploy([Artifact(store, "mixtures", "bam")], "demo", ServeSettings(port=port))
    arguments = [sys.executable, "-c", DRIVER, cluster.address, store.uri, str(port)]
    driver = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    return str(json.loads(driver.stdout.splitlines()[-1]))


def generate_alone(engine: DecodeEngine, prompt: str, max_tokens: int) -> str:
    """Return the greedy completion of one prompt by the engine, without the server."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    (delta,) = run(engine, [engine.tokenizer(prompt).input_ids], lambda _: params)
    return delta.text


def test_streams_equal_the_engine_alone(url: str, models_by_family: Any, tokenizer: Any) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    engine = DecodeEngine(models_by_family["bam"], tokenizer, slots=1, max_length=64)
    prompts = [f"the cat sat {word}" for word in ("on", "under", "by the mat", "☕", "in", "so")]

    def stream(prompt: str) -> str:
        chunks = client.completions.create(model="demo", prompt=prompt, max_tokens=30, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(stream, prompts)) == [generate_alone(engine, prompt, 30) for prompt in prompts]

    request: dict[str, Any] = {"model": "demo", "max_tokens": 9, "temperature": 0}
    messages: Any = [{"role": "user", "content": "what is a mixture?"}]
    whole = client.chat.completions.create(messages=messages, **request)
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **request))
    assert whole.choices[0].message.content == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 9


def test_errors_and_metrics_pass_the_proxy(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="'demo'"):
        client.completions.create(model="other", prompt="the")
    with pytest.raises(openai.BadRequestError, match="at most 64 tokens"):
        client.completions.create(model="demo", prompt=[1] * 64)
    assert "bam_slots 4.0" in httpx.get(f"{url.removesuffix('/v1')}/metrics").text
    for headers in ({}, {"x-request-id": "mine"}):
        (request_id,) = httpx.get(f"{url}/models", headers=headers).headers.get_list("x-request-id")
        assert request_id == headers.get("x-request-id", request_id)
    body = {"model": "demo", "prompt": "the", "max_tokens": 2}
    assert httpx.post(f"{url}/completions", json=body, headers={"Host": "evil.example"}).status_code == 400
    assert httpx.post(f"{url}/completions", json={**body, "user": "x" * (5 << 20)}).status_code == 413


def test_a_disconnected_client_frees_its_slot(url: str) -> None:
    body = {"model": "demo", "prompt": ["the"] * 40, "max_tokens": 60, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
    idle = [f'vllm:num_requests_{state}{{model_name="demo"}} 0.0' for state in ("running", "waiting")]
    metrics = ""
    for _ in range(100):
        metrics = httpx.get(f"{url.removesuffix('/v1')}/metrics").text
        if all(line in metrics for line in idle):
            break
    assert 'bam_requests_total{outcome="left"} 1.0' in metrics
    assert idle[0] in metrics


def test_deployments_that_cannot_succeed_are_rejected(url: str, store: FolderStore, port: int) -> None:
    def serve(id: str = "bam", **settings: Any) -> None:
        deploy([Artifact(store, "mixtures", id)], "demo", ServeSettings(port=port, **settings))

    with pytest.raises(CheckpointError, match="not committed"):
        serve("nothing")
    with pytest.raises(PlacementError, match=r"GPU can never fit"):
        serve(needs=Needs(gpus=1))
    with pytest.raises(PlacementError, match="5 replica"):
        serve(replicas=5)
    with pytest.raises(ServingError, match=rf"already listens on 127.0.0.1:{port}"):
        deploy([Artifact(store, "mixtures", "bam")], "demo", ServeSettings(port=port + 1))
    with pytest.raises(ServingError, match=r"lower serve\.max_length"):
        serve(max_length=1 << 20)
    # The previous replica keeps serving
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert client.completions.create(model="demo", prompt=[1] * 60, max_tokens=4).usage.completion_tokens > 0


def test_a_serve_configuration_file_serves_a_recipe(url: str, store: FolderStore, port: int, tmp_path: Path) -> None:
    overrides = [f"store.uri={store.uri}", "serve.slots=4", "serve.max_length=64", "serve.needs.cpus=0.5"]
    (mixture,), name = served_models(run_of(load_recipe(RECIPE, overrides)))
    mixture.publish(
        Artifact(store, "mixtures", "bam").fetch(tmp_path), Manifest(id=mixture.id, kind="mixtures", name=name)
    )
    (tmp_path / "keys").write_text(f"{hash_api_key(b'bam-alice')} name=alice\n")
    application = {
        "name": "bam",
        "route_prefix": "/",
        "import_path": "bam_ray.on_ray.serve_app:application",
        "args": {"recipe": str(RECIPE), "overrides": [*overrides, f"serve.api_keys={tmp_path / 'keys'}"]},
    }
    http = {"host": "127.0.0.1", "port": port}
    schema = ServeDeploySchema(applications=[application], http_options=http)
    _get_global_client().deploy_apps(schema, _blocking=True)
    with pytest.raises(openai.AuthenticationError, match="not valid"):
        openai.OpenAI(base_url=url, api_key="none", max_retries=0).models.list()
    client = openai.OpenAI(base_url=url, api_key="bam-alice", max_retries=0)
    assert [model.id for model in client.models.list()] == [name]
    assert client.completions.create(model=name, prompt="the", max_tokens=4).usage.completion_tokens == 4


def test_the_branches_are_served_without_a_mixture(
    url: str, tokenizer: Any, port: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    own = FolderStore(tmp_path_factory.mktemp("branches"))
    overrides = ["serve.mode=posterior", "serve.mixture=null", "serve.max_length=64", f"serve.port={port}"]
    run = run_of(load_recipe(RECIPE, [f"store.uri={own.uri}", *overrides]))
    tasks = [task for task in run.tasks if task.kind in (ArtifactKind.SEEDS, ArtifactKind.BRANCHES)]
    members = members_of("llama", len(tasks), tokenizer)
    for task, member in zip(tasks, members, strict=True):
        member.save_pretrained(tmp_path / task.name)
        tokenizer.save_pretrained(tmp_path / task.name)
        Artifact(own, task.kind, task.id).publish(
            tmp_path / task.name, Manifest(id=task.id, kind=task.kind, name=task.name)
        )
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    prompts = ["the cat sat on", "user: what is a mixture?", "☕"]
    for count in (len(tasks), len(tasks) - 1):  # the last branch is withdrawn
        if count < len(tasks):
            shutil.rmtree(Path(own.uri) / "branches" / tasks[-1].id)
        models, name = served_models(run)
        assert deploy(models, name, run.recipe.serve) == url
        assert [model.id for model in client.models.list()] == ["posterior"]
        engine = DecodeEngine(PosteriorEnsemble(members[:count]), tokenizer, slots=1, max_length=64)
        request: dict[str, Any] = {"model": "posterior", "prompt": prompts, "max_tokens": 20, "temperature": 0}
        texts = [choice.text for choice in client.completions.create(**request).choices]
        assert texts == [generate_alone(engine, prompt, 20) for prompt in prompts]


def test_a_full_proxy_refuses_requests(
    url: str, store: FolderStore, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_app, "OTHER_REQUESTS", 0)
    monkeypatch.setattr(serve_app, "QUEUED_PER_PROXY", 1)
    deploy(
        [Artifact(store, "mixtures", "bam")],
        "demo",
        ServeSettings(port=port, slots=1, max_prompts=1, max_queued_prompts=1),
    )

    def complete(_: int) -> httpx.Response:
        body = {"model": "demo", "prompt": "the", "max_tokens": 200, "ignore_eos": True}
        return httpx.post(f"{url}/completions", json=body, timeout=60)

    with ThreadPoolExecutor(16) as pool:
        responses = [*pool.map(complete, range(16))]
    assert {response.status_code for response in responses} == {200, 429}
    assert {each.headers.get("retry-after") for each in responses if each.status_code == 429} == {"1"}
    assert all(each.json()["usage"]["completion_tokens"] == 200 for each in responses if each.status_code == 200)
    assert complete(0).status_code == 200


def test_redeployment_and_shutdown(url: str, store: FolderStore, port: int) -> None:
    settings = ServeSettings(port=port, slots=2, max_length=32, replicas=2, needs=Needs(cpus=0.5))
    assert deploy([Artifact(store, "mixtures", "bam")], "second", settings) == url
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["second"]
    shutdown()
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
