"""Errors of the model end the requests that they concern, and a full queue refuses more."""

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bam_ray.errors import Overloaded, ServingError
from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler
from bam_ray.serving.engine import Generation
from bam_ray.serving.scheduler import MAX_FAILED_STEPS
from tests.support.decoding import prompts_of, run

BAD = 7  # the model cannot compute this token
GREEDY = SamplingParams(max_tokens=12, temperature=0)


def fail_at(model: Any, monkeypatch: pytest.MonkeyPatch, fails: Callable[[list[int]], bool]) -> None:
    """Make each forward pass fail whose tokens, in a list, make `fails` return True."""
    forward = model.forward

    def failing(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = forward(*args, input_ids=input_ids, **kwargs)
        if fails(input_ids.flatten().tolist()):
            raise RuntimeError("bad token")
        return out

    monkeypatch.setattr(model, "forward", failing)


def serve(engine: DecodeEngine, client: Callable[[Scheduler], Awaitable[None]], **limits: int) -> Scheduler:
    """Run a client of a new scheduler, and close the scheduler."""

    async def main() -> Scheduler:
        scheduler = Scheduler(engine, **limits)
        try:
            await asyncio.wait_for(client(scheduler), 300)
        finally:
            await scheduler.close()
        return scheduler

    return asyncio.run(main())


async def tokens_of(scheduler: Scheduler, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    """Return the tokens that continue a prompt."""
    tokens: list[int] = []
    async with aclosing(scheduler.generate([prompt], params)) as batches:
        async for batch in batches:
            tokens += [token for _, delta in batch for token in delta.tokens]
    return tokens


@pytest.mark.parametrize("family", ["llama", "bam-prefix"])
def test_one_bad_row_ends_alone(
    family: str, models_by_family: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DecodeEngine(models_by_family[family], tokenizer, slots=3, max_length=64)
    prompts = prompts_of(3, engine.vocab_size)
    expected = run(engine, prompts, lambda _: GREEDY)
    tokens, others = expected[1].tokens, {*expected[0].tokens, *expected[2].tokens}
    place = next(i for i, token in enumerate(tokens) if i and token not in {*tokens[:i], *others})
    bad = tokens[place]
    fail_at(models_by_family[family], monkeypatch, lambda tokens: bad in tokens)
    got: dict[Generation, list[int]] = {engine.add(prompt, GREEDY): [] for prompt in prompts}
    errors = {}
    while engine.active:
        for generation, output in engine.step():
            if output.sampled is not None:
                got[generation].append(output.sampled.token)
            if output.error is not None:
                errors[generation] = output.error
    first, second, third = got
    assert (got[first], got[third]) == ([*expected[0].tokens], [*expected[2].tokens])
    assert got[second] == [*tokens[: place + 1]]
    assert list(errors) == [second]
    assert engine.free == 3


def test_a_bad_prompt_ends_alone(engine: DecodeEngine, models_by_family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[3, 4], [5, BAD], [6, 8, 9]]
    expected = run(engine, [prompts[0], prompts[2]], lambda _: GREEDY)
    fail_at(models_by_family["cohere"], monkeypatch, lambda tokens: len(tokens) > 1 and BAD in tokens)

    async def client(scheduler: Scheduler) -> None:
        results = await asyncio.gather(*(tokens_of(scheduler, prompt) for prompt in prompts), return_exceptions=True)
        assert [results[0], results[2]] == [[*delta.tokens] for delta in expected]
        assert isinstance(results[1], ServingError)
        assert scheduler.failure is None

    serve(engine, client)


def test_a_model_that_always_fails_stops_the_scheduler(
    engine: DecodeEngine, models_by_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(models_by_family["cohere"], monkeypatch, lambda _: True)

    async def client(scheduler: Scheduler) -> None:
        for _ in range(MAX_FAILED_STEPS):
            assert scheduler.failure is None
            with pytest.raises(ServingError, match="the model failed: see the log"):
                await tokens_of(scheduler, [1, 2])
        with pytest.raises(ServingError, match="steps in a row"):
            await tokens_of(scheduler, [1, 2])
        assert scheduler.failure is not None

    serve(engine, client)


def test_bad_prompts_in_a_row_do_not_stop_the_scheduler(
    engine: DecodeEngine, models_by_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(models_by_family["cohere"], monkeypatch, lambda tokens: BAD in tokens)

    async def client(scheduler: Scheduler) -> None:
        for _ in range(2 * MAX_FAILED_STEPS):
            with pytest.raises(ServingError, match="the model failed"):
                await tokens_of(scheduler, [BAD])
        assert await tokens_of(scheduler, [3])

    serve(engine, client)


def test_an_error_outside_the_model_fails_all_readers(engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("/home/secret: the slot cannot be freed")

    async def client(scheduler: Scheduler) -> None:
        readers = [asyncio.create_task(tokens_of(scheduler, [3, i])) for i in range(5)]
        while not scheduler.active:
            await asyncio.sleep(0)
        monkeypatch.setattr(engine, "remove", broken)
        readers[0].cancel()
        results = await asyncio.gather(*readers[1:], return_exceptions=True)
        assert {str(result) for result in results} == {str(scheduler.failure)}
        assert "secret" not in str(scheduler.failure)
        with pytest.raises(ServingError, match="engine has stopped"):
            scheduler.generate([[1]], GREEDY)

    serve(engine, client)


@pytest.mark.parametrize(
    ("limits", "prompts"), [({"max_queued_prompts": 4}, [[1]] * 5), ({"max_queued_tokens": 9}, [[1] * 5] * 2)]
)
def test_a_full_queue_refuses_a_request_as_a_whole(
    engine: DecodeEngine, limits: dict[str, int], prompts: list[list[int]]
) -> None:
    async def client(scheduler: Scheduler) -> None:
        with pytest.raises(Overloaded, match="retry after 1 s") as raised:
            scheduler.generate(prompts, GREEDY)
        assert raised.value.retry_after == 1.0
        assert scheduler.waiting == 0
        assert await tokens_of(scheduler, prompts[0])

    serve(engine, client, **limits)


def test_random_operations_leave_nothing_behind(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """10,000 requests that share prefixes, and finish, leave while they wait or run, fail or are refused."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    engine = DecodeEngine(model, tokenizer, slots=4, max_length=64, kv_tokens=192)
    rng = random.Random(5)
    text = [rng.randrange(1, 90) for _ in range(40)]
    fail_at(model, monkeypatch, lambda _: rng.random() < 0.04)
    caplog.set_level(logging.CRITICAL)
    outcomes = {"finished": 0, "left": 0, "failed": 0, "refused": 0}

    async def request(scheduler: Scheduler) -> None:
        prompts = [[*text[: rng.randrange(40)], rng.randrange(1, 90)] for _ in range(rng.randrange(1, 3))]
        params = SamplingParams(max_tokens=rng.randrange(1, 4), temperature=0, n=rng.randrange(1, 3))
        seconds = rng.choice([None, 0.0, 0.001, 0.02])
        try:
            async with asyncio.timeout(seconds), aclosing(scheduler.generate(prompts, params)) as batches:
                async for _ in batches:
                    pass
            outcomes["finished"] += 1
        except TimeoutError:
            outcomes["left"] += 1
        except Overloaded:
            outcomes["refused"] += 1
        except ServingError:
            outcomes["failed"] += 1

    async def client(scheduler: Scheduler) -> None:
        tasks = len(asyncio.all_tasks())
        for _ in range(100):
            await asyncio.gather(*(request(scheduler) for _ in range(100)))
        while scheduler.active or scheduler.waiting:
            await asyncio.sleep(0.001)
        assert len(asyncio.all_tasks()) == tasks + 1  # that of the scheduler
        assert scheduler.failure is None
        with pytest.raises(Overloaded, match="holds 0 of 100 prompts and 0 of"):
            scheduler.generate([[1]] * 101, GREEDY)

    serve(engine, client, max_queued_prompts=100)
    assert min(outcomes.values()) > 50, outcomes
    assert (engine.active, engine.free, engine.memory.used) == (0, 4, 0)
    assert 0.3 < engine.prefixes.hits / engine.prefixes.queries < 1


def test_a_tokenizer_that_fails_ends_its_request(engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def client(scheduler: Scheduler) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.tokenizer), "decode", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ServingError, match="the model failed"):
                await tokens_of(scheduler, [3])
        assert len(await tokens_of(scheduler, [3])) == 12
        assert scheduler.failure is None

    serve(engine, client)
    assert engine.free == 3


def test_the_end_of_a_request_in_the_engine_is_known(engine: DecodeEngine) -> None:
    """A step that is computed while a client leaves may still use what the request uses."""
    active: list[int] = []
    params = SamplingParams(max_tokens=60, ignore_eos=True)

    async def client(scheduler: Scheduler) -> None:
        scheduler.when_left(lambda: active.append(-1))  # nothing runs
        for _ in range(3):
            async with aclosing(scheduler.generate([[5, 6]], params)) as batches:
                await anext(batches)
            left = asyncio.Event()
            scheduler.when_left(lambda: active.append(engine.active))
            scheduler.when_left(left.set)
            await left.wait()

    serve(engine, client)
    assert active == [-1, 0, 0, 0]


def test_a_scheduler_that_stops_uses_nothing(
    engine: DecodeEngine, models_by_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that wait for the adapter slot of such a request would wait forever."""
    fail_at(models_by_family["cohere"], monkeypatch, lambda _: True)
    begun, ends = threading.Event(), threading.Event()

    def test() -> None:
        begun.set()
        ends.wait(60)
        raise RuntimeError("bad engine")

    monkeypatch.setattr(engine, "test", test)

    async def client(scheduler: Scheduler) -> None:
        for _ in range(MAX_FAILED_STEPS):
            with pytest.raises(ServingError, match="the model failed: see the log"):
                await tokens_of(scheduler, [1, 2])
        await asyncio.to_thread(begun.wait)
        left = asyncio.Event()
        scheduler.when_left(left.set)
        ends.set()
        await asyncio.wait_for(left.wait(), 10)
        assert scheduler.failure is not None

    serve(engine, client)
