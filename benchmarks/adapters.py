"""Requests with different LoRA adapters in one batch, compared with peft and with the base model, on one CPU thread.

    python -m benchmarks.adapters [--rounds 20]

The model is a random Llama (4 layers, d 512, fp32) with 64 random adapters of rank 8 on all linear layers. A step
generates one token of each of 32 requests, which have 32 different adapters. The cases:

- `base`: the engine without adapters
- `adapters`: the engine with 32 adapters
- `one after another`: the engine with 32 adapters, which computes one request at a time
- `peft`: peft's `adapter_names` with transformers' cache

The second part serves 128 requests with 64 adapters, once with memory for all adapters, and once with 16 adapter slots
and host memory for 16. Adapters are read from peft's folders. All results are medians of CPU time.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bam_ray.adapters.peft_source import PeftFolders
from bam_ray.adapters.pool import AdapterPool
from bam_ray.adapters.source import AdapterKey
from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler
from bam_ray.serving.engine import Generation
from bam_ray.serving.lora import LoraSlots, SlotAdapter
from bam_ray.serving.plan import StepPlan
from benchmarks.measure import report, seconds

ROWS, ADAPTERS, RANK, PROMPT, MAX_LENGTH, CHUNK = 32, 64, 8, 64, 256, 192
REQUESTS, NEW_TOKENS, FEW = 128, 32, 16
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    eos_token_id=None,
)


def new_model() -> LlamaForCausalLM:
    """Return the base model, with the same weights at each call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with the vocabulary of the model."""
    vocabulary = {f"<{token}>": token for token in range(CONFIG.vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")))


def write_adapters(root: Path) -> Any:
    """Write all adapters to `root`, and return peft's model that has those of a batch."""
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")
    model: Any = get_peft_model(new_model(), config, "topic-00")
    for number in range(1, ADAPTERS):
        model.add_adapter(f"topic-{number:02d}", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(root)
    return model.eval()


def new_engine(lora_slots: int, rows: int = ROWS) -> DecodeEngine:
    """Return an engine with adapter slots, or without adapters if there are none."""
    model = new_model()
    lora = LoraSlots(model, lora_slots, RANK) if lora_slots else None
    engine = DecodeEngine(model, new_tokenizer(), rows, MAX_LENGTH)
    engine.lora = lora
    return engine


def prompt(number: int, tokens: int = PROMPT) -> list[int]:
    """Return a prompt of its own for each number."""
    return torch.randint(1, CONFIG.vocab_size, (tokens,), generator=torch.Generator().manual_seed(number)).tolist()


def running(engine: DecodeEngine, adapters: bool) -> list[Generation]:
    """Start one request for each row, and return them when all decode."""
    params = SamplingParams(max_tokens=MAX_LENGTH, temperature=0, ignore_eos=True)
    requests = [
        engine.add(prompt(number), params, SlotAdapter(str(number), number + 1) if adapters else None)
        for number in range(ROWS)
    ]
    while any(request.left for request in requests):
        engine.step()
    return requests


def one_after_another(engine: DecodeEngine, requests: list[Generation]) -> None:
    """Generate one token of each request, in one step each."""
    for request in requests:
        engine.step(StepPlan(decode=(request.id,)))


def peft_step(model: Any) -> Callable[[], None]:
    """Return a function that generates one token of each request with peft."""
    names = [f"topic-{number:02d}" for number in range(ROWS)]
    cache, tokens = DynamicCache(), torch.tensor([prompt(number) for number in range(ROWS)])

    @torch.inference_mode()
    def step() -> None:
        nonlocal tokens
        logits = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1, adapter_names=names).logits
        tokens = logits[:, -1:].argmax(-1)

    step()
    return step


def prefill(engine: DecodeEngine, adapters: bool) -> None:
    """Compute a whole prompt."""
    params = SamplingParams(max_tokens=1, temperature=0)
    engine.add(prompt(0, CHUNK), params, SlotAdapter("0", 1) if adapters else None)
    engine.step()


async def serve(root: Path, slots: int, hosted: int) -> float:
    """Serve all requests with a new pool, and return the CPU seconds. With slots for all, all are there before."""
    engine = new_engine(slots, rows=8)
    assert engine.lora is not None
    source = PeftFolders(root, engine.lora.shapes)
    keys = [*source.keys().values()]
    size = source.fetch(keys[0]).bytes
    with ThreadPoolExecutor(2) as executor:
        pool = AdapterPool(source, engine.lora, executor, host_bytes=hosted * size)
        scheduler = Scheduler(engine)

        async def request(number: int, key: AdapterKey) -> None:
            params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
            lease = await pool.acquire(key)
            adapter = SlotAdapter(str(lease.key), lease.slot)
            async with aclosing(scheduler.generate([prompt(number)], params, adapter=adapter)) as batches:
                async for _ in batches:
                    pass
            lease.release()

        if slots >= ADAPTERS:
            for lease in [await pool.acquire(key) for key in keys]:
                lease.release()
        start = time.process_time()
        await asyncio.gather(*(request(number, keys[number % ADAPTERS]) for number in range(REQUESTS)))
        taken = time.process_time() - start
        await scheduler.close()
    return taken


def serving_seconds(root: Path, rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of all requests, with memory for all adapters and for few."""
    cases = {"all": ADAPTERS, "few": FEW}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, adapters in cases.items():
            taken[name].append(asyncio.run(serve(root, adapters, adapters)))
    return {name: statistics.median(times) for name, times in taken.items()}


def main(rounds: Annotated[int, typer.Option(help="Steps of each case.")] = 20) -> None:
    """Measure, print a table and write `benchmarks/results/adapters.json`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        peft_model = write_adapters(root)
        base, mixed, single = new_engine(0), new_engine(ROWS), new_engine(ROWS)
        for engine in (mixed, single):
            assert engine.lora is not None
            source = PeftFolders(root, engine.lora.shapes)
            for slot, key in enumerate([*source.keys().values()][:ROWS], start=1):
                engine.lora.write(slot, source.fetch(key))
        running(base, adapters=False)
        running(mixed, adapters=True)
        requests = running(single, adapters=True)
        decode = seconds(
            {
                "base": base.step,
                "adapters": mixed.step,
                "one after another": lambda: one_after_another(single, requests),
                "peft": peft_step(peft_model),
            },
            rounds,
        )
        for engine in (base, mixed):
            engine.clear()
        prompts = seconds(
            {"base": lambda: prefill(base, adapters=False), "adapters": lambda: prefill(mixed, adapters=True)}, rounds
        )
        served = serving_seconds(root, max(1, rounds // 4))
    parts = {
        f"decode, {ROWS} requests": (decode, decode["adapters"]),
        f"prompt of {CHUNK} tokens": (prompts, prompts["adapters"]),
        f"{REQUESTS} requests, {ADAPTERS} adapters, memory": (served, served["few"]),
    }
    rows: list[list[str | float]] = [
        [work, name, 1000 * taken, taken / ours]
        for work, (cases, ours) in parts.items()
        for name, taken in cases.items()
    ]
    report("adapters", ("work", "case", "ms", "time ÷ adapters"), rows)


if __name__ == "__main__":
    typer.run(main)
