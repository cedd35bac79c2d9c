"""The load generator, with the endpoint and the command line."""

import asyncio
import json

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from typer.testing import CliRunner

from bam_ray.cli.app import app
from bam_ray.errors import ServingError
from bam_ray.serving import DecodeEngine, Scheduler, create_app
from bam_ray.serving.load import LoadOptions, percentile, run_load
from tests.support.http_server import running_server

MODEL = "tiny"


def test_percentiles_are_values_of_the_list() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 90, 99)] == [50, 90, 99]
    assert percentile([3.0], 50) == 3.0


def test_load_measures_every_token(engine: DecodeEngine) -> None:
    with running_server(create_app(Scheduler(engine), MODEL)) as url:
        options = LoadOptions(f"{url}/v1", 5, 200.0, prompt_words=4, max_tokens=6, extra={"ignore_eos": True})
        report = asyncio.run(run_load(options))
    assert not report.errors
    assert [each.tokens for each in report.times] == [6] * 5
    for each in report.times:
        assert 0 < each.first <= each.total <= report.seconds


def test_load_reports_refused_requests(engine: DecodeEngine) -> None:
    with running_server(create_app(Scheduler(engine), MODEL)) as url:
        report = asyncio.run(run_load(LoadOptions(f"{url}/v1", 2, prompt_words=4, max_tokens=6, model="another")))
    assert len(report.errors) == 2 and "model_not_found" in report.errors[0]


def test_a_stream_without_text_is_an_error() -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions() -> StreamingResponse:
        usage = {"choices": [], "usage": {"completion_tokens": 3}}
        return StreamingResponse([f"data: {json.dumps(usage)}\n\n", "data: [DONE]\n\n"])

    with running_server(app) as url:
        report = asyncio.run(run_load(LoadOptions(f"{url}/v1", 2, model=MODEL)))
    assert report.errors == ["the stream has no text"] * 2
    assert not report.finished and report.tokens_per_second == 0


def test_load_refuses_a_url_without_endpoint() -> None:
    with pytest.raises(ServingError, match="pass the URL of an endpoint"):
        asyncio.run(run_load(LoadOptions("http://127.0.0.1:9/v1")))


def test_bench_command_prints_latencies(engine: DecodeEngine) -> None:
    arguments = ["--requests", "3", "--prompt-words", "4", "--max-tokens", "5", "--ignore-eos"]
    with running_server(create_app(Scheduler(engine), MODEL)) as url:
        result = CliRunner().invoke(app, ["bench", f"{url}/v1", *arguments])
    assert result.exit_code == 0, result.output
    assert "time to first token" in result.output and "3 requests and 15 tokens" in result.output
