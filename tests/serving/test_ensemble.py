"""The posterior ensemble decodes as one model, and equals a loop over its members that knows no cache."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import ServingError
from bam_ray.evaluation.ensemble import ensemble_nll
from bam_ray.serving import DecodeEngine, PosteriorEnsemble, SamplingParams, ensemble
from bam_ray.serving.blocks import Block
from bam_ray.serving.cache import SlotCache, slot_attention
from tests.support.decoding import members_of, prompts_of, run
from tests.support.tiny import dense


@pytest.fixture(scope="module", params=["cohere", "llama"])
def members(request: Any, tokenizer: Any) -> list[PreTrainedModel]:
    """Return three different models of one family."""
    return members_of(request.param, 3, tokenizer)


@torch.no_grad()
def naive_logprobs(members: list[PreTrainedModel], tokens: list[int]) -> Tensor:
    """Return the log-probabilities of the ensemble for the token after `tokens`, one token and member at a time."""
    log_p = [member(torch.tensor([tokens])).logits[0].double().log_softmax(-1) for member in members]
    sums = torch.tensor(
        [sum(float(p[t, tokens[t + 1]]) for t in range(len(tokens) - 1)) for p in log_p], dtype=torch.double
    )
    weights = sums.log_softmax(0)
    return torch.stack([weight + p[-1] for weight, p in zip(weights, log_p, strict=True)]).logsumexp(0)


def test_batched_decoding_equals_a_loop(members: list[PreTrainedModel], tokenizer: Any) -> None:
    engine = DecodeEngine(PosteriorEnsemble(members), tokenizer, slots=3, max_length=64)
    prompts = prompts_of(6, engine.vocab_size)
    budgets = [3 + 7 * (i % 3) + i for i in range(len(prompts))]  # requests leave at different steps, and slots move
    got = run(engine, prompts, lambda i: SamplingParams(max_tokens=budgets[i], temperature=0, logprobs=1))
    for prompt, budget, delta in zip(prompts, budgets, got, strict=True):
        tokens = list(prompt)
        for token, entry in zip(delta.tokens, delta.logprobs, strict=True):
            expected = naive_logprobs(members, tokens)
            assert token == int(expected.argmax())
            assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
            tokens.append(token)
        assert len(delta.tokens) == budget or delta.finish_reason == "stop"


def test_a_request_is_the_same_alone(members: list[PreTrainedModel], tokenizer: Any) -> None:
    engine = DecodeEngine(PosteriorEnsemble(members), tokenizer, slots=3, max_length=64)
    prompts = prompts_of(7, engine.vocab_size)

    def params(index: int) -> SamplingParams:
        return SamplingParams(max_tokens=5 + 4 * index, temperature=0.9, seed=index, logprobs=0)

    together = run(engine, prompts, params)
    for index, prompt in enumerate(prompts):
        (alone,) = run(engine, [prompt], lambda _, index=index: params(index))  # type: ignore[misc]  # mypy cannot infer the default
        assert alone.tokens == together[index].tokens
        got, expected = ([entry.logprob for entry in each.logprobs] for each in (alone, together[index]))
        assert got == pytest.approx(expected, abs=1e-5)


def test_it_gives_the_text_the_probability_of_the_report(members: list[PreTrainedModel], tokenizer: Any) -> None:
    tokens = prompts_of(4, len(tokenizer))[3]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        log_p = [
            member(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2) for member in members
        ]
    starts = np.arange(len(tokens) - 1)[None] == 0
    nll = ensemble_nll(-torch.stack(log_p).numpy(), starts, "posterior")[0]
    model, cache, got = PosteriorEnsemble(members), SlotCache(1, 64), []
    block = Block(0, 64)
    for position in range(1, len(tokens) - 1):  # a prompt of two tokens, and then one token at a time
        first = 0 if position == 1 else position
        places = torch.arange(first, position + 1)[None]
        cache.prefill(block, 0, places, first) if first == 0 else cache.decode([block], [0], places, [first])
        with torch.no_grad(), slot_attention(model):
            out = model(ids[:, first : position + 1], places, cache)
        cache.commit()
        got.append(-float(out.logits[0, 0, tokens[position + 1]]))
    assert got == pytest.approx(nll[1:].tolist(), abs=1e-5)


def test_identical_members_equal_the_model(members: list[PreTrainedModel], tokenizer: Any) -> None:
    single = DecodeEngine(members[0], tokenizer, slots=2, max_length=64)
    several = DecodeEngine(PosteriorEnsemble([members[0]] * 3), tokenizer, slots=2, max_length=64)
    prompts = prompts_of(4, single.vocab_size)
    expected, got = (
        run(engine, prompts, lambda _: SamplingParams(max_tokens=20, temperature=0, logprobs=3))
        for engine in (single, several)
    )
    for one, other in zip(expected, got, strict=True):
        assert one.text == other.text
        assert [e.logprob for e in one.logprobs] == pytest.approx([e.logprob for e in other.logprobs], abs=1e-5)


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9])
def test_long_prompts_are_scored_in_chunks(length: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "CHUNK_TOKENS", 4)
    members = members_of("cohere", 2, tokenizer)
    engine = DecodeEngine(PosteriorEnsemble(members), tokenizer, slots=1, max_length=16)
    prompt = list(range(3, 3 + length))
    (delta,) = run(engine, [prompt], lambda _: SamplingParams(max_tokens=1, temperature=0, logprobs=0))
    expected = naive_logprobs(members, prompt)
    assert delta.logprobs[0].logprob == pytest.approx(float(expected.max()), abs=1e-5)


def test_members_must_fit_together(tokenizer: Any, models_by_family: Any) -> None:
    llama = members_of("llama", 1, tokenizer)
    with pytest.raises(ServingError, match="llama with 300 tokens, qwen3 with 300 tokens: use dense models of one"):
        PosteriorEnsemble([*llama, *members_of("qwen3", 1, tokenizer)])
    with pytest.raises(ServingError, match="llama with 96 tokens, llama with 300 tokens"):
        PosteriorEnsemble([*llama, dense("llama", 0)])
    with pytest.raises(ServingError, match="bam with 300 tokens: use dense models"):
        PosteriorEnsemble([models_by_family["bam"]])
