"""Receipts: proofs that a mixture is what it says, from its folder alone.

| receipt | what must hold |
| --- | --- |
| files | every file has the SHA-256 of the manifest |
| tensors | names and shapes are the configuration's, all values finite |
| lineage | every tensor has an origin |
| identical experts | with all experts like the first and gates summing to 1, it is its dense model |
| one expert alone | with all routers on expert i, it is its dense model (each i) |
| order | experts permuted together with their router rows change nothing |
| all slices | of a split: with all slices on, it is the dense model that was split |

The dense models are transformers' own, rebuilt from the mixture's tensors (`upcycling.dense`). Both sides run in fp32
on random tokens, a few layers at a time, as many as fit the memory given: then the window has the embeddings, its
layers and the head. Errors are the largest difference of logits over their largest size.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.upcycling.dense import dense_tensors, is_split, mixture_config_of, seed_config
from bam_ray.upcycling.loading import model_of
from bam_ray.upcycling.write import LINEAGE

LIMIT = 1e-4  # of the relative error: fp32 rounding of two ways to compute one thing, through a window of layers
BATCH, LENGTH = 2, 24
MEMORY = 4 << 30
SUMS_TO_ONE: dict[str, Any] = {  # the paper's raw top-k gates do not; that is training's affair, not the weights'
    "norm_topk_prob": True,
    "ffn_output_scale": 1.0,
    "num_attention_experts_per_tok": 0,
}
FAR = -1e4  # a logit that leaves nothing to its expert


@dataclass(frozen=True)
class Receipt:
    """One proof: `error` is the largest seen, where it is a matter of numbers."""

    name: str
    passed: bool
    detail: str
    error: float | None = None


def verify(reader: TensorReader, memory: int = MEMORY, report: Callable[[str], None] | None = None) -> list[Receipt]:
    """All receipts of the mixture at `reader`; `report` is told what is under way. `memory` bounds a window, in bytes.

    Raises `UpcycleError` where the folder is no mixture.
    """
    say = report or (lambda text: None)
    config = mixture_config_of(reader)
    say("digests")
    receipts = [_files(reader)]
    say("tensors")
    receipts += [_tensors(reader, config), _lineage(reader)]
    if not receipts[1].passed:  # there is no model to run
        return receipts
    windows = list(_windows(config, reader, memory))
    errors: dict[str, float] = {}
    for number, layers in enumerate(windows, start=1):
        say(f"layers {layers[0]} to {layers[-1]} (window {number} of {len(windows)})")
        for name, error in _window_errors(config, reader, layers):
            errors[name] = max(error, errors.get(name, 0.0))
    where = "whole model" if len(windows) == 1 else f"{len(windows)} windows of layers"
    return receipts + [Receipt(name, error <= LIMIT, where, error) for name, error in errors.items()]


def _files(reader: TensorReader) -> Receipt:
    try:
        count = reader.check_digests()
    except CheckpointError as error:
        return Receipt("files", False, str(error))
    return Receipt("files", count > 0, f"{count} files" if count else "no manifest.json: nothing to compare with")


def _tensors(reader: TensorReader, config: BamConfig) -> Receipt:
    with torch.device("meta"):
        model = BamForCausalLM(config)
    saved = model.state_dict()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    expected = {name: tuple(each.shape) for name, each in (*model.named_parameters(), *buffers)}  # tied ones once
    found = {name: spec.shape for name, spec in reader.specs.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        return Receipt(
            "tensors", False, f"{name} is {found.get(name)}, expected {expected.get(name)} ({len(wrong)} differ)"
        )
    for name in found:
        if not all(piece.isfinite().all() for piece in reader.chunks(name)):
            return Receipt("tensors", False, f"{name} holds values that are not finite")
    return Receipt("tensors", True, f"{len(found)} tensors, all finite")


def _lineage(reader: TensorReader) -> Receipt:
    data = reader.read_file(LINEAGE)
    if data is None:
        return Receipt("lineage", False, f"no {LINEAGE}")
    try:
        tensors = json.loads(data)["tensors"]
    except (ValueError, KeyError):
        return Receipt("lineage", False, f"{LINEAGE} is damaged")
    lacking = sorted(reader.specs.keys() - tensors.keys())
    if lacking:
        return Receipt("lineage", False, f"{lacking[0]} has no origin ({len(lacking)} lack one)")
    return Receipt("lineage", True, f"{len(tensors)} tensors have an origin")


def _windows(config: BamConfig, reader: TensorReader, memory: int) -> Iterator[list[int]]:
    """Runs of layers whose mixture and dense model fit in `memory` bytes together, at least one layer each."""
    sizes = [0] * config.num_hidden_layers
    rest = 0
    for spec in reader.specs.values():
        layer = _layer_of(spec.name)
        if layer is None:
            rest += 4 * spec.elements
        else:
            sizes[layer] += 4 * spec.elements
    window: list[int] = []
    for layer, size in enumerate(sizes):
        # The mixture, the dense model (no larger), and what is read before it is copied
        if window and 2 * rest + 2 * (sum(sizes[each] for each in window) + size) > memory:
            yield window
            window = []
        window.append(layer)
    yield window


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def _window_errors(config: BamConfig, reader: TensorReader, layers: list[int]) -> Iterator[tuple[str, float]]:
    """The error of each receipt on one window."""
    weights = {
        _renumbered(name, layers): reader.read(name).float()
        for name in reader.specs
        if _layer_of(name) is None or _layer_of(name) in layers
    }
    window = window_config(config, layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=generator)

    def mixture(weights: dict[str, Tensor], only: int | None = None, **changes: Any) -> Tensor:
        return _logits(_mixture(window, weights, only, changes), ids)

    def dense(expert: int) -> Tensor:
        tensors = dense_tensors(config, reader.read, expert, layers)
        renumbered = {_renumbered(name, layers): tensor for name, tensor in tensors.items()}
        return _logits(model_of(dense_window(config, layers), renumbered), ids)

    if is_split(config):
        experts = config.num_experts
        evenly = {name: torch.zeros_like(each) if _is_router(name) else each for name, each in weights.items()}
        together = mixture(
            evenly,
            num_experts_per_tok=experts,
            norm_topk_prob=False,
            ffn_output_scale=float(experts),
            num_attention_experts_per_tok=0,
        )
        yield "all slices", _error(together, dense(0))
    else:
        first = {name: _first_for_all(each) if _is_stacked(name) else each for name, each in weights.items()}
        yield "identical experts", _error(mixture(first, **SUMS_TO_ONE), dense(0))
        for expert in range(config.num_experts):
            yield "one expert alone", _error(mixture(weights, only=expert, **SUMS_TO_ONE), dense(expert))
    order = torch.randperm(config.num_experts, generator=generator)
    permuted = {
        name: each[order] if _is_router(name) or (_is_stacked(name) and each.shape[0] > 1) else each
        for name, each in weights.items()
    }
    yield "order", _error(mixture(permuted), mixture(weights))


def window_config(config: BamConfig, layers: Sequence[int]) -> BamConfig:
    """The configuration of a mixture of some of the layers."""
    window = copy.deepcopy(config)
    window.num_hidden_layers = len(layers)
    assert config.layer_types is not None
    window.layer_types = [config.layer_types[layer] for layer in layers]
    for key in ("dense_layers", "nope_layers"):
        chosen = [number for number, layer in enumerate(layers) if layer in (getattr(config, key) or ())]
        setattr(window, key, chosen or None)
    return window


def dense_window(config: BamConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """The configuration of a dense model of the seed's architecture with some of its layers."""
    dense = AutoConfig.for_model(**seed_config(config))
    types = getattr(dense, "layer_types", None)
    if types:
        dense.layer_types = [types[layer] for layer in layers]
    dense.num_hidden_layers = len(layers)
    return dense


def _mixture(
    config: BamConfig, weights: dict[str, Tensor], only: int | None, changes: dict[str, Any]
) -> PreTrainedModel:
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(changed, key, value)
    model = model_of(changed, weights)
    for name, module in model.named_modules():
        if only is not None and name.endswith(".gate"):
            module.selection_bias = None
            module.register_forward_hook(lambda _, __, logits: _one_hot_logits(logits, only))
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _one_hot_logits(logits: Tensor, expert: int) -> Tensor:
    result = torch.full_like(logits, FAR)
    result[..., expert] = 0.0
    return result


def _is_stacked(name: str) -> bool:
    return ".experts." in name


def _is_router(name: str) -> bool:
    return ".gate." in name


def _first_for_all(stacked: Tensor) -> Tensor:
    return stacked[:1].expand_as(stacked)


def _renumbered(name: str, layers: Sequence[int]) -> str:
    """A tensor's name with its layer counted within the window."""
    return re.sub(r"(?<=layers\.)\d+", lambda found: str(layers.index(int(found.group()))), name, count=1)
