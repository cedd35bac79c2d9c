"""The decode engine against transformers' `generate` and `generate_batch`, and against the speed of the memory.

    OMP_NUM_THREADS=1 python -m benchmarks.serving [--rounds 3] [--requests 32] [--width 512] [--layers 4]
    python -m benchmarks.serving --device cuda --width 2048 --layers 8

All models have random weights in fp32 and decode greedily on one CPU thread or a GPU. The times are medians of CPU time
or of a GPU's time. On a CPU, the models of the engine are packed as `serve.pack_weights` does by default.

- Mixed lengths: the prompts and the completions have lognormal lengths (median 32 tokens, 4 to 128). All requests are
  there at the start. `generate` gets them in batches in the order of arrival, and each batch ends with its longest
  completion. `generate_batch` is transformers' continuous batching with SDPA. Its manager is used directly, because
  `generate_batch` has one length for all completions. The mixture is BTX with four experts and top-2 routing, and
  transformers computes it as Mixtral, as `bam export` would write it. The engine has its defaults and `SLOTS` slots.
- One stream: the bytes of the weights and of the keys and values that a token needs, over the time of a step, as a
  share of the bytes a second that a sum over the same weights reads in the same run.
- Attention experts: the tokens a second of BAM with `kv_shared` over those with `kv_experts`, 16 requests, context 512.
"""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.parameters import count_parameters
from bam_ray.serving import DecodeEngine, SamplingParams
from bam_ray.serving.engine import Generation
from bam_ray.serving.packed import can_pack, pack_weights
from bam_ray.upcycling.export import mixtral_config
from benchmarks.measure import report, seconds

VOCABULARY, SLOTS, MAX_LENGTH = 8192, 16, 256
BATCHES = (8, 16)  # of `generate`; the best one counts
MEDIAN, SIGMA, SHORTEST, LONGEST = 32, 0.8, 4, 128
CONTEXT, STEPS = 512, 20


class Work(NamedTuple):
    """One request."""

    prompt: list[int]
    tokens: int  # of its completion


class NoTokenizer:
    """The tokenizer of a model that has no text."""

    eos_token_id = None
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 (no ClassVar: that of transformers is none)


def mixed_lengths(count: int) -> list[Work]:
    """Return requests with lognormal lengths."""
    rng = random.Random(0)

    def length() -> int:
        return min(LONGEST, max(SHORTEST, round(MEDIAN * rng.lognormvariate(0, SIGMA))))

    return [Work([rng.randrange(VOCABULARY) for _ in range(length())], length()) for _ in range(count)]


def dense(width: int, layers: int) -> LlamaForCausalLM:
    """Return a Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        eos_token_id=None,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def mixture(attention: str, width: int, layers: int) -> BamForCausalLM:
    """Return a mixture of four experts with top-2 routing."""
    torch.manual_seed(0)
    config = BamConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        attention_experts=attention,
        norm_type="rmsnorm",
        parallel_block=False,
        separate_ffn_norm=True,
        rope_interleaved=False,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model: BamForCausalLM = BamForCausalLM(config).eval()
    return model


def as_mixtral(model: BamForCausalLM) -> MixtralForCausalLM:
    """Return a Mixtral with the weights of a BTX mixture."""
    config = mixtral_config(model.config)
    config._attn_implementation = "sdpa"
    peer = MixtralForCausalLM(config).eval()
    peer.load_state_dict(model.state_dict())
    return peer


def engine_tokens(engine: DecodeEngine, work: list[Work]) -> list[list[int]]:
    """Return the completions of the decode engine."""
    generations = [
        Generation(each.prompt, SamplingParams(max_tokens=each.tokens, temperature=0, ignore_eos=True)) for each in work
    ]
    waiting = {each.id: engine.waiting_request(each) for each in generations}
    by_id = {each.id: each for each in generations}
    tokens: dict[int, list[int]] = {each.id: [] for each in generations}
    while waiting or engine.active:
        plan = engine.plan([*waiting.values()], {})
        for id_ in plan.start:
            del waiting[id_]
            engine.start(by_id[id_])
        for generation, output in engine.step(plan):
            if output.sampled is not None:
                tokens[generation.id].append(output.sampled.token)
    return [*tokens.values()]


@torch.inference_mode()
def generate_tokens(model: Any, batch: int, work: list[Work]) -> list[list[int]]:
    """Return the completions of `generate`, in batches with padding on the left."""
    completions: list[list[int]] = []
    for start in range(0, len(work), batch):
        part = work[start : start + batch]
        longest = max(len(each.prompt) for each in part)
        pad = [longest - len(each.prompt) for each in part]
        ids = torch.tensor([[0] * gap + each.prompt for gap, each in zip(pad, part, strict=True)], device=model.device)
        mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in pad], device=model.device)
        new = max(each.tokens for each in part)
        config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
        out = model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
        completions += [row[: each.tokens] for row, each in zip(out, part, strict=True)]
    return completions


def generate_batch_tokens(model: Any, work: list[Work]) -> list[list[int]]:
    """Return the completions of transformers' continuous batching."""
    config = GenerationConfig(max_new_tokens=LONGEST, do_sample=False, eos_token_id=-1, pad_token_id=0)
    page = 32
    memory = ContinuousBatchingConfig(
        page_size=page, num_blocks=SLOTS * MAX_LENGTH // page, max_batch_tokens=MAX_LENGTH, max_requests_per_batch=SLOTS
    )
    done: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(config, continuous_batching_config=memory) as manager:
        ids = [manager.add_request(each.prompt, max_new_tokens=each.tokens) for each in work]
        while len(done) < len(work):
            result = manager.get_result(timeout=1)
            if result is None:
                assert manager.is_running(), "transformers' continuous batching has stopped"
            elif result.is_finished():
                done[result.request_id] = result.generated_tokens
    return [done[each] for each in ids]


def mixed(name: str, model: Any, peer: Any, work: list[Work], rounds: int) -> list[list[str | float]]:
    """Return a row for each way to decode requests of mixed lengths."""
    engine = DecodeEngine(_packed(model), NoTokenizer(), SLOTS, MAX_LENGTH)
    plain = DecodeEngine(model, NoTokenizer(), SLOTS, MAX_LENGTH)
    cases: dict[str, Callable[[], list[list[int]]]] = {
        "bam_ray": partial(engine_tokens, engine, work),
        "bam_ray, pack_weights: false": partial(engine_tokens, plain, work),
    }
    for batch in BATCHES:
        cases[f"generate, batch {batch}"] = partial(generate_tokens, peer, batch, work)
    cases["generate_batch, sdpa"] = partial(generate_batch_tokens, peer, work)
    expected = cases["bam_ray"]()
    equal = {case: _equal(run(), expected) for case, run in cases.items()}  # also the warm-up
    taken = seconds(cases, rounds, warm_up=0)
    tokens = sum(each.tokens for each in work)
    return [
        [f"mixed lengths, {name}", case, tokens / time, taken[case] / taken["bam_ray"], f"{equal[case]:.0%} equal"]
        for case, time in taken.items()
    ]


def _packed(model: Any) -> Any:
    """Return a copy of a model with packed weights, as `bam serve` packs them; on a GPU, the model itself."""
    if not can_pack(model.device.type, model.dtype):
        return model
    packed = copy.deepcopy(model)
    pack_weights(packed)
    return packed


def _equal(tokens: list[list[int]], expected: list[list[int]]) -> float:
    """Return the share of the completions that are equal."""
    return sum(one == other for one, other in zip(tokens, expected, strict=True)) / len(expected)


def decoding(model: Any, requests: int, context: int) -> Callable[[], object]:
    """Return a function that runs one step of `requests` requests, whose context begins with `context` tokens."""
    engine = DecodeEngine(model, NoTokenizer(), requests, 2 * context)
    params = SamplingParams(max_tokens=context, temperature=0, ignore_eos=True)
    generations = [engine.add(each.prompt, params) for each in _prompts(requests, context)]
    while any(each.left for each in generations):
        engine.step()
    return engine.step


def _prompts(requests: int, context: int) -> list[Work]:
    rng = random.Random(1)
    return [Work([rng.randrange(VOCABULARY) for _ in range(context)], context) for _ in range(requests)]


def one_stream(name: str, model: Any, heads: int, rounds: int) -> list[str | float]:
    """Return a row with the share of the memory's speed that a step of one request reaches."""
    context = 256
    config = model.config
    used = count_parameters(model)[1] if isinstance(model, BamForCausalLM) else model.num_parameters()
    used -= VOCABULARY * config.hidden_size  # one row of the input embeddings
    cached = 2 * heads * 64 * config.num_hidden_layers * context
    weights = [parameter.detach() for parameter in model.parameters()]
    step = decoding(_packed(model), 1, context)
    cases: dict[str, Callable[[], object]] = {"step": step, "read": lambda: [weight.sum() for weight in weights]}
    taken = seconds(cases, rounds * STEPS)
    speed = sum(weight.numel() for weight in weights) / taken["read"]
    share = (used + cached) / taken["step"] / speed
    note = f"{share:.0%} of {4 * speed / 1e9:.1f} GB/s"
    return [f"one stream, {name}", "bam_ray", 1 / taken["step"], share, note]


def attention_experts(width: int, layers: int, rounds: int) -> list[list[str | float]]:
    """Return a row for each form of attention experts."""
    steps = {
        kind: decoding(_packed(mixture(kind, width, layers)), SLOTS, CONTEXT) for kind in ("kv_experts", "kv_shared")
    }
    taken = seconds(steps, rounds * STEPS)
    case = f"{SLOTS} requests, context {CONTEXT}"
    return [[case, kind, SLOTS / time, taken["kv_experts"] / time, ""] for kind, time in taken.items()]


def main(
    rounds: Annotated[int, typer.Option(help="Rounds; 20 times as many steps of the last two parts.")] = 3,
    requests: Annotated[int, typer.Option(help="Requests of mixed lengths.")] = 32,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, print a table and write `benchmarks/results/serving.json` (`..._gpu.json`)."""
    torch.set_num_threads(1)
    torch.set_default_device(device)
    work = mixed_lengths(requests)
    llama = dense(width, layers)
    heads = width // 64
    rows = [one_stream("dense", llama, heads, rounds), *mixed("dense", llama, llama, work, rounds)]
    btx = mixture("averaged", width, layers)
    peer = as_mixtral(btx)
    rows += [one_stream("BTX", btx, heads, rounds), *mixed("BTX", btx, peer, work, rounds)]
    bam = mixture("kv_experts", width, layers)
    rows += [one_stream("BAM kv_experts", bam, 4 * heads, rounds), *attention_experts(width, layers, rounds)]
    on_gpu = device == "cuda"
    speed = "tokens per second" if on_gpu else "tokens per CPU-second"
    report("serving" + ("_gpu" if on_gpu else ""), ("case", "program", speed, "ratio", "note"), rows)


if __name__ == "__main__":
    typer.run(main)
