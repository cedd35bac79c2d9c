"""Requests that name an adapter, or let the server choose one, called with the `openai` client."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedModel

from bam_ray.adapters.peft_source import PeftFolders
from bam_ray.adapters.pool import AdapterPool
from bam_ray.adapters.source import AdapterKey
from bam_ray.adapters.weights import AdapterWeights
from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler, create_app
from bam_ray.serving.lora import LoraSlots
from bam_ray.serving.openai_types import CompletionRequest
from bam_ray.serving.prompts import PromptReader
from bam_ray.serving.served_adapters import AdapterOptions, ServedAdapters
from tests.support.decoding import run
from tests.support.http_server import running_server
from tests.support.peft_adapters import copy_of, merged, write_adapter

TOPICS = ["law", "medicine", "music"]


@dataclass(frozen=True)
class WordTopic:
    """The topic of a text that names it."""

    topic: str | None
    score: float
    margin: float = 0.25
    threshold: float = 0.5


def word_router(text: str) -> WordTopic:
    found = next((name for name in [*TOPICS, "sport"] if name in text), None)
    return WordTopic(found, 0.1 if found is None else 0.9)


@dataclass
class Served:
    """A server with adapters in a folder."""

    base: PreTrainedModel
    root: Path
    url: str
    client: openai.OpenAI
    tokenizer: Any

    def expected(self, topic: str | None, prompt: str) -> str:
        """Return the greedy completion of 8 tokens by the merged weights of an adapter."""
        model = copy_of(self.base) if topic is None else merged(self.base, self.root / topic)
        engine = DecodeEngine(model, self.tokenizer, slots=1, max_length=64)
        tokens = self.tokenizer(prompt).input_ids
        return run(engine, [tokens], lambda _: SamplingParams(max_tokens=8, temperature=0))[0].text

    def complete(self, model: str, prompt: str = "the cat", **fields: Any) -> Any:
        return self.client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0, **fields)


@pytest.fixture
def serve(models_by_family: Any, tokenizer: Any, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Return a function that starts a server."""
    base = models_by_family["llama"]
    for seed, topic in enumerate(TOPICS):
        write_adapter(tmp_path / topic, base, seed)
    with ExitStack() as stack:

        def start(slots: int = 2, **options: Any) -> Served:
            model = copy_of(base)
            lora = LoraSlots(model, slots, max_rank=4)
            engine = DecodeEngine(model, tokenizer, slots=4, max_length=64)
            engine.lora = lora
            executor = stack.enter_context(ThreadPoolExecutor(2))
            source = PeftFolders(tmp_path, lora.shapes)
            pool = AdapterPool(source, lora, executor, host_bytes=1 << 20)
            adapters = ServedAdapters(
                "tiny", source, pool, executor, router=word_router, options=AdapterOptions(**options)
            )
            url = stack.enter_context(running_server(create_app(Scheduler(engine), "tiny", adapters=adapters)))
            client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
            return Served(base, tmp_path, url, client, tokenizer)

        yield start


def test_a_request_can_name_its_adapter(serve: Callable[..., Served]) -> None:
    served = serve()
    texts, tiers = set(), []
    for model, topic in (("tiny", None), ("law", "law"), ("tiny:medicine", "medicine"), ("law", "law")):
        answer = served.complete(model)
        assert answer.choices[0].text == served.expected(topic, "the cat")
        assert answer.model == (f"tiny:{topic}" if topic else "tiny")
        assert (answer.adapter["adapter"], answer.adapter["reason"]) == (topic, "override")
        tiers.append(answer.adapter["tier"])
        texts.add(answer.choices[0].text)
    assert tiers == [None, "disk", "disk", "device"]
    assert len(texts) == 3


def test_the_server_chooses_the_nearest_topic(serve: Callable[..., Served]) -> None:
    served = serve()
    for prompt, topic, reason in (
        ("the law of", "law", "nearest"),
        ("no topic", None, "far"),
        ("sport is", None, "unavailable"),
    ):
        answer = served.client.completions.with_raw_response.create(
            model="auto", prompt=prompt, max_tokens=8, temperature=0
        )
        body: Any = answer.parse()
        assert body.choices[0].text == served.expected(topic, prompt)
        assert (body.adapter["adapter"], body.adapter["reason"]) == (topic, reason)
        assert answer.headers["x-bam-adapter"] == (topic or "none")
        assert answer.headers["x-bam-adapter-reason"] == reason
        assert answer.headers["x-bam-adapter-score"] == f"{body.adapter['score']:.4f}"
        assert float(answer.headers["x-bam-route-ms"]) >= 0
        assert body.adapter["threshold"] == 0.5
    tokens = served.tokenizer("the law of").input_ids
    assert served.complete("auto", tokens).adapter["adapter"] == "law"


def test_special_tokens_do_not_change_the_topic(models_by_family: Any, tokenizer: Any) -> None:
    engine = DecodeEngine(models_by_family["llama"], tokenizer, slots=1, max_length=64)
    tokens = [tokenizer.all_special_ids[0], *tokenizer("the cat").input_ids]
    assert tokenizer.decode(tokens) != "the cat"
    reader = PromptReader(engine, 1, 64)
    request = CompletionRequest(model="auto", prompt=tokens)
    assert asyncio.run(reader.first_text(request, [tokens], "")) == "the cat"
    reader.close()


def test_a_stream_states_the_adapter_first(serve: Callable[..., Served]) -> None:
    served = serve()
    messages: Any = [{"role": "user", "content": "about law"}, {"role": "assistant", "content": "music"}]
    with served.client.chat.completions.with_streaming_response.create(
        model="auto", messages=messages, max_tokens=4, stream=True
    ) as response:
        assert response.headers["x-bam-adapter"] == "law"
        assert response.headers["x-bam-adapter-tier"] == "disk"
        chunks: list[Any] = [*response.parse()]
    assert {chunk.model for chunk in chunks} == {"tiny:law"}
    assert chunks[0].adapter["adapter"] == "law" and chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.adapter is None for chunk in chunks[1:])


def test_concurrent_requests_share_few_adapter_slots(serve: Callable[..., Served]) -> None:
    served = serve(slots=1)
    models = ["law", "tiny", "music", "medicine", "auto"] * 4
    with ThreadPoolExecutor(20) as threads:
        answers = [*threads.map(lambda model: served.complete(model, "about music"), models)]
    expected = {topic: served.expected(topic, "about music") for topic in (*TOPICS, None)}
    for model, answer in zip(models, answers, strict=True):
        assert answer.choices[0].text == expected[{"tiny": None, "auto": "music"}.get(model, model)]


def test_adapters_come_and_go_without_a_restart(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_ray.serving.served_adapters.UNKNOWN_REFRESH_SECONDS", 0.0)
    served = serve()
    with pytest.raises(openai.NotFoundError, match="use 'music'"):
        served.complete("musik")
    write_adapter(served.root / "musik", served.base, 7)
    assert served.complete("musik").choices[0].text == served.expected("musik", "the cat")
    listed = httpx.get(f"{served.url}/v1/adapters", params={"q": "mus"}).json()["data"]
    assert [(entry["id"], entry["tier"]) for entry in listed] == [("music", "disk"), ("musik", "device")]
    shutil.rmtree(served.root / "musik")
    assert "musik" not in httpx.get(f"{served.url}/v1/adapters").text
    with pytest.raises(openai.NotFoundError):
        served.complete("musik")


def test_models_are_listed_with_their_parent(serve: Callable[..., Served]) -> None:
    served = serve()
    assert [model.id for model in served.client.models.list()] == ["auto", "tiny"]
    served.complete("law")
    cards: list[Any] = [*served.client.models.list()]
    assert [(card.id, card.parent) for card in cards] == [("auto", "tiny"), ("tiny", None), ("tiny:law", "tiny")]
    card: Any = served.client.models.retrieve("tiny:music")
    assert (card.id, card.root, card.parent) == ("tiny:music", "tiny", "tiny")
    with pytest.raises(openai.NotFoundError, match="is not served here: use"):
        served.client.models.retrieve("tiny:nothing")


def test_a_damaged_adapter_is_unavailable(serve: Callable[..., Served]) -> None:
    served = serve()
    (served.root / "law" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(openai.InternalServerError, match="adapter law cannot be loaded now: retry") as error:
        served.complete("law")
    assert error.value.status_code == 503
    assert int(error.value.response.headers["retry-after"]) >= 1
    assert str(served.root) not in error.value.message
    with pytest.raises(openai.InternalServerError, match="adapter law cannot be loaded"):
        served.complete("auto", "about law", stream=True)
    served.complete("music")


def test_the_base_can_replace_an_unavailable_adapter(serve: Callable[..., Served]) -> None:
    served = serve(on_unavailable="base")
    (served.root / "law" / "adapter_model.safetensors").write_bytes(b"damaged")
    answer = served.complete("auto", "about law")
    assert (answer.model, answer.adapter["adapter"], answer.adapter["reason"]) == ("tiny", None, "unavailable")
    assert answer.choices[0].text == served.expected(None, "about law")
    with pytest.raises(openai.InternalServerError):  # a request that names the adapter wants no other model
        served.complete("law")


def test_a_request_can_wait_for_its_adapter(serve: Callable[..., Served]) -> None:
    served = serve(on_unavailable="wait")
    path = served.root / "law" / "adapter_model.safetensors"
    good = path.read_bytes()
    path.write_bytes(b"damaged")
    timer = threading.Timer(0.3, lambda: path.write_bytes(good))
    timer.start()
    assert served.complete("law").choices[0].text == served.expected("law", "the cat")
    timer.join()


def test_a_slow_source_does_not_delay_the_choice(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(slots=2)
    assert served.complete("law").choices
    fetch, opened = PeftFolders.fetch, threading.Event()

    def slow(source: PeftFolders, key: AdapterKey) -> AdapterWeights:
        assert opened.wait(60)
        return fetch(source, key)

    monkeypatch.setattr(PeftFolders, "fetch", slow)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(served.complete, name) for name in ("medicine", "music")]
        metrics = f"{served.url}/metrics"
        try:
            while "bam_adapter_requests_waiting 2.0" not in httpx.get(metrics).text:
                assert not any(each.done() for each in waiting)
            # Both threads that load adapters wait for the source now
            assert served.complete("auto", "about law", timeout=30).adapter["adapter"] == "law"
        finally:
            opened.set()
        assert all(each.result().choices for each in waiting)
    assert "bam_adapter_requests_waiting 0.0" in httpx.get(metrics).text
