"""The checks of `benchmarks.on_gpu` that judge: the device computes what the CPU does, and the plan is right."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.evaluation.perplexity import score
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.attention_bam import BamAttention
from bam_ray.model.embeddings_bam import BamHead, BamInputEmbeddings
from bam_ray.model.experts_bam import BamExperts
from bam_ray.planning.memory import WorkerShare, training_memory
from bam_ray.planning.model_size import ModelSize
from bam_ray.settings import BamSettings, Mixing, RouterSettings, TrainingSettings
from bam_ray.training.document_mask import mask_documents
from bam_ray.training.engine import Engine, EngineSpec, StepResult
from bam_ray.training.memory import memory_of
from bam_ray.training.torch_engine import TorchEngine
from bam_ray.units import GIB
from benchmarks.gpu_worker import CheckFailed, Figures, NotOnThisDevice, Setup
from benchmarks.peers import start_deepspeed
from benchmarks.serving import engine_tokens, generate_tokens, mixed_lengths, mixture
from benchmarks.training_step import PAPER, Shape

VOCABULARY, LENGTH, BATCH, STEPS, END_OF_TEXT = 512, 64, 4, 3, 7
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}  # relative, of losses and norms
LEAST = 0.25  # smaller values are compared with this one: the balance loss of noisy gates is near 0
ROUTING_TOLERANCE = {"fp32": 4 / (LENGTH * BATCH), "bf16": 0.03}  # share of a layer's choices: near ties are rare
PLAN_TOLERANCE = 0.2  # of the peak over the estimate
TINY = Shape(64, 2, 128, 32, 512, 64, 4, 2, 256)
TWO_BILLION = Shape(2560, 24, 6912, 128, 32_000, 2048, 4, 2)
LARGE_HOST = 1 << 50  # bytes, of which as many are used as the host has
ONE_BILLION = Shape(2048, 16, 5632, 128, 32_000)


def reset() -> None:
    """Undo what a check set in its process, and free its memory."""
    torch.set_default_device(None)
    torch.set_float32_matmul_precision("highest")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Case:
    """A mixture that trains on both devices."""

    config: dict[str, Any] = field(default_factory=dict)
    recompute: bool = False
    documents: bool = False  # that do not attend to one another

    def model(self) -> BamForCausalLM:
        """Return the mixture with random weights, the same in each call."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4, "initializer_range": 0.1}
        model = BamForCausalLM(BamConfig(**sizes, attn_implementation="sdpa", **self.config))
        if model.model.prior is not None:
            model.model.prior.experts.tokens.random_(0, 500)
            model.model.prior.experts.pairs.random_(0, 20)
        if self.documents:
            mask_documents(model, END_OF_TEXT)
        return model


BTX = {"attention_experts": "averaged", "num_experts_per_tok": 2, "norm_topk_prob": True}
PREFIX = {"router_input": "prefix", "router_prior": "bigram", "router_prior_buckets": 1 << 10}
CASES = {
    "dense": Case({"dense_layers": [0, 1]}),
    "kv_experts": Case(),
    "kv_shared": Case({"attention_experts": "kv_shared"}),
    "BTX": Case(BTX),
    "sequential block": Case({"parallel_block": False, "norm_type": "rmsnorm", "rope_interleaved": False}),
    "GQA": Case({"num_key_value_heads": 2}),
    "documents": Case(documents=True),
    "windows": Case({"sliding_window": 16}),
    "capacity": Case({"capacity_factor": 1.0, "num_experts_per_tok": 2}),
    "noisy": Case({"noisy_gate": True, "num_experts_per_tok": 2}),
    "recompute": Case(recompute=True),
    "embedding experts, prefix, bigram": Case({"embeddings": "experts", **PREFIX}),
}


def settings(precision: Literal["fp32", "bf16"] = "fp32", **more: Any) -> TrainingSettings:
    """Return the settings of a training with a constant batch."""
    chosen: dict[str, Any] = {"micro_batch_sequences": BATCH // 2, "peak_lr": 1e-3, **more}
    return TrainingSettings(tokens=1 << 20, batch_tokens=BATCH * LENGTH, precision=precision, **chosen)


def tokens() -> Tensor:
    """Return random token ids [BATCH, LENGTH], with ends of documents among them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return ids.where(torch.rand(BATCH, LENGTH, generator=generator) > 0.05, END_OF_TEXT)


def trained(case: Case, device: str, precision: Literal["fp32", "bf16"]) -> list[StepResult]:
    """Return the results of the first steps of a case on a device."""
    training = settings(precision, recompute=case.recompute)
    gate: Literal["plain", "noisy"] = "noisy" if case.config.get("noisy_gate") else "plain"
    engine = TorchEngine(EngineSpec(case.model(), training, Mixing(gate=gate), device=device))
    torch.manual_seed(0)
    # The noise of routers: devices draw other numbers, so that all get those of the CPU
    with patch("torch.randn_like", lambda x: torch.randn(x.shape, dtype=x.dtype).to(x.device)):
        return [engine.step(tokens(), 1e-3) for _ in range(STEPS)]


def deviation(found: list[StepResult], expected: list[StepResult]) -> float:
    """Return the largest relative difference of losses and gradient norms."""
    names = ("nll", "load_balance", "router_z", "grad_norm")
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(found, expected, strict=True) for name in names]
    return float(max(abs(a - b) / max(abs(b), LEAST) for a, b in pairs))


def routing_deviation(found: list[StepResult], expected: list[StepResult]) -> float:
    """Return the largest difference of an expert's share of a layer's choices."""
    pairs = [
        (a.expert_load.share.cpu(), b.expert_load.share)
        for a, b in zip(found, expected, strict=True)
        if a.expert_load is not None and b.expert_load is not None
    ]
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def parity(setup: Setup) -> Figures:
    """Check that the device trains all kinds of mixtures as the CPU does in fp32."""
    figures: Figures = {}
    wrong: list[str] = []
    for name, case in CASES.items():
        expected = trained(case, "cpu", "fp32")
        for precision in ("fp32", "bf16"):
            found = trained(case, setup.device, precision)
            losses, routing = deviation(found, expected), routing_deviation(found, expected)
            figures[f"{name}, {precision}"] = losses
            limit = TOLERANCE[precision]
            if not (losses <= limit and routing <= ROUTING_TOLERANCE[precision]):
                wrong.append(f"{name} in {precision}: losses {losses:.1e} of {limit:.0e}, routing {routing:.1e}")
    if wrong:
        raise CheckFailed("; ".join(wrong), figures)
    return figures


def exchange_over_one_rank(model: BamForCausalLM) -> None:
    """Let all seams of a mixture use collectives, in a group that has one rank."""
    from bam_ray.on_deepspeed.collectives import EPGroup
    from bam_ray.on_deepspeed.dispatch import AllGatherAttentionExchange, AllToAllTokenDispatcher
    from bam_ray.on_deepspeed.table_exchange import AllToAllTableExchange

    world: Any = dist.group.WORLD
    group = EPGroup(world, dist.new_group([0]))
    for module in model.modules():
        if isinstance(module, BamExperts):
            module.dispatcher = AllToAllTokenDispatcher(group, model.config.num_experts)
        elif isinstance(module, BamAttention):
            module.exchange = AllGatherAttentionExchange(group)
        elif isinstance(module, BamInputEmbeddings | BamHead):
            module.exchange = AllToAllTableExchange(group, VOCABULARY)


def engine_of(setup: Setup, model: BamForCausalLM, training: TrainingSettings, with_deepspeed: bool) -> Engine:
    """Return an engine on the device of the checks, in plain torch or with DeepSpeed in a group of one process."""
    spec = EngineSpec(model, training, device=setup.device)
    if not with_deepspeed:
        return TorchEngine(spec)
    from bam_ray.on_deepspeed import deepspeed_engine

    start_deepspeed(device=setup.device)
    return deepspeed_engine(spec)


def deepspeed_engine(setup: Setup) -> Figures:
    """Check that DeepSpeed has the losses of plain torch at all ZeRO stages, also after it loads its checkpoint."""
    start_deepspeed(device=setup.device)
    cases = {f"ZeRO-{stage}": (Case({"dense_layers": [0, 1]}), stage, False) for stage in (1, 2, 3)}
    cases |= {f"mixture, ZeRO-{stage}": (Case(), stage, False) for stage in (1, 2, 3)}
    cases |= {f"exchanges, ZeRO-{stage}": (Case(), stage, True) for stage in (1, 2)}
    cases["exchanges of tables"] = (Case({"embeddings": "experts", **PREFIX}), 1, True)
    figures: Figures = {}
    for name, (case, stage, exchanged) in cases.items():
        figures[name] = difference = _resumed(setup, case, stage, exchanged)
        if not difference <= TOLERANCE["fp32"]:
            raise CheckFailed(f"{name}: the losses differ by {difference:.1e} from those of plain torch", figures)
    return figures


def _resumed(setup: Setup, case: Case, stage: int, exchanged: bool) -> float:
    """Train with DeepSpeed, save, load and go on; return the largest deviation from plain torch."""

    def made() -> Engine:
        model = case.model()
        if exchanged:
            exchange_over_one_rank(model)
        return engine_of(setup, model, settings(zero_stage=stage), with_deepspeed=True)

    engine = engine_of(setup, case.model(), settings(), with_deepspeed=False)
    expected = [engine.step(tokens(), 1e-3) for _ in range(2 * STEPS)]
    first = made()
    found = [first.step(tokens(), 1e-3) for _ in range(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        state = first.state()
        assert state is not None
        state.write(Path(folder))
        resumed = made()
        resumed.load(Path(folder))
    found += [resumed.step(tokens(), 1e-3) for _ in range(STEPS)]
    return deviation(found, expected)


@contextmanager
def free_bytes(size: int) -> Iterator[None]:
    """Leave `size` bytes of the GPU's memory free in the block."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - size), dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()


def out_of_memory(setup: Setup) -> Figures:
    """Check that training finds a micro batch that fits, and halves one that does not, on a GPU that is nearly full."""
    if setup.device != "cuda":
        raise NotOnThisDevice("not on this device")
    figures: Figures = {}
    for name, stage in (("plain torch", 0), ("ZeRO-1", 1), ("ZeRO-2", 2)):
        engine = _large_batch_engine(setup, "auto", stage)
        with free_bytes(6 * GIB):
            figures[f"{name}, auto"] = float(_micro_batch_after_steps(engine))
        del engine
    for name, stage in (("plain torch", 0), ("ZeRO-1", 1)):
        engine = _large_batch_engine(setup, 512, stage)
        with free_bytes(6 * GIB):
            figures[f"{name}, 512 halved to"] = found = float(_micro_batch_after_steps(engine))
        if found >= 512:
            raise CheckFailed(f"{name}: 512 sequences fit, so that memory never ran out")
        del engine
    figures["in the backward pass, 4 halved to"] = float(_fails_in_backward(setup))
    return figures


def _large_batch_engine(setup: Setup, micro_batch: int | Literal["auto"], stage: int) -> Engine:
    """Return an engine whose batch of 512 sequences of 1024 tokens takes more memory than is left to it."""
    torch.manual_seed(0)
    model = BamForCausalLM(BamConfig(hidden_size=512, intermediate_size=2048, dense_layers=[0, 1, 2, 3]))
    training = settings("bf16", micro_batch_sequences=micro_batch, zero_stage=stage or 1)
    return engine_of(setup, model, training, stage > 0)


def _micro_batch_after_steps(engine: Engine) -> int:
    """Do three steps and return the micro batch; their loss must be that of a new model."""
    batch = torch.randint(0, 32000, (512, 1024))
    for _ in range(3):
        result = engine.step(batch, 1e-4)
        if not 9.0 < result.nll < 12.0:  # log of the vocabulary: 10.4
            raise CheckFailed(f"the loss of a step after running out of memory is {result.nll:.3g}")
    assert engine.micro_batch is not None
    return engine.micro_batch


def _fails_in_backward(setup: Setup) -> int:
    """Return the micro batch after the first backward pass of a step ran out of memory."""
    engine, other = (
        engine_of(setup, CASES["kv_experts"].model(), settings(micro_batch_sequences=size), with_deepspeed=False)
        for size in (4, 2)
    )
    expected = other.step(tokens(), 1e-3)
    failures = [1 << 50]

    def take_too_much(gradient: Tensor) -> Tensor:
        return gradient if not failures else gradient + torch.empty(failures.pop(), device=setup.device).sum()

    hook = next(engine.model.parameters()).register_hook(take_too_much)
    result = engine.step(tokens(), 1e-3)
    hook.remove()
    if failures or deviation([result], [expected]) > TOLERANCE["fp32"]:
        raise CheckFailed("a step that ran out of memory in its backward pass has other losses")
    assert engine.micro_batch is not None
    return engine.micro_batch


class MemoryCase(NamedTuple):
    """A training whose memory is planned and measured."""

    shape: Shape
    mixed: bool = True
    recompute: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 0  # 0: plain torch


def planned_memory(setup: Setup) -> Figures:
    """Check that training takes no more memory than `bam plan` states for it."""
    paper, large = (TINY, TINY) if setup.tiny else (PAPER, TWO_BILLION)
    cases = {
        "mixture": MemoryCase(paper),
        "mixture, recompute": MemoryCase(paper, recompute=True),
        "mixture, ZeRO-1": MemoryCase(paper, zero_stage=1),
        "dense": MemoryCase(paper, mixed=False),
        "dense, ZeRO-3": MemoryCase(paper, mixed=False, zero_stage=3),
        "dense, 2 B": MemoryCase(large, mixed=False),
        "dense, 2 B, recompute": MemoryCase(large, mixed=False, recompute=True),
    }
    figures: Figures = {}
    wrong: list[str] = []
    for name, case in cases.items():
        peak, estimate = _peak_and_estimate(setup, case)
        figures |= {f"{name}, peak GiB": peak / GIB, f"{name}, peak ÷ plan": peak / estimate}
        if peak > (1 + PLAN_TOLERANCE) * estimate:
            wrong.append(f"{name}: {peak / GIB:.1f} GiB, and the plan says {estimate / GIB:.1f}")
    if wrong and not setup.tiny:  # of a tiny model, the libraries take most
        raise CheckFailed("; ".join(wrong), figures)
    return figures


def _peak_and_estimate(setup: Setup, case: MemoryCase) -> tuple[int, int]:
    """Return the peak of two steps in bytes, without the process, and the planner's estimate of it."""
    shape, stage = case.shape, case.zero_stage
    width, sequences = shape.width, shape.micro_batch
    more: dict[str, Any] = {"recompute": case.recompute, "zero_stage": stage or 1}
    training = settings("bf16", micro_batch_sequences=sequences, **more)
    size = ModelSize(width, shape.ffn, shape.layers, width, width, shape.vocabulary, tied=True, vectors=2)
    if case.mixed:
        size = size.mixed(BamSettings(method="bam", router=RouterSettings(init="zero")), 4)
    share = WorkerShare(is_group=stage > 0, on_gpu=True)
    estimate = training_memory(size, training, shape.length, share).device_bytes
    assert estimate is not None
    memory = memory_of(setup.device)
    gc.collect()
    before = memory.used_bytes()
    memory.reset_peak()
    with torch.device(setup.device):
        model = BamForCausalLM(paper_config(shape, dense_layers=None if case.mixed else list(range(shape.layers))))
    engine = engine_of(setup, model, training, stage > 0)
    batch = torch.randint(0, shape.vocabulary, (2 * sequences, shape.length))
    for _ in range(2):
        engine.step(batch, 1e-4)
    return memory.peak_bytes() - before, estimate


def paper_config(shape: Shape, **more: Any) -> BamConfig:
    """Return the configuration of a mixture of four experts with soft attention experts."""
    return BamConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // shape.head_dim,
        num_experts=4,
        attn_implementation="sdpa",
        **more,
    )


def evaluation(setup: Setup) -> Figures:
    """Check that the NLL of an evaluation is that of whole logits, in fp32 and in bf16."""
    shape = TINY if setup.tiny else PAPER
    torch.manual_seed(0)
    with torch.device(setup.device):
        model: PreTrainedModel = BamForCausalLM(paper_config(shape)).eval()
    rows = torch.randint(0, shape.vocabulary, (8, shape.length)).numpy()
    with torch.inference_mode():
        ids = torch.from_numpy(rows[:1]).to(setup.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        whole = float(F.cross_entropy(logits, ids[0, 1:]))
        del logits
    figures: Figures = {"whole logits": whole}
    memory = memory_of(setup.device)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model.to(dtype)
        score(model, rows[:2], 2)
        memory.reset_peak()
        start = time.perf_counter()
        nll = float(score(model, rows, 2).token_nll[0].mean())  # on the CPU: the device has finished
        seconds = time.perf_counter() - start
        figures[f"{precision}, seconds per million tokens"] = 1e6 * seconds / rows.size
        figures[f"{precision}, peak GiB"] = memory.peak_bytes() / GIB
        if not abs(nll - whole) <= TOLERANCE[precision] * whole:
            raise CheckFailed(f"the NLL in {precision} is {nll:.6g}, and that of whole logits in fp32 {whole:.6g}")
    return figures


def serving(setup: Setup) -> Figures:
    """Check that the decode engine continues prompts of mixed lengths as `generate` does, greedily and in fp32."""
    from bam_ray.serving import DecodeEngine
    from benchmarks.serving import MAX_LENGTH, SLOTS, NoTokenizer

    width, layers, requests = (64, 2, 4) if setup.tiny else (1024, 4, 16)
    work = mixed_lengths(requests)
    figures: Figures = {}
    for name in ("averaged", "kv_experts"):
        with torch.device(setup.device):
            model = mixture(name, width, layers)
        found = engine_tokens(DecodeEngine(model, NoTokenizer(), SLOTS, MAX_LENGTH), work)
        expected = [generate_tokens(model, 1, [each])[0] for each in work]
        equal = sum(one == other for one, other in zip(found, expected, strict=True)) / requests
        figures[f"{name}, equal completions"] = equal
        if equal < 0.9:  # one rounding error may change a token, and then all after it
            raise CheckFailed(f"{name}: only {equal:.0%} of the completions are those of generate")
    return figures


def checkpoint(setup: Setup) -> Figures:
    """Check that a checkpoint restores the state, and measure its copy, its files and the page-locked memory."""
    shape = TINY if setup.tiny else ONE_BILLION
    with torch.device(setup.device):
        model = BamForCausalLM(paper_config(shape, dense_layers=list(range(shape.layers))))
    figures: Figures = {"parameters, M": sum(parameter.numel() for parameter in model.parameters()) / 1e6}
    training = settings("bf16", micro_batch_sequences=1)
    spec = EngineSpec(model, training, memory_limit=LARGE_HOST, device=setup.device)
    batch = torch.randint(0, shape.vocabulary, (1, 64))
    figures |= {f"copy: {name}": taken for name, taken in _saved_and_loaded(setup, spec, batch).items()}
    # A host without room for a copy: the state is live
    spec = replace(spec, memory_limit=1)
    figures |= {f"live: {name}": taken for name, taken in _saved_and_loaded(setup, spec, batch).items()}
    if setup.device == "cuda":
        figures["page-locked, GiB"] = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GIB
    return figures


def _saved_and_loaded(setup: Setup, spec: EngineSpec, batch: Tensor) -> Figures:
    """Return the seconds of saving and loading a state, after which the next step must be the same."""
    engine = TorchEngine(spec)
    engine.step(batch, 1e-4)
    state, copied = timed(setup, engine.state)
    assert state is not None
    if state.live and spec.memory_limit == LARGE_HOST:
        raise CheckFailed("the host has too little memory for a copy of the state")
    with tempfile.TemporaryDirectory() as folder:
        _, written = timed(setup, lambda: state.write(Path(folder)))
        expected = engine.step(batch, 1e-4)
        _, loaded = timed(setup, lambda: engine.load(Path(folder)))
    difference = deviation([engine.step(batch, 1e-4)], [expected])
    if difference > TOLERANCE["fp32"]:
        raise CheckFailed(f"the losses after loading differ by {difference:.1e}")
    return {"state, s": copied, "write, s": written, "load, s": loaded}


def timed(setup: Setup, work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `work` and the seconds until the device has finished."""
    start = time.perf_counter()
    result = work()
    if setup.device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
