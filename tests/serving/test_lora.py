"""Requests of one batch use different adapters, and each has the output that its merged weights give alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bam_ray.adapters.peft_folder import read_peft_folder
from bam_ray.errors import CheckpointError, ServingError
from bam_ray.serving import DecodeEngine, SamplingParams
from bam_ray.serving.engine import Generation
from bam_ray.serving.lora import LoraSlots, SlotAdapter
from bam_ray.serving.packed import pack_weights
from tests.support.decoding import prompts_of
from tests.support.peft_adapters import copy_of, merged, write_adapter
from tests.support.tiny import dense

SETTINGS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 2, "target_modules": ["q_proj", "query_key_value", "down_proj", "dense"]},
    {"r": 8, "use_rslora": True},
]


@dataclass
class Adapted:
    """A model, adapters of it, and engines that use them."""

    base: PreTrainedModel
    folders: list[Path]
    tokenizer: Any

    def engine(self, rows: int, tokens_per_step: int = 64, packed: bool = False) -> DecodeEngine:
        """Return an engine that has the adapters in slots 1, 2, ...; slot 4 has one without effect."""
        model = copy_of(self.base)
        lora = LoraSlots(model, slots=4, max_rank=8)
        for slot, folder in enumerate(self.folders, start=1):
            adapter = read_peft_folder(folder, "law", lora.shapes).weights
            lora.check(adapter)
            lora.write(slot, adapter)
        for pair in adapter.pairs.values():
            pair.b.zero_()
        lora.write(4, adapter)
        if packed:
            pack_weights(model)
        engine = DecodeEngine(model, self.tokenizer, slots=rows, max_length=64, tokens_per_step=tokens_per_step)
        engine.lora = lora
        return engine


@pytest.fixture(params=["llama", "gpt_neox"])
def adapted(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Any) -> Adapted:
    base = dense(request.param, 0)
    base.resize_token_embeddings(len(tokenizer))
    base.generation_config.eos_token_id = 0
    folders = [write_adapter(tmp_path / str(seed), base, seed, **each) for seed, each in enumerate(SETTINGS)]
    return Adapted(base, folders, tokenizer)


def decode(
    engine: DecodeEngine, prompts: list[list[int]], slots: list[int], on_step: Callable[[], object] = lambda: None
) -> list[tuple[list[int], list[list[float]]]]:
    """Return the tokens of each request and their most likely log-probabilities."""
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=5, ignore_eos=True)
    waiting = [
        Generation(prompt, params, adapter=SlotAdapter(str(slot), slot) if slot else None)
        for prompt, slot in zip(prompts, slots, strict=True)
    ]
    results: dict[int, tuple[list[int], list[list[float]]]] = {each.id: ([], []) for each in waiting}
    while waiting or engine.active:
        while waiting and engine.free:
            engine.start(waiting.pop(0))
        on_step()
        for generation, output in engine.step():
            assert output.error is None and output.sampled is not None
            results[generation.id][0].append(output.sampled.token)
            results[generation.id][1].append([score for _, score in output.sampled.top])
    return [*results.values()]


@pytest.mark.parametrize("packed", [False, True])
def test_a_mixed_batch_equals_merged_weights(adapted: Adapted, packed: bool) -> None:
    prompts, slots = prompts_of(9, 300), [1, 2, 0, 3, 1, 4, 2, 2, 3]
    models = [adapted.base, *(merged(adapted.base, folder) for folder in adapted.folders), adapted.base]
    for tokens_per_step in (9, 64):  # prompts in chunks beside rows that decode, and whole prompts
        mixed = decode(adapted.engine(6, tokens_per_step, packed), prompts, slots)
        for prompt, slot, (tokens, scores) in zip(prompts, slots, mixed, strict=True):
            alone = DecodeEngine(copy_of(models[slot]), adapted.tokenizer, slots=1, max_length=64)
            ((expected, reference),) = decode(alone, [prompt], [0])
            assert tokens == expected
            torch.testing.assert_close(torch.tensor(scores), torch.tensor(reference), rtol=0, atol=1e-5)
    assert len({tuple(tokens) for tokens, _ in decode(adapted.engine(4), [prompts[3]] * 4, [0, 1, 2, 3])}) == 4


def test_an_adapter_without_effect_is_the_base(adapted: Adapted) -> None:
    prompts = prompts_of(4, 300)
    plain = DecodeEngine(copy_of(adapted.base), adapted.tokenizer, slots=4, max_length=64)
    assert decode(adapted.engine(4), prompts, [4] * 4) == decode(plain, prompts, [0] * 4)
    # Also beside a row with another adapter
    assert decode(adapted.engine(4), prompts, [0, 4, 0, 1])[:3] == decode(plain, prompts, [0] * 4)[:3]


def test_a_row_does_not_depend_on_other_adapters(adapted: Adapted) -> None:
    prompts = prompts_of(4, 300)
    first = decode(adapted.engine(4), prompts, [1, 2, 3, 0])
    assert decode(adapted.engine(4), prompts, [1, 3, 1, 2])[0] == first[0]


def test_a_slot_can_have_another_adapter(adapted: Adapted) -> None:
    """Nothing of a larger adapter is left behind, also if that was damaged."""
    engine, prompts = adapted.engine(2), prompts_of(2, 300)
    expected = decode(engine, prompts, [2, 2])
    assert engine.lora is not None
    damaged = read_peft_folder(adapted.folders[2], "law", engine.lora.shapes).weights
    for pair in damaged.pairs.values():
        pair.a.fill_(torch.nan)
    engine.lora.write(3, damaged)
    engine.lora.write(3, read_peft_folder(adapted.folders[1], "law", engine.lora.shapes).weights)
    assert decode(engine, prompts, [3, 3]) == expected


def test_an_adapter_can_be_loaded_while_others_decode(adapted: Adapted) -> None:
    engine, prompts = adapted.engine(3), prompts_of(3, 300)
    expected = decode(engine, prompts, [1, 2, 0])
    lora = engine.lora
    assert lora is not None
    other = read_peft_folder(adapted.folders[0], "law", lora.shapes).weights
    assert decode(engine, prompts, [1, 2, 0], on_step=lambda: lora.write(3, other)) == expected


def test_what_does_not_fit_is_refused(adapted: Adapted, models_by_family: Any) -> None:
    lora = LoraSlots(copy_of(adapted.base), slots=1, max_rank=4)
    with pytest.raises(CheckpointError, match="has rank 8, above 4: raise"):
        lora.check(read_peft_folder(adapted.folders[2], "law", lora.shapes).weights)
    with pytest.raises(ServingError, match="serve adapters with the dense model"):
        LoraSlots(models_by_family["bam"], slots=1, max_rank=4)
