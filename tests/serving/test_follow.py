"""Follow mode and rollback on a real Ray cluster, under load."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.endpoint_record import EndpointRecord, read_endpoint
from bam_ray.errors import CheckpointError, PlacementError
from bam_ray.on_ray.follow import POLL_SECONDS, roll_back, serve_run
from bam_ray.on_ray.job import run_of
from bam_ray.on_ray.serve_app import FOLLOWER, NAMESPACE, shutdown
from bam_ray.pipeline.run import PipelineRun
from bam_ray.serving import DecodeEngine, SamplingParams
from bam_ray.settings import load_recipe
from tests.support.decoding import run as decode
from tests.support.serve_cluster import SteadyClients, free_port, publish_model, serve_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"
PROMPTS = ["the cat sat on", "user: what is a mixture?", "☕"]
TOKENS = 40


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster, and connect to it."""
    with serve_cluster(tmp_path_factory.mktemp("cache")) as running:
        ray.init(address=running.address, log_to_driver=False)
        yield running


def expected_texts(model: Any, tokenizer: Any) -> dict[str, str]:
    """Return the greedy completion of each prompt, without the server."""
    engine = DecodeEngine(model, tokenizer, slots=1, max_length=64)
    params = SamplingParams(max_tokens=TOKENS, temperature=0)
    return {prompt: decode(engine, [tokenizer(prompt).input_ids], lambda _: params)[0].text for prompt in PROMPTS}


def wait_for(ready: Callable[[EndpointRecord], bool], run: PipelineRun, name: str, seconds: float = 120) -> None:
    """Wait until the record of the endpoint is as expected."""
    end = time.monotonic() + seconds
    record = None
    while time.monotonic() < end:
        record = read_endpoint(run.store, name)
        if record is not None and ready(record):
            return
        time.sleep(0.5)
    raise AssertionError(f"not in time: {record}")


def served_artifacts(url: str) -> set[str]:
    """Return the artifacts that the replicas serve, of many answers."""
    return {httpx.get(f"{url}/models").json()["data"][0]["artifacts"][0] for _ in range(20)}


def wait_for_artifact(url: str, prefix: str) -> None:
    """Wait until all replicas serve an artifact."""
    for _ in range(240):
        if served_artifacts(url) == {prefix}:
            return
        time.sleep(0.5)
    raise AssertionError(f"{served_artifacts(url)} instead of {prefix}")


def wait_until_nobody_follows() -> None:
    """Wait until the follower has ended."""
    for _ in range(120):
        try:
            ray.get_actor(FOLLOWER, NAMESPACE)
        except ValueError:
            return
        time.sleep(0.5)
    raise AssertionError("the follower goes on")


def test_new_mixtures_roll_out_and_back_under_load(
    cluster: Cluster, models_by_family: Any, tokenizer: Any, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path / "store")
    serve = ["serve.replicas=2", "serve.slots=4", "serve.max_length=64", "serve.needs.cpus=0.5", "serve.follow=true"]
    overrides = [f"store.uri={store.uri}", f"serve.port={free_port()}", *serve]

    def run_with(*changes: str) -> PipelineRun:
        return run_of(load_recipe(RECIPE, [*overrides, *changes]))

    run = run_with()
    name = next(iter(run.recipe.upcycle.mixtures))
    first = models_by_family["bam"]
    torch.manual_seed(2)
    second = AutoModelForCausalLM.from_config(first.config).eval()
    broken = AutoModelForCausalLM.from_config(first.config).eval()
    with torch.no_grad():
        broken.get_output_embeddings().weight[0, 0] = float("nan")
    texts = [expected_texts(model, tokenizer) for model in (first, second)]
    assert all(texts[0][prompt] != texts[1][prompt] for prompt in PROMPTS)

    def commit(mixture_run: PipelineRun, model: Any) -> str:
        artifact = mixture_run.artifact(ArtifactKind.MIXTURES, name)
        publish_model(artifact, model, tokenizer, tmp_path / artifact.id, name)
        return artifact.prefix

    a = commit(run, first)
    with pytest.raises(PlacementError, match="needs room for one more replica"):
        serve_run(run_with("serve.needs.cpus=2"))
    models, url = serve_run(run)
    assert [model.prefix for model in models] == [a]
    with pytest.raises(CheckpointError, match="no models were served as"):
        roll_back(run)
    with SteadyClients(url, name, PROMPTS, TOKENS) as clients:
        b = commit(run_with("mix.training.peak_lr=0.00123"), second)
        wait_for(lambda record: record.served == (b,), run, name)
        wait_for_artifact(url, b)
        c = commit(run_with("mix.training.peak_lr=0.00124"), broken)
        wait_for(lambda record: f"{c} is not served: " in record.note and "not finite" in record.note, run, name)
        assert served_artifacts(url) == {b}
        before = len(clients.texts)
        assert roll_back(run)[1] == url
        wait_for_artifact(url, a)
        time.sleep(2 * POLL_SECONDS)
        assert served_artifacts(url) == {a}
        d = commit(run_with("mix.training.peak_lr=0.00125"), second)
        wait_for(lambda record: record.served == (d,) and record.before == ((a,),), run, name)
        wait_for_artifact(url, d)
    assert clients.failures == []
    served = set(clients.texts)
    assert served == {(prompt, text[prompt]) for text in texts for prompt in PROMPTS}
    assert set(clients.texts[before:]) == served
    shutdown()
    wait_until_nobody_follows()
