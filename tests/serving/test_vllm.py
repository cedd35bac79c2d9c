"""The mixtures that vLLM can serve, and vLLM's server behind the endpoint.

`TEST_VLLM_PYTHON` is the path of a Python interpreter with vLLM, which needs other versions of torch than this project:

    TEST_VLLM_PYTHON=/path/of/its/venv/bin/python pytest -o addopts= tests/serving/test_vllm.py
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.errors import ServingError
from bam_ray.model import BamConfig
from bam_ray.serving import AppOptions, DecodeEngine, SamplingParams
from bam_ray.serving.vllm_app import create_vllm_app
from bam_ray.serving.vllm_rules import check_vllm
from bam_ray.serving.vllm_server import VllmServer, start_vllm
from bam_ray.settings import ServeSettings
from bam_ray.settings.api_keys import ApiKey, hash_api_key
from bam_ray.upcycling.write import AUTO_MAP, MODEL_CODE
from tests.support.decoding import run
from tests.support.http_server import running_server, wait_until
from tests.support.tiny import SIZES

VLLM_PYTHON = os.environ.get("TEST_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(VLLM_PYTHON is None, reason="TEST_VLLM_PYTHON names no Python interpreter with vLLM")
MODEL, KEY = "tiny", "bam-alice"
DENSE = {"dense_layers": [0], "num_experts": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embeddings": "experts"}, "embedding experts"),
        ({"router_input": "prefix"}, "routers that read the prefix"),
        ({"router_prior": "bigram"}, "a router prior"),
        ({"hidden_act": "gelu"}, "experts with gelu"),
        ({"mlp_gated": False}, "experts without a gate"),
        ({"mlp_bias": True}, "experts with biases"),
        ({**DENSE, "attention_experts": "kv_experts"}, r"dense layers \[0\] with other numbers of heads"),
        ({**DENSE, "attention_experts": "averaged", "dense_num_attention_heads": 2}, "other numbers of heads"),
    ],
)
def test_mixtures_that_vllm_cannot_serve(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message) as refused:
        check_vllm(BamConfig(**{**SIZES, **settings}))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        *(BamConfig(**SIZES, attention_experts=mode) for mode in ("kv_experts", "kv_shared", "averaged")),
        BamConfig(**SIZES, **DENSE, attention_experts="averaged"),
    ],
    ids=lambda config: f"{config.model_type} {getattr(config, 'attention_experts', '')}",
)
def test_models_that_vllm_can_serve(config: Any) -> None:
    check_vllm(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs serve.vllm_python"),
        ({"vllm_python": "x", "mode": "posterior"}, "posterior needs serve.engine bam"),
    ],
)
def test_settings_that_do_not_fit_vllm(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServeSettings(engine="vllm", **settings)


def save(folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Save a random model with its tokenizer, and return it."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    if isinstance(config, BamConfig):
        model.config.auto_map = AUTO_MAP
        folder.mkdir()
        for name in MODEL_CODE:
            (folder / name).write_bytes((files("bam_ray.model") / name).read_bytes())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_python_without_vllm_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save(tmp_path / "model", LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)}), tokenizer)
    with pytest.raises(ServingError, match=r"vLLM does not start.*No module named 'vllm'"):
        start_vllm(tmp_path / "model", MODEL, ServeSettings(engine="vllm", vllm_python=sys.executable))
    with pytest.raises(ServingError, match="which cannot be run"):
        start_vllm(tmp_path / "model", MODEL, ServeSettings(engine="vllm", vllm_python=str(tmp_path / "python")))


@dataclass
class Served:
    """A mixture served by vLLM, and this project's engine for the same model."""

    client: openai.OpenAI
    server: VllmServer
    url: str
    engine: DecodeEngine


@pytest.fixture(scope="module", params=["kv_experts", "kv_shared", "averaged", "dense"])
def served(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    sizes: dict[str, Any] = {**SIZES, "hidden_size": 64, "vocab_size": len(tokenizer), "head_dim": 32}
    sizes |= {"eos_token_id": 0, "bos_token_id": None}
    config = LlamaConfig(**sizes)
    if request.param != "dense":
        config = BamConfig(**sizes, num_experts=3, num_experts_per_tok=2, attention_experts=request.param)
    model = save(folder, config, tokenizer)
    settings = ServeSettings(
        engine="vllm", vllm_python=VLLM_PYTHON, slots=4, max_length=64, dtype="fp32", api_keys="env:X"
    )
    server = start_vllm(folder, MODEL, settings)
    options = AppOptions(api_keys=[ApiKey(sha256=hash_api_key(KEY.encode()), name="alice", requests_per_minute=10_000)])
    with (
        running_server(create_vllm_app(server, MODEL, 64, 100, options)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield Served(client, server, url, DecodeEngine(model, tokenizer, slots=4, max_length=64))
    assert not server.socket.exists()


@needs_vllm
@pytest.mark.slow
def test_vllm_behind_the_endpoint(served: Served) -> None:
    create = served.client.completions.create
    prompts = ["the cat", "what is a mixture?"]
    params = SamplingParams(max_tokens=12, temperature=0)
    tokens = [served.engine.tokenizer(prompt).input_ids for prompt in prompts]
    expected = [delta.text for delta in run(served.engine, tokens, lambda _: params)]
    answer = create(model=MODEL, prompt=prompts, max_tokens=12, temperature=0)
    assert [choice.text for choice in answer.choices] == expected
    assert str(answer._request_id).startswith("req_")
    stream = create(model=MODEL, prompt=prompts[0], max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError):  # the tokenizer has no chat template, and vLLM has no default
        served.client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    _check_refusals(served)
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{served.url}/health").status_code == 200
    metrics = httpx.get(f"{served.url}/metrics", headers=headers).text
    assert "vllm:generation_tokens_total" in metrics
    assert 'bam_requests_total{outcome="finished"} 2.0' in metrics
    with httpx.stream(
        "POST",
        f"{served.url}/v1/completions",
        json={"model": MODEL, "prompt": "the", "max_tokens": 60, "stream": True, "ignore_eos": True},
        headers=headers,
    ) as response:
        next(response.iter_lines())
    wait_until(lambda: 'bam_requests_total{outcome="left"}' in httpx.get(f"{served.url}/metrics", headers=headers).text)


def _check_refusals(served: Served) -> None:
    create = served.client.completions.create
    with pytest.raises(openai.NotFoundError, match="not served here"):
        create(model="other", prompt="the")
    for fields, param in (({"unknown": 1}, "unknown"), ({"routing": True}, "routing"), ({"domain": "law"}, "domain")):
        with pytest.raises(openai.BadRequestError) as refused:
            create(model=MODEL, prompt="the", extra_body=fields)
        assert refused.value.param == param
    with pytest.raises(openai.BadRequestError) as refused:
        create(model=MODEL, prompt=[5] * 80)
    assert refused.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.completions.create(model=MODEL, prompt="the")
