"""The output of a request does not depend on the requests that are decoded with it."""

import copy
import random
from typing import Any

import pytest
import torch

from bam_ray.errors import ServingError
from bam_ray.serving import DecodeEngine, PosteriorEnsemble, SamplingParams
from bam_ray.serving.engine import Generation
from tests.support.decoding import members_of, prompts_of, run


@pytest.mark.parametrize("family", ["cohere", "llama", "bam", "bam-prefix", "bam-shared"])
def test_batched_decoding_equals_generate(family: str, models_by_family: Any, tokenizer: Any) -> None:
    model = models_by_family[family]
    engine = DecodeEngine(model, tokenizer, slots=3, max_length=64)
    prompts = prompts_of(8, engine.vocab_size)
    budgets = [3 + 7 * (i % 3) + i for i in range(len(prompts))]  # the requests end at different steps
    got = run(engine, prompts, lambda i: SamplingParams(max_tokens=budgets[i], temperature=0))
    for prompt, budget, delta in zip(prompts, budgets, got, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=budget, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert list(delta.tokens) == alone
        assert delta.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert delta.finish_reason == ("stop" if alone[-1] == 0 else "length")


def test_sampling_does_not_depend_on_other_requests(engine: DecodeEngine) -> None:
    prompts = prompts_of(6, engine.vocab_size)

    def params(index: int) -> SamplingParams:
        return SamplingParams(max_tokens=12, temperature=0.9, top_p=(1.0, 0.8, 0.0)[index % 3], seed=index)

    together = run(engine, prompts, params)
    for index, prompt in enumerate(prompts):
        (alone,) = run(engine, [prompt], lambda _, index=index: params(index))  # type: ignore[misc]  # mypy cannot infer the default
        assert alone == together[index]
    other = run(engine, prompts, lambda i: SamplingParams(max_tokens=12, temperature=0.9, seed=100 + i))
    assert other != together


def test_top_p_of_zero_is_greedy(engine: DecodeEngine) -> None:
    prompts = prompts_of(3, engine.vocab_size)
    greedy = run(engine, prompts, lambda _: SamplingParams(max_tokens=8, temperature=0))
    assert run(engine, prompts, lambda _: SamplingParams(max_tokens=8, temperature=2, top_p=0)) == greedy
    assert run(engine, prompts, lambda _: SamplingParams(max_tokens=8, temperature=1e-6)) == greedy


def test_removing_a_request_does_not_change_the_others(engine: DecodeEngine) -> None:
    prompts = prompts_of(4, engine.vocab_size)
    params = SamplingParams(max_tokens=20, temperature=0)
    expected = run(engine, prompts, lambda _: params)
    first, second, third = [engine.add(prompt, params) for prompt in prompts[:3]]
    got: dict[Generation, list[int]] = {first: [], second: [], third: []}

    def step() -> None:
        for generation, output in engine.step():
            assert output.sampled is not None
            got[generation].append(output.sampled.token)

    step()
    step()
    engine.remove(first)  # the last request moves into its block
    assert engine.free == 1
    fourth = engine.add(prompts[3], params)
    got[fourth] = []
    while engine.active:
        step()
    assert [got[second], got[third], got[fourth]] == [[*delta.tokens] for delta in expected[1:]]
    assert len(got[first]) == 2


def test_text_ends_at_the_last_position(engine: DecodeEngine) -> None:
    longest = [5] * (engine.max_length - 1)
    full, one = run(engine, [longest, longest[:-3]], lambda _: SamplingParams(max_tokens=99, temperature=0))
    assert (len(full.tokens), full.finish_reason) == (1, "length")
    assert len(one.tokens) == 4


def test_the_longest_prompt_is_computed_at_start(models_by_family: Any, tokenizer: Any) -> None:
    model, last = models_by_family["bam"], []
    hook = model.register_forward_pre_hook(
        lambda module, inputs, named: last.append(int(named["position_ids"].max())), with_kwargs=True
    )
    DecodeEngine(model, tokenizer, slots=2, max_length=48, tokens_per_step=20)
    hook.remove()
    assert max(last) == 46


def test_text_ends_before_a_stop_string(engine: DecodeEngine) -> None:
    prompt = prompts_of(1, engine.vocab_size)
    (free,) = run(engine, prompt, lambda _: SamplingParams(max_tokens=30, temperature=0))
    stop = free.text[6:9]
    (cut,) = run(engine, prompt, lambda _: SamplingParams(max_tokens=30, temperature=0, stop=("nowhere", stop)))
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.tokens) < len(free.tokens)
    assert engine.active == 0


def test_logprobs_equal_those_of_the_model(engine: DecodeEngine, models_by_family: Any) -> None:
    prompt = [7, 8, 9]
    (delta,) = run(engine, [prompt], lambda _: SamplingParams(max_tokens=4, temperature=0, logprobs=2))
    ids = torch.tensor([prompt + list(delta.tokens)])
    with torch.no_grad():
        expected = models_by_family["cohere"](ids).logits[0].log_softmax(-1)
    for position, (token, entry) in enumerate(zip(delta.tokens, delta.logprobs, strict=True)):
        row = expected[len(prompt) - 1 + position]
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert [each.logprob for each in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["cohere", "llama", "bam", "bam-prefix", "bam-shared", "ensemble"])
def test_chunked_prompts_equal_whole_prompts(family: str, models_by_family: Any, tokenizer: Any) -> None:
    """Chunks of any size, beside rows that decode, give the log-probabilities of a prompt that is computed alone."""
    ensemble = family == "ensemble"
    model = PosteriorEnsemble(members_of("llama", 3, tokenizer)) if ensemble else models_by_family[family]
    prompts = [*prompts_of(6, len(tokenizer)), [5, 9, 40, 3] * 12]

    def params(index: int) -> SamplingParams:
        return SamplingParams(max_tokens=4 + index, temperature=0, logprobs=3)

    whole = DecodeEngine(model, tokenizer, slots=1, max_length=64, tokens_per_step=64)
    expected = run(whole, prompts, params)
    for tokens_per_step in (5, 7, 16):
        chunked = DecodeEngine(model, tokenizer, slots=4, max_length=64, tokens_per_step=tokens_per_step)
        for got, one in zip(run(chunked, prompts, params), expected, strict=True):
            assert got.tokens == one.tokens
            for entry, reference in zip(got.logprobs, one.logprobs, strict=True):
                assert entry.logprob == pytest.approx(reference.logprob, abs=1e-5)
                assert [each.logprob for each in entry.top] == pytest.approx(
                    [each.logprob for each in reference.top], abs=1e-5
                )
        assert (chunked.active, chunked.free, chunked.memory.used) == (0, 4, 0)


def test_prompts_are_divided_only_beside_streams(models_by_family: Any, tokenizer: Any) -> None:
    model, lengths = models_by_family["llama"], []
    engine = DecodeEngine(model, tokenizer, slots=2, max_length=64)
    hook = model.register_forward_pre_hook(
        lambda module, inputs, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    engine.add([3] * 40, params)
    engine.step()
    engine.add([4] * 40, params)
    engine.step()
    engine.step()
    hook.remove()
    assert lengths == [40, 1, 25, 1, 15]


@pytest.mark.parametrize("family", ["llama", "bam-prefix", "bam-shared"])
def test_requests_of_different_lengths_share_the_memory(family: str, models_by_family: Any, tokenizer: Any) -> None:
    """Blocks of all lengths are taken, moved and freed while others decode."""
    model, rng = models_by_family[family], random.Random(2)
    prompts = [[rng.randrange(1, 300) for _ in range(rng.choice((2, 70, 150)))] for _ in range(12)]

    def params(index: int) -> SamplingParams:
        return SamplingParams(max_tokens=(9, 30, 60)[index % 3], temperature=0.8, seed=index, logprobs=0)

    alone = DecodeEngine(model, tokenizer, slots=1, max_length=256)
    expected = run(alone, prompts, params)
    engine = DecodeEngine(model, tokenizer, slots=6, max_length=256, kv_tokens=512, tokens_per_step=40)
    scheduled = run(engine, prompts, params)
    assert [delta.tokens for delta in scheduled] == [delta.tokens for delta in expected]
    assert (engine.free, engine.memory.used, engine.memory.size) == (6, 0, 512)


@pytest.mark.parametrize("scored", [False, True])
def test_nan_of_an_unfinished_prompt_stays_alone(scored: bool, models_by_family: Any, tokenizer: Any) -> None:
    """Keys that are masked are multiplied by 0, and 0 × NaN is NaN."""
    model, bad = copy.deepcopy(models_by_family["llama"]), 7
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompts = [[3, 4], [5] * 50]
    expected = run(DecodeEngine(model, tokenizer, slots=2, max_length=64), prompts, lambda _: params)
    engine = DecodeEngine(model, tokenizer, slots=2, max_length=64, tokens_per_step=32)
    if scored:  # no token is sampled, which would tell that the prompt is not finite
        engine.add([bad] * 48, SamplingParams(max_tokens=0, prompt_logprobs=0))
        while engine.active:
            engine.step()
    else:
        leaving = engine.add([bad] * 48, params)
        engine.step()
        assert leaving.left == 16
        engine.remove(leaving)
    assert run(engine, prompts, lambda _: params) == expected


def test_unsupported_models_are_rejected(models_by_family: Any, tokenizer: Any) -> None:
    model = models_by_family["llama"]
    positions = model.config.max_position_embeddings
    with pytest.raises(ServingError, match=r"lower serve\.max_length"):
        DecodeEngine(model, tokenizer, slots=1, max_length=positions + 1)
    model.config.sliding_window = 8
    try:
        with pytest.raises(ServingError, match="windows"):
            DecodeEngine(model, tokenizer, slots=1, max_length=64)
    finally:
        del model.config.sliding_window
