"""The sampler of a batch equals a naive sampler of one row, and no row depends on the others."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bam_ray.serving import DecodeEngine, SamplingParams
from bam_ray.serving.sampler import Sampled, TokenSampler
from bam_ray.serving.sampling import SamplingState, uniform
from tests.support.decoding import prompts_of, run

VOCABULARY = 12
CPU = torch.device("cpu")


def processed(logits: list[float], state: SamplingState, output: list[int]) -> list[float]:
    """Return the logits of one row with penalties and biases."""
    params, values = state.params, list(logits)
    for token in range(VOCABULARY):
        count = output.count(token)
        if count or token in state.prompt:
            factor = params.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    for token, bias in params.logit_bias:
        values[token] += bias
    if len(output) < params.min_tokens:
        for token in state.stop_tokens:
            values[token] = -math.inf
    return values


def naive(logits: list[float], state: SamplingState, output: list[int]) -> int:
    """Return the next token of one row, in Python's floating-point numbers."""
    params, values = state.params, processed(logits, state, output)
    order = sorted(range(VOCABULARY), key=lambda token: -values[token])
    if params.temperature == 0:
        return order[0]
    weights = [math.exp((value - max(values)) / params.temperature) for value in values]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    kept = list(range(VOCABULARY))
    if params.top_k or params.top_p < 1:
        kept = order[: params.top_k or None]
        total = sum(weights[token] for token in kept)
        before = [sum(weights[token] for token in kept[:rank]) for rank in range(len(kept))]
        kept = [token for token, part in zip(kept, before, strict=True) if not part or part < params.top_p * total]
    number = uniform(state.seed, len(output)) * sum(weights[token] for token in kept)
    cumulative = itertools.accumulate(weights[token] for token in kept)
    return next(token for token, part in zip(kept, cumulative, strict=True) if part >= number and weights[token])


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Return numbers of two digits, so that no draw is at the edge of a token."""
    return st.floats(low, high).map(lambda number: round(number, 2))


parameters = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.83, 0.41, 0.0]),
    seed=st.integers(-(1 << 70), 1 << 70),
    logprobs=st.sampled_from([None, 0, 3, 99]),
    top_k=st.integers(0, VOCABULARY + 2),
    min_p=st.sampled_from([0.0, 0.0713, 0.4307]),
    repetition_penalty=st.sampled_from([1.0, 1.31, 0.77]),
    presence_penalty=st.sampled_from([0.0, 0.61, -0.43]),
    frequency_penalty=st.sampled_from([0.0, 0.37]),
    logit_bias=st.lists(st.tuples(st.integers(0, VOCABULARY - 1), floats(-9, 9)), max_size=3).map(tuple),
    min_tokens=st.integers(0, 3),
)


@settings(max_examples=60)
@given(st.lists(parameters, min_size=1, max_size=4), st.integers(0, 1000))
def test_a_batch_equals_naive_rows(all_params: list[SamplingParams], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    sampler = TokenSampler(len(all_params), VOCABULARY, CPU)
    states = []
    for row, params in enumerate(all_params):
        prompt = [rng.randrange(VOCABULARY) for _ in range(3)]
        states.append(SamplingState(params, prompt, row=row, stop_tokens=frozenset({0, 5})))
        sampler.start(states[row])
    outputs: list[list[int]] = [[] for _ in states]
    for _ in range(5):
        logits = torch.randn(len(states), VOCABULARY, generator=generator) * 3
        for row, sampled in enumerate(sampler(logits, states)):
            assert sampled.token == naive(logits[row].tolist(), states[row], outputs[row])
            assert sampled.is_finite
            check_logprobs(sampled, logits[row], states[row].params)
            outputs[row].append(sampled.token)
            states[row].generated += 1


def check_logprobs(sampled: Sampled, logits: Tensor, params: SamplingParams) -> None:
    """Compare log-probabilities with those of all tokens."""
    expected = logits.double().log_softmax(-1)
    if params.logprobs is not None:
        assert sampled.logprob == pytest.approx(float(expected[sampled.token]), abs=1e-5)
        best = expected.topk(min(params.logprobs, VOCABULARY))
        assert [token for token, _ in sampled.top] == best.indices.tolist()
        assert [value for _, value in sampled.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_rows_without_finite_logits_are_found() -> None:
    logits = torch.randn(3, VOCABULARY)
    logits[1, 4] = torch.nan
    states = [SamplingState(SamplingParams(1, temperature=t, seed=1), [1], row=row) for row, t in enumerate((0, 1, 1))]
    assert [sampled.is_finite for sampled in TokenSampler(3, VOCABULARY, CPU)(logits, states)] == [True, False, True]


def test_numbers_are_uniform_and_independent() -> None:
    for numbers in ([uniform(7, i) for i in range(4000)], [uniform(i, 7) for i in range(4000)]):
        assert 0 < min(numbers) < max(numbers) <= 1
        tenths = [sum(int(number * 10 - 1e-12) == tenth for number in numbers) for tenth in range(10)]
        assert 320 < min(tenths) <= max(tenths) < 480
        mean = sum(numbers) / len(numbers)
        neighbors = sum((a - mean) * (b - mean) for a, b in itertools.pairwise(numbers)) * 12
        assert abs(neighbors / len(numbers)) < 0.05


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"stop_token_ids": "third"}, lambda free, got: got == free[:3]),
        ({"logit_bias": ((9, 1e4),)}, lambda free, got: set(got) == {9}),
        ({"repetition_penalty": 1e6}, lambda free, got: len(set(got)) == len(got)),
        ({"frequency_penalty": 1e6}, lambda free, got: len(set(got)) == len(got)),
        ({"logit_bias": ((0, 1e4),)}, lambda free, got: got == [0]),
        ({"logit_bias": ((0, 1e4),), "ignore_eos": True}, lambda free, got: got == [0] * 12),
        ({"logit_bias": ((0, 1e4),), "min_tokens": 4}, lambda free, got: len(got) == 5 and got[-1] == 0),
    ],
)
def test_parameters_reach_the_engine(engine: DecodeEngine, changes: dict[str, Any], check: Any) -> None:
    prompts = prompts_of(3, engine.vocab_size)
    free = run(engine, prompts, lambda _: SamplingParams(max_tokens=12, temperature=0))
    if "stop_token_ids" in changes:
        assert free[1].tokens[2] not in free[1].tokens[:2]
        changes = {"stop_token_ids": (free[1].tokens[2],)}

    def params(index: int) -> SamplingParams:
        return SamplingParams(max_tokens=12, temperature=0, **(changes if index == 1 else {}))

    got = run(engine, prompts, params)
    assert (got[0], got[2]) == (free[0], free[2])
    assert check([*free[1].tokens], [*got[1].tokens])
