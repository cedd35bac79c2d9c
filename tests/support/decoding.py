"""Requests and models for the tests of the decode engine."""

import random
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from bam_ray.serving import DecodeEngine, SamplingParams
from bam_ray.serving.detokenizer import TextStream
from bam_ray.serving.engine import Delta, Generation
from tests.support.tiny import dense


def run(engine: DecodeEngine, prompts: list[list[int]], params: Callable[[int], SamplingParams]) -> list[Delta]:
    """Decode all prompts, each as soon as a slot is free, and return the concatenated deltas of each."""
    generations = [Generation(prompt, params(index)) for index, prompt in enumerate(prompts)]
    waiting = {each.id: engine.waiting_request(each) for each in generations}
    texts = {each.id: TextStream(engine.tokenizer, each.params) for each in generations}
    deltas = {each.id: Delta() for each in generations}
    while waiting or engine.active:
        plan = engine.plan([*waiting.values()], {})
        for each in generations:
            if each.id in plan.start:
                del waiting[each.id]
                engine.start(each)
        for generation, output in engine.step(plan):
            deltas[generation.id] += texts[generation.id].feed(output)
            if deltas[generation.id].finish_reason is not None:
                engine.remove(generation)
    return [*deltas.values()]


def prompts_of(count: int, vocabulary: int) -> list[list[int]]:
    """Return `count` random prompts of different lengths, including a single token."""
    rng = random.Random(3)
    return [[rng.randrange(1, vocabulary) for _ in range(1 + 5 * (i % 4) + i % 3)] for i in range(count)]


def members_of(family: str, count: int, tokenizer: Any) -> list[PreTrainedModel]:
    """Return different random models with the vocabulary of the tokenizer."""
    models = []
    for seed in range(count):
        model = dense(family, seed).eval()
        model.resize_token_embeddings(len(tokenizer))
        model.generation_config.eos_token_id = 0
        models.append(model)
    return models
