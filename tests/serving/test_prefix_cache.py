"""Requests whose prompts begin alike share keys and values, and their output does not show it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_ray.model.one_expert import EXCLUDED
from bam_ray.serving import DecodeEngine, PosteriorEnsemble, SamplingParams
from bam_ray.serving.engine import Delta, Generation, Output
from bam_ray.serving.lora import SlotAdapter
from tests.support.decoding import members_of, run

GREEDY = SamplingParams(max_tokens=10, temperature=0, logprobs=2, ignore_eos=True)
TEXTS = [[random.Random(seed).randrange(1, 300) for _ in range(170)] for seed in range(3)]
WEIGHTS = [None, (0.0, 1.0, 0.0)]


@pytest.fixture(scope="module")
def members(tokenizer: Any) -> PosteriorEnsemble:
    return PosteriorEnsemble(members_of("llama", 2, tokenizer))


@pytest.fixture
def model(request: pytest.FixtureRequest, models_by_family: Any, members: PosteriorEnsemble) -> Any:
    return members if request.param == "ensemble" else models_by_family[request.param]


def cached_tokens(engine: DecodeEngine, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[int]:
    """Return how many tokens of each prompt are found in the cache, one prompt after the other."""
    return [run(engine, [prompt], lambda _: params)[0].cached for prompt in prompts]


def assert_equal(got: Delta, expected: Delta) -> None:
    assert got.tokens == expected.tokens
    for one, other in zip(got.logprobs, expected.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [each.logprob for each in one.top] == pytest.approx([each.logprob for each in other.top], abs=1e-5)


@pytest.mark.parametrize(
    ("model", "interval"), [("llama", 1), ("bam-shared", 1), ("bam-prefix", 128), ("ensemble", 128)], indirect=["model"]
)
def test_a_hit_equals_a_miss(model: Any, interval: int, tokenizer: Any) -> None:
    """Prompts that share a beginning, continue a response, or are repeated give the output of a computed prompt."""
    without = DecodeEngine(model, tokenizer, slots=1, max_length=256, prefix_cache=False)
    engine = DecodeEngine(model, tokenizer, slots=3, max_length=256)
    text, other = TEXTS[0], TEXTS[1]
    (first,) = run(engine, [text[:140]], lambda _: GREEDY)
    prompts = [[*text[:140], *first.tokens[:9], *other[:5]], text[:140], text[:130] + other[:9], text[:100]]
    for prompt, common in zip(prompts, [149, 139, 130, 99], strict=True):
        (got,), (expected,) = (run(each, [prompt], lambda _: GREEDY) for each in (engine, without))
        assert_equal(got, expected)
        assert got.cached == common // interval * interval
    assert without.prefixes.hits == without.prefixes.queries == 0
    assert engine.prefixes.queries == 140 + sum(map(len, prompts))


@pytest.mark.parametrize("model", ["llama", "bam-prefix"], indirect=True)
def test_requests_that_start_together_share(model: Any, tokenizer: Any) -> None:
    engine = DecodeEngine(model, tokenizer, slots=4, max_length=256, tokens_per_step=80)
    prompts = [TEXTS[0][:150] + TEXTS[1][:index] for index in (0, 3, 9)]
    got = run(engine, prompts, lambda _: GREEDY)
    without = DecodeEngine(model, tokenizer, slots=1, max_length=256, prefix_cache=False)
    for delta, expected in zip(got, run(without, prompts, lambda _: GREEDY), strict=True):
        assert_equal(delta, expected)
    assert got[0].cached == 0
    assert all(delta.cached >= 60 for delta in got[1:])


def test_a_request_in_the_same_block_shares(models_by_family: Any, tokenizer: Any) -> None:
    engine = DecodeEngine(models_by_family["llama"], tokenizer, slots=1, max_length=64)
    params = SamplingParams(max_tokens=3, temperature=0)
    assert cached_tokens(engine, [TEXTS[0][:40], TEXTS[0][:50], TEXTS[1][:50], TEXTS[0][:40]], params) == [0, 40, 0, 0]


def test_the_oldest_texts_are_lost_first(models_by_family: Any, tokenizer: Any) -> None:
    engine = DecodeEngine(models_by_family["llama"], tokenizer, slots=2, max_length=128, kv_tokens=384)
    params = SamplingParams(max_tokens=3, temperature=0)
    texts = [[index + 1] * 5 + TEXTS[0][:40] for index in range(6)]  # five fit beside a request
    assert cached_tokens(engine, texts[:5], params) == [0] * 5
    assert cached_tokens(engine, [texts[0], texts[5]], params) == [44, 0]
    assert cached_tokens(engine, [texts[0], texts[2], texts[1]], params) == [44, 44, 0]


def test_adapters_and_domains_do_not_share(models_by_family: Any, tokenizer: Any) -> None:
    engine = DecodeEngine(models_by_family["bam-prefix"], tokenizer, slots=6, max_length=256)

    def cached(key: str | None, weights: tuple[float, ...] | None) -> int:
        params = SamplingParams(max_tokens=2, temperature=0, expert_weights=weights)
        generation = Generation(TEXTS[0], params, adapter=None if key is None else SlotAdapter(key, 1))
        engine.start(generation)
        while engine.active:
            engine.step()
        return generation.cached

    keys = [(None, None), ("a", None), ("b", None), (None, (0.0, 1.0, 0.0)), (None, (0.5, 0.5, 0.0))]
    assert [cached(*key) for key in keys] == [0] * 5
    assert [cached(*key) for key in keys[-2:]] == [128, 128]


def test_log_probabilities_of_prompts_are_computed(models_by_family: Any, tokenizer: Any) -> None:
    engine = DecodeEngine(models_by_family["llama"], tokenizer, slots=2, max_length=256)
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0)
    assert cached_tokens(engine, [TEXTS[0], TEXTS[0]]) == [0, 169]
    (delta,) = run(engine, [TEXTS[0]], lambda _: params)
    assert delta.cached == 0
    assert len(delta.prompt_logprobs) == len(TEXTS[0]) - 1


@contextmanager
def failures(model: Any) -> Iterator[list[bool]]:
    """Make a forward pass fail for each item of the list, after it has stored keys and values."""
    pending: list[bool] = []

    def fail(*args: Any) -> None:
        if pending and pending.pop():
            raise RuntimeError("failed")

    hook = model.register_forward_hook(fail)
    try:
        yield pending
    finally:
        hook.remove()


class Clients:
    """Clients of an engine that start, leave and cause failures at random."""

    def __init__(self, engine: DecodeEngine, data: st.DataObject, failing: list[bool]) -> None:
        self._engine, self._failing = engine, failing
        self._draw = data.draw
        self.outputs: dict[Generation, list[Output]] = {}

    def add(self) -> None:
        """Start a request, if there is memory for it."""
        prompt = self._draw(st.sampled_from(TEXTS))[: self._draw(st.integers(1, 170))]
        prompt = prompt + self._draw(st.sampled_from(TEXTS))[: self._draw(st.integers(0, 20))]
        weights = self._draw(st.sampled_from(WEIGHTS)) if self._engine.has_router_prior else None
        tokens, n = self._draw(st.integers(1, 60)), self._draw(st.integers(1, 2))
        generation = Generation(prompt, SamplingParams(tokens, 0, logprobs=0, expert_weights=weights, n=n))
        if self._engine.plan([self._engine.waiting_request(generation)], {}).start:
            self.outputs |= {each: [] for each in (generation, *generation.copies)}
            self._engine.start(generation)

    def step(self) -> None:
        """Compute a few steps."""
        for _ in range(self._draw(st.integers(1, 5))):
            for generation, output in self._engine.step():
                self.outputs[generation].append(output)

    def leave(self) -> None:
        """Remove a request, which may have ended."""
        if self.outputs:
            self._engine.remove(self._draw(st.sampled_from([*self.outputs])))

    def fail(self) -> None:
        """Make one of the next forward passes fail."""
        self._failing.append(True)


@pytest.mark.parametrize("family", ["llama", "bam-prefix"])
@settings(max_examples=12)
@given(data=st.data())
def test_random_requests_give_what_the_model_gives(
    family: str, models_by_family: Any, tokenizer: Any, data: st.DataObject
) -> None:
    """Requests of all lengths start, finish, leave and fail, in memory that is always full."""
    model = models_by_family[family]
    engine = DecodeEngine(model, tokenizer, slots=4, max_length=256, kv_tokens=512, tokens_per_step=70)
    with failures(model) as failing:
        clients = Clients(engine, data, failing)
        operations = [clients.add, clients.add, clients.step, clients.step, clients.leave, clients.fail]
        for operation in data.draw(st.lists(st.sampled_from(operations), min_size=8, max_size=40)):
            operation()
        failing.clear()
        while engine.active:
            clients.step()
    assert (engine.free, engine.memory.used) == (4, 0)
    for generation, outputs in clients.outputs.items():
        check(model, generation, outputs)


def check(model: Any, generation: Generation, outputs: list[Output]) -> None:
    """Check the tokens of a request, and their log-probabilities, by one forward pass of the model."""
    sampled = [output.sampled for output in outputs if output.sampled is not None]
    ids = torch.tensor([generation.prompt + [each.token for each in sampled]])
    weights = generation.params.expert_weights
    prior = {} if weights is None else {"router_prior": torch.tensor([weights]).log().clamp_min(EXCLUDED)}
    with torch.no_grad():
        log_p = model(ids, **prior).logits[0, len(generation.prompt) - 1 : -1].log_softmax(-1)
    assert log_p.argmax(-1).tolist() == [each.token for each in sampled]
    assert [each.logprob for each in sampled] == pytest.approx(log_p.amax(-1).tolist(), abs=1e-5)
