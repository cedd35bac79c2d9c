"""The prefix cache, cancellation and long prompts: times to the first token, to a free slot, and between tokens.

    python -m benchmarks.prefix_cache

1. Two prompts share their first 1,000 tokens: CPU time until the first token of the second, over that of the first.
2. A client of eight that are decoded, or of eight that wait, leaves: time until the engine and the queue have forgotten
   it, in wall time beside the median step.
3. A prompt of 2,000 tokens joins eight streams: the longest CPU time between two of their tokens, over the median
   before it joins.
"""

import asyncio
import random
import statistics
import time
from typing import Any

import torch
import typer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bam_ray.model import BamConfig
from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler
from benchmarks.measure import report

VOCABULARY, STREAMS, MAX_LENGTH = 4096, 8, 2112
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
MIXTURE = {"num_experts": 4, "attention_experts": "kv_experts"}
PREFIX = {"router_input": "prefix", "router_prior": "bigram"}
CONFIGS = {
    "dense": LlamaConfig(**SIZES),
    "BAM, kv_experts": BamConfig(**SIZES, **MIXTURE),
    "BAM, kv_experts, routers that read the prefix": BamConfig(**SIZES, **MIXTURE, **PREFIX),
}
LONG = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)
Row = tuple[str, str, str | float]


def engine_of(config: Any, prefix_cache: bool = True) -> DecodeEngine:
    """Return an engine with a random model."""
    torch.manual_seed(0)
    words = {str(token): token for token in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))
    model = AutoModelForCausalLM.from_config(config).eval()
    return DecodeEngine(model, tokenizer, STREAMS + 1, MAX_LENGTH, prefix_cache=prefix_cache)


def tokens(rng: random.Random, count: int) -> list[int]:
    """Return random tokens."""
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def seconds_to_first_token(engine: DecodeEngine, prompt: list[int]) -> float:
    """Return the CPU time until the first token of a request that is alone."""
    start = time.process_time()
    engine.add(prompt, SamplingParams(max_tokens=1, temperature=0))
    while engine.active:
        engine.step()
    return time.process_time() - start


def first_tokens(name: str, config: Any, rounds: int) -> list[Row]:
    """Measure the times to the first token of prompts that share 1,000 tokens."""
    rng = random.Random(1)
    cached, computed = engine_of(config), engine_of(config, prefix_cache=False)
    misses, hits, without = [], [], []
    for _ in range(rounds):
        prefix, suffixes = tokens(rng, 1000), [tokens(rng, 16) for _ in range(2)]
        misses.append(seconds_to_first_token(cached, prefix + suffixes[0]))
        hits.append(seconds_to_first_token(cached, prefix + suffixes[1]))
        without.append(seconds_to_first_token(computed, prefix + suffixes[0]))
    miss, hit, plain = map(statistics.median, (misses, hits, without))
    return [
        ("second request, over the first", name, hit / miss),
        ("first request, over the same without a cache", name, miss / plain),
    ]


def gaps(name: str, config: Any, rounds: int) -> list[Row]:
    """Measure the CPU time between two tokens of eight streams before and while a prompt of 2,000 tokens joins them."""
    engine, rng = engine_of(config), random.Random(2)

    def step() -> float:
        start = time.process_time()
        engine.step()
        return time.process_time() - start

    alone: list[float] = []
    longest: list[float] = []
    for _ in range(rounds):
        streams = [engine.add(tokens(rng, 32), LONG) for _ in range(STREAMS)]
        while any(each.left for each in streams):
            engine.step()
        alone += [step() for _ in range(20)]
        streams.append(engine.add(tokens(rng, 2000), LONG))
        beside = []
        while streams[-1].left:
            beside.append(step())
        longest.append(max(beside))
        for each in streams:
            engine.remove(each)
    ratio = statistics.median(longest) / statistics.median(alone)
    return [("longest time between tokens, over the median without the long prompt", name, ratio)]


async def departures(name: str, config: Any, rounds: int) -> list[Row]:
    """Measure the wall time from the departure of a client to its free slot, and to its place in the queue."""
    scheduler, rng = Scheduler(engine_of(config)), random.Random(3)
    running = [scheduler.generate([tokens(rng, 32)], LONG) for _ in range(STREAMS + 1)]
    for each in running:
        await anext(each)
    late: dict[str, list[float]] = {"decoded": [], "waiting": []}
    for _ in range(rounds):
        waiting = scheduler.generate([tokens(rng, 32)], LONG)
        first = asyncio.create_task(anext(waiting))
        while not scheduler.waiting:
            await asyncio.sleep(0.001)
        start = time.perf_counter()
        first.cancel()
        while scheduler.waiting:
            await asyncio.sleep(0.0005)
        late["waiting"].append(time.perf_counter() - start)
        start = time.perf_counter()
        await running.pop(0).aclose()
        while not scheduler.engine.free:
            await asyncio.sleep(0.0005)
        late["decoded"].append(time.perf_counter() - start)
        running.append(scheduler.generate([tokens(rng, 32)], LONG))
        await anext(running[-1])
    step = scheduler.totals.step_seconds / scheduler.totals.steps
    for each in running:
        await each.aclose()
    await scheduler.close()
    return [
        *((f"departure of a {state} client, ms", name, 1000 * statistics.median(late[state])) for state in late),
        ("mean step, ms", name, 1000 * step),
    ]


def main(rounds: int = 9) -> None:
    """Run the benchmark."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, config in CONFIGS.items():
        rows += first_tokens(name, config, rounds)
    rows += gaps("dense", CONFIGS["dense"], max(1, rounds // 2))
    rows += asyncio.run(departures("dense", CONFIGS["dense"], rounds))
    report("prefix_cache", ["measure", "model", "value"], rows)


if __name__ == "__main__":
    typer.run(main)
