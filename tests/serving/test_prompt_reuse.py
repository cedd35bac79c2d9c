"""Several completions of one prompt, prompts without a completion, and log-probabilities of prompts."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
import torch

from bam_ray.errors import ServingError
from bam_ray.serving import DecodeEngine, PosteriorEnsemble, SamplingParams, Scheduler
from bam_ray.serving.engine import Delta
from bam_ray.serving.sampling import SamplingState
from tests.support.decoding import members_of, run

PROMPT = [5, 9, 40, 3, 77, 12, 8]


def serve(engine: DecodeEngine, prompts: list[list[int]], params: SamplingParams) -> dict[int, Delta]:
    """Return the output of a request by index."""

    async def main() -> dict[int, Delta]:
        scheduler, outputs = Scheduler(engine), dict[int, Delta]()
        async with aclosing(scheduler.generate(prompts, params)) as batches:
            async for batch in batches:
                for index, delta in batch:
                    outputs[index] = outputs.get(index, Delta()) + delta
        await scheduler.close()
        return outputs

    return asyncio.run(main())


@pytest.mark.parametrize("family", ["llama", "bam-prefix"])
def test_completions_of_a_prompt_are_those_of_their_seeds(family: str, models_by_family: Any, tokenizer: Any) -> None:
    model, rows = models_by_family[family], []
    engine = DecodeEngine(model, tokenizer, slots=4, max_length=64, tokens_per_step=5)
    hook = model.register_forward_pre_hook(
        lambda module, inputs, named: rows.append(named["input_ids"].numel()), with_kwargs=True
    )
    params = SamplingParams(max_tokens=9, temperature=0.9, seed=3, n=3)
    outputs = serve(engine, [PROMPT, PROMPT[:3]], params)
    hook.remove()
    assert sorted(outputs) == [0, 1, 2, 3, 4, 5]
    assert sum(rows) <= len(PROMPT) + 3 + 6 * 8  # each prompt is computed once
    for index, prompt in ((0, PROMPT), (3, PROMPT[:3])):
        texts = {outputs[index + choice].tokens for choice in range(3)}
        assert len(texts) == 3
        for choice in range(3):
            seed = SamplingState(params, prompt, choice).seed
            one = SamplingParams(max_tokens=9, temperature=0.9, seed=seed)
            (alone,) = run(engine, [prompt], lambda _, one=one: one)  # type: ignore[misc]  # mypy cannot infer the default
            assert outputs[index + choice].tokens == alone.tokens
    assert (engine.active, engine.free, engine.memory.used) == (0, 4, 0)


def test_completions_that_never_fit_are_refused(models_by_family: Any, tokenizer: Any) -> None:
    engine = DecodeEngine(models_by_family["llama"], tokenizer, slots=3, max_length=64, kv_tokens=128)
    for n in (4, 3):  # too many for the slots, and for the memory
        with pytest.raises(ServingError, match=f"{n} completions of 9 tokens do not fit 3 requests and .* 128 tokens"):
            serve(engine, [PROMPT], SamplingParams(max_tokens=2, n=n))
    assert len(serve(engine, [PROMPT], SamplingParams(max_tokens=2, n=2))) == 2


def test_a_reader_that_leaves_frees_all_completions(engine: DecodeEngine) -> None:
    async def main() -> None:
        scheduler = Scheduler(engine)
        for steps in range(6):
            readers = [scheduler.generate([PROMPT] * 2, SamplingParams(max_tokens=30, n=2)) for _ in range(2)]
            for reader in readers:
                tasks = asyncio.create_task(anext(reader))
                await asyncio.sleep(0.002 * steps)
                tasks.cancel()
                await asyncio.gather(tasks, return_exceptions=True)
                await reader.aclose()
        while scheduler.active or scheduler.waiting:
            await asyncio.sleep(0.001)
        await scheduler.close()

    asyncio.run(main())
    assert (engine.active, engine.free, engine.memory.used) == (0, 3, 0)


@pytest.mark.parametrize("family", ["llama", "bam-prefix", "ensemble"])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_logprobs_equal_those_of_the_model(
    family: str, max_tokens: int, models_by_family: Any, tokenizer: Any
) -> None:
    members = members_of("llama", 2, tokenizer)
    model = PosteriorEnsemble(members) if family == "ensemble" else models_by_family[family]
    params = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=2, logprobs=1)
    engine = DecodeEngine(model, tokenizer, slots=2, max_length=64, tokens_per_step=3)
    got, one = run(engine, [PROMPT, PROMPT[:1]], lambda _: params)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        if family == "ensemble":
            log_p = torch.stack([member(ids).logits[0].double().log_softmax(-1) for member in members])
            before = log_p[:, :-1].gather(2, ids[0, 1:].expand(2, -1)[..., None]).squeeze(2).cumsum(1)
            weights = torch.cat([torch.zeros(2, 1), before], dim=1).log_softmax(0)
            expected = (weights[..., None] + log_p).logsumexp(0)
        else:
            expected = model(ids).logits[0].log_softmax(-1)
    assert len(got.prompt_logprobs) == len(PROMPT) - 1
    for position, entry in enumerate(got.prompt_logprobs):
        row = expected[position]
        assert entry.logprob == pytest.approx(float(row[PROMPT[position + 1]]), abs=1e-5)
        assert [each.logprob for each in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)
    assert one.prompt_logprobs == ()
    assert len(got.tokens) == max_tokens
    assert got.finish_reason == "length"
    assert (engine.active, engine.memory.used) == (0, 0)
