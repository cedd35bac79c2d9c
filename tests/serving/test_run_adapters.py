"""The adapters that a run has trained are served from its store, and requests are matched with its topics."""

import asyncio
import json
import os
import runpy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import ValidationError

from bam_ray.adapters.run_adapters import RunAdapters
from bam_ray.adapters.run_source import RunSource
from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.endpoint_record import EndpointRecord, write_endpoint
from bam_ray.data import Corpus
from bam_ray.data.corpus_documents import CorpusDocuments
from bam_ray.errors import CheckpointError
from bam_ray.on_ray import job
from bam_ray.on_ray.follow import roll_back
from bam_ray.on_ray.replica import Endpoint, EndpointAccess
from bam_ray.on_ray.scaling import LOAD
from bam_ray.on_ray.serve_app import served_kinds, served_models
from bam_ray.pipeline.graph import subset, task_graph
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.tasks import Task
from bam_ray.settings import Recipe
from tests.support.adapter_run import ADAPTERS
from tests.support.stage_run import make_artifacts, small_recipe

JOBS = Path(__file__).parents[2] / "jobs"
SECTIONS: dict[str, Any] = {
    "topics": {"count": 2, "embedder": "seed", "min_documents": 2},
    "adapters": {**ADAPTERS, "tasks": 2},
    "serve": {"mode": "adapters", "adapters": {"slots": 1}, "slots": 2, "max_length": 256},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineRun:
    """Return a run with two topics, whose adapters are trained."""
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    recipe = small_recipe(tmp_path, **SECTIONS)
    store = open_store(recipe.store.uri)
    make_artifacts(recipe, store, ("corpora", "seeds", "topics", "adapters"))
    return PipelineRun.of(recipe, store)


def replica_of(run: PipelineRun) -> Endpoint:
    """Return a replica of the endpoint of a run, without Ray Serve."""
    models, name = served_models(run)
    replica = Endpoint.__new__(Endpoint)
    start: Any = Endpoint.__init__  # which Serve makes a coroutine
    asyncio.run(start(replica, models, name, run.recipe.serve, EndpointAccess((), None), run))
    return replica


def test_a_run_serves_its_own_adapters(run: PipelineRun) -> None:
    assert served_kinds(run.recipe) == [ArtifactKind.ADAPTERS]
    replica = replica_of(run)
    corpus = Corpus(run.artifact(ArtifactKind.CORPORA, "corpus").fetch())
    chosen, texts = [], {}
    with TestClient(replica.__serve_build_asgi_app__()) as client:

        def answer(model: str, prompt: str) -> Any:
            body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return response

        for domain in corpus.domains:
            (prompt,) = CorpusDocuments(corpus, domain).texts([0], most=60)
            response = answer("auto", prompt)
            assert response.headers["x-bam-adapter-reason"] == "nearest"
            chosen.append(response.headers["x-bam-adapter"])
            texts[domain] = [answer(name, prompt).json()["choices"] for name in ("topic-0000", "topic-0001", "seed")]
            assert answer("auto", prompt).json()["choices"] in texts[domain][:2]
        assert sorted(chosen) == ["topic-0000", "topic-0001"], "the words of the domains have different letters"
        assert all(first != second != base for first, second, base in texts.values())
        names = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert names[:2] == ["auto", "seed"]


def test_requests_that_wait_for_an_adapter_are_load(run: PipelineRun) -> None:
    replica, loads = replica_of(run), []
    with TestClient(replica.__serve_build_asgi_app__()) as client, ThreadPoolExecutor(6) as threads:
        assert client.portal is not None

        def answer(number: int) -> int:
            body = {"model": f"topic-000{number % 2}", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
            return client.post("/v1/completions", json=body).status_code

        answers = [threads.submit(answer, number) for number in range(6)]
        while not all(each.done() for each in answers):
            loads.append(client.portal.call(replica.record_autoscaling_stats)[LOAD])
            time.sleep(0.001)
        assert [each.result() for each in answers] == [200] * 6
        assert client.portal.call(replica.record_autoscaling_stats) == {LOAD: 0}
    assert max(loads) >= 3, "six requests, and two of them can be decoded together"


def test_adapters_of_a_run_come_and_go(run: PipelineRun) -> None:
    adapters = RunAdapters(run)
    source = RunSource(adapters)
    keys = source.keys()
    assert list(keys) == ["topic-0000", "topic-0001"]
    assert source.fetch(keys["topic-0001"]).name == "topic-0001"
    with pytest.raises(CheckpointError, match="has changed"):
        source.fetch(keys["topic-0001"]._replace(version="0"))
    adapters.remove("topic-0001")
    assert list(source.keys()) == ["topic-0000"]
    with pytest.raises(CheckpointError, match="no adapter 'topic-0001'"):
        source.fetch(keys["topic-0001"])


def test_an_adapter_with_another_scale_is_another_version(run: PipelineRun, tmp_path: Path) -> None:
    adapters, folder = RunAdapters(run), tmp_path / "law"
    adapters.export("topic-0000", folder)
    source = RunSource(adapters)
    adapters.add("law", folder)
    first = source.keys()["law"]
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1}))
    adapters.remove("law")
    source.keys()
    adapters.add("law", folder)
    second = source.keys()["law"]
    assert first != second, "the server would keep the weights and the keys and values of the first one"
    assert source.fetch(second).scale == 1 / ADAPTERS["rank"]


def test_a_rollback_keeps_seed_and_adapters_together(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, **SECTIONS)
    run = PipelineRun.of(recipe, open_store(recipe.store.uri))
    (seed,), name = served_models(run)
    record = EndpointRecord(name=name, served=(seed.prefix,), before=(("seeds/seed-0123456789ab",),))
    write_endpoint(run.store, record)
    with pytest.raises(CheckpointError, match="belong to another seed: serve the recipe of that seed"):
        roll_back(run)


def test_serving_does_not_train_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path, **{**SECTIONS, "adapters": {**ADAPTERS, "controls": ["random", "all_text"]}})
    ids = [task.id for task in task_graph(recipe)]
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    made: list[Task] = []

    def run_tasks(recipe: Recipe, kinds: list[ArtifactKind], factory: object, take_over: bool) -> str:
        made.extend(subset(task_graph(recipe), kinds))
        return "failed"

    monkeypatch.setattr(job, "run_tasks", run_tasks)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--recipe", str(tmp_path / "recipe.json")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(JOBS / "serve.py"), run_name="__main__")
    assert [task.name for task in made] == ["corpus", "seed", "topics", "part-00", "part-01"]
    assert {task.id for task in made} <= set(ids)


def test_adapters_need_a_source(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"serve.adapters needs adapters: add the sections"):
        small_recipe(tmp_path, serve=SECTIONS["serve"])
    with pytest.raises(ValidationError, match=r"adapters.rank is 32, above serve.adapters.max_rank 16: raise"):
        small_recipe(tmp_path, **{**SECTIONS, "adapters": {**ADAPTERS, "rank": 32}})
    folder = {"mode": "adapters", "adapters": {"source": str(tmp_path)}}
    recipe: Recipe = small_recipe(tmp_path, serve=folder)
    assert served_kinds(recipe) == [ArtifactKind.SEEDS]
