"""The checks of `benchmarks.on_gpu` that only measure: steps, decoding, the loss and the parts of mixtures."""

from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bam_ray.model import BamForCausalLM
from bam_ray.settings import TrainingSettings
from bam_ray.training.flops import training_flops
from benchmarks import mixture_arithmetic, next_token_loss
from benchmarks import training_step as steps
from benchmarks.gpu_checks import TINY, engine_of, paper_config, settings
from benchmarks.gpu_worker import Figures, Setup
from benchmarks.measure import seconds
from benchmarks.peers import start_deepspeed
from benchmarks.serving import decoding, mixture
from benchmarks.training_step import PAPER

TOP_KERNELS = 25
STREAMS = (1, 8, 32)


def training_step(setup: Setup) -> Figures:
    """Measure a step of the paper's mixtures over a step of the dense model (`benchmarks.training_step`)."""
    torch.set_default_device(setup.device)
    rows = steps.steps(1, TINY, "fp32") if setup.tiny else steps.steps(5, PAPER, "bf16")
    names = ("parameters, M", "time ÷ dense", "operations ÷ dense", "time ÷ operations", "share of ceiling")
    return {f"{row[1]}: {name}": figure for row in rows for name, figure in zip(names, row[2:], strict=True)}


def step_sizes(setup: Setup) -> Figures:
    """Measure the tokens a second of a mixture by the number of sequences at once."""
    shape = TINY if setup.tiny else PAPER
    batch = torch.randint(0, shape.vocabulary, (shape.sequences, shape.length))
    config = paper_config(shape, tie_word_embeddings=False)
    flops = training_flops(config, shape.length, batch.numel())
    figures: Figures = {}
    for name, count in (("plain torch", 2), ("plain torch", shape.sequences), ("DeepSpeed", shape.sequences)):
        with torch.device(setup.device):
            model = BamForCausalLM(config)
        engine = engine_of(setup, model, _settings(setup, count), name == "DeepSpeed")
        case = {"step": partial(engine.step, batch, 1e-4)}
        taken = seconds(case, 1 if setup.tiny else 5, device=setup.device)["step"]
        figures[f"{name}, {count} at once: tokens a second"] = batch.numel() / taken
        figures[f"{name}, {count} at once: TFLOP/s"] = flops / taken / 1e12
        del engine, case, model
    return figures


def _settings(setup: Setup, micro_batch: int) -> TrainingSettings:
    return settings("fp32" if setup.tiny else "bf16", micro_batch_sequences=micro_batch)


def kernels(setup: Setup) -> Figures:
    """Measure the milliseconds of the operations that take longest in a step of a mixture."""
    shape = TINY if setup.tiny else PAPER
    batch = torch.randint(0, shape.vocabulary, (shape.micro_batch, shape.length))
    with torch.device(setup.device):
        model = BamForCausalLM(paper_config(shape, tie_word_embeddings=False))
    engine = engine_of(setup, model, _settings(setup, shape.micro_batch), with_deepspeed=False)
    engine.step(batch, 1e-4)
    on_gpu = setup.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        engine.step(batch, 1e-4)

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=microseconds, reverse=True)
    return {f"ms in {event.key[:60]} × {event.count}": microseconds(event) / 1000 for event in events[:TOP_KERNELS]}


def decoding_speed(setup: Setup) -> Figures:
    """Measure the tokens a second of 1, 8 and 32 streams, and the longest prompt, in fp32 and bf16."""
    width, layers, context = (64, 2, 16) if setup.tiny else (2048, 8, 512)
    with torch.device(setup.device):
        model: Any = mixture("kv_experts", width, layers)
    figures: Figures = {"parameters, M": model.num_parameters() / 1e6}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model.to(dtype)
        if precision == "fp32":
            torch.set_float32_matmul_precision("high")  # as `training.devices.inference_dtype` sets it
        for streams in STREAMS:
            step = decoding(model, streams, context)
            taken = seconds({"step": step}, 3 if setup.tiny else 40, device=setup.device)["step"]
            figures[f"{precision}, {streams} streams: tokens a second"] = streams / taken
            del step
        prompt = partial(_prompt, model, context)
        taken = seconds({"prompt": prompt}, 3, 1, setup.device)["prompt"]
        figures[f"{precision}, prompt: tokens a second"] = context / taken
    return figures


@torch.inference_mode()
def _prompt(model: Any, tokens: int) -> None:
    """Compute a prompt without a cache."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    model(input_ids=ids, use_cache=False, logits_to_keep=1)


def loss(setup: Setup) -> Figures:
    """Measure the loss in chunks, from whole logits, and compiled (`benchmarks.next_token_loss`)."""
    torch.set_default_device(setup.device)
    shapes = [(256, 64, 512)] if setup.tiny else [(next_token_loss.TOKENS, *next_token_loss.GPU_SHAPES[0])]
    rows = [row for shape in shapes for row in next_token_loss.losses(1 if setup.tiny else 10, *shape, not setup.tiny)]
    names = ("ms", "time ÷ whole logits", "peak, MiB")
    return {f"{row[1]}: {name}": figure for row in rows for name, figure in zip(names, row[2:], strict=True)}


def mixture_blocks(setup: Setup) -> Figures:
    """Measure blocks of mixtures over a dense block (`benchmarks.mixture_arithmetic`)."""
    torch.set_default_device(setup.device)
    shapes = mixture_arithmetic.GPU
    if setup.tiny:
        rows = mixture_arithmetic.block(1, 2, 32, 64, torch.float32, compiled=False)
    else:
        rows = mixture_arithmetic.block(10, *shapes.block, shapes.dtypes[0], compiled=False)
    return {f"{row[1]} ÷ {row[2]}": row[3] for row in rows}


def ffn_experts(setup: Setup) -> Figures:
    """Measure FFN experts and those of peers over a dense FFN (`benchmarks.mixture_arithmetic`)."""
    torch.set_default_device(setup.device)
    start_deepspeed(device=setup.device)
    shapes = mixture_arithmetic.GPU
    sizes = [("balanced", 64)] if setup.tiny else shapes.ffn
    width, dtype, rounds = (64, torch.float32, 1) if setup.tiny else (shapes.ffn_width, shapes.dtypes[0], 10)
    rows = [
        (routing, row)
        for routing, count in sizes
        for row in mixture_arithmetic.ffn(rounds, count, width, dtype, routing)
    ]
    return {f"{routing}: {row[1]} ÷ {row[2]}": row[3] for routing, row in rows}
