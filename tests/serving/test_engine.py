"""The output of a request does not depend on the requests that are decoded with it."""

from typing import Any

import pytest
import torch

from bam_ray.errors import ServingError
from bam_ray.serving import DecodeEngine, SamplingParams
from tests.support.decoding import prompts_of, run


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
    started = [engine.add(prompt, params) for prompt in prompts[:3]]
    got = {generation: delta for generation, delta in started}
    first, second, third = got
    for generation, delta in engine.step():
        got[generation] += delta
    engine.remove(first)  # the last request moves into its slot
    assert engine.free == 1
    fourth, delta = engine.add(prompts[3], params)
    got[fourth] = delta
    while engine.active:
        for generation, delta in engine.step():
            got[generation] += delta
    assert [got[second], got[third], got[fourth]] == expected[1:]
    assert len(got[first].tokens) == 2


def test_text_ends_at_the_last_position(engine: DecodeEngine) -> None:
    longest = [5] * (engine.max_length - 1)
    full, one = run(engine, [longest, longest[:-3]], lambda _: SamplingParams(max_tokens=99, temperature=0))
    assert (len(full.tokens), full.finish_reason) == (1, "length")
    assert len(one.tokens) == 4


def test_the_longest_prompt_is_computed_at_start(models_by_family: Any, tokenizer: Any) -> None:
    model, lengths = models_by_family["bam"], []
    hook = model.register_forward_pre_hook(
        lambda module, inputs, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    engine = DecodeEngine(model, tokenizer, slots=2, max_length=48)
    hook.remove()
    assert max(lengths) == 47
    assert engine.free == 2


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
        assert [value for _, value in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)


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
