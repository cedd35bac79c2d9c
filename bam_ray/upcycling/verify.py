"""Verification of a mixture from its folder alone.

| check | what must hold |
| --- | --- |
| files | every file has the SHA-256 of the manifest |
| tensors | names and shapes match the configuration, and all values are finite |
| lineage | every tensor has an origin |
| identical experts | if all experts equal the first and the gates sum to 1, the logits are those of its dense model |
| one expert alone | if all routers choose expert i, the logits are those of expert i's dense model, for each i |
| order | permuting the experts together with their router rows changes nothing |
| all slices | for a split: with all slices active, the logits are those of the model that was split |

The dense models are transformers' own classes, rebuilt from the mixture's tensors (`upcycling.dense`). With embedding
experts, the dense model of an expert has the expert's own embedding and head, and the norms that all experts share.
Both sides run in fp32 on random tokens, on a window of as many layers as fit in the given memory: a window consists of
the embeddings (all tables of embedding experts), its layers and the head. Errors are the largest difference of the
logits, divided by their largest magnitude.

All checks read the mixture alone. A tensor that was replaced by another one of the same shape, such as two tables that
were swapped, is found by the digests, and not by the logits.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from bam_ray.checkpoint.model_folder import parse_object
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError
from bam_ray.families import PRIOR_PAIRS, PRIOR_TOKENS, is_stacked
from bam_ray.model import BamConfig
from bam_ray.model.one_expert import routed_to
from bam_ray.upcycling.dense import dense_tensors, is_split, mixture_config_of, seed_config, tensor_mismatch
from bam_ray.upcycling.loading import model_of, widened
from bam_ray.upcycling.write import LINEAGE

LIMIT = 1e-4
"""Largest relative error that passes: fp32 rounding of two ways to compute the same function through some layers."""
BATCH, LENGTH = 2, 24
MEMORY = 4 << 30
"""Default memory for a window, in bytes."""
# The gates of BAM's paper do not sum to 1. That is a choice of training; the checks are about the weights.
GATES_SUM_TO_ONE: dict[str, Any] = {
    "norm_topk_prob": True,
    "ffn_output_scale": 1.0,
    "num_attention_experts_per_tok": 0,
}
NOISE = 0.02
"""Standard deviation of the noise on router rows in the check of the order."""
COUNTS = (PRIOR_TOKENS, PRIOR_PAIRS)


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        name: The name of the check.
        passed: True if the mixture passed.
        detail: What was checked, or what is wrong.
        error: The largest relative error of the logits; None if the check compares no logits.
    """

    name: str
    passed: bool
    detail: str
    error: float | None = None


def verify(
    reader: TensorReader, memory: int = MEMORY, report: Callable[[str], None] | None = None
) -> list[CheckResult]:
    """Run all checks on the mixture at `reader`.

    Args:
        reader: The reader of the mixture's folder.
        memory: The memory for a window of layers, in bytes.
        report: Called with a description of each step before it starts.

    Returns:
        One result per check. If the tensors do not match the configuration, the checks that run the model are left out.

    Raises:
        UpcycleError: The model is no mixture.
    """
    report = report or (lambda text: None)
    config = mixture_config_of(reader)
    report("digests")
    results = [_check_files(reader)]
    report("tensors")
    tensors = _check_tensors(reader, config)
    results += [tensors, _check_lineage(reader)]
    if not tensors.passed:
        return results
    windows = list(_windows(config, reader, memory))
    errors: dict[str, float] = {}
    for number, layers in enumerate(windows, start=1):
        report(f"layers {layers[0]} to {layers[-1]} (window {number} of {len(windows)})")
        for name, error in _window_errors(config, reader, layers):
            errors[name] = max(error, errors.get(name, 0.0))
    extent = "whole model" if len(windows) == 1 else f"{len(windows)} windows of layers"
    return results + [CheckResult(name, error <= LIMIT, extent, error) for name, error in errors.items()]


def _check_files(reader: TensorReader) -> CheckResult:
    try:
        count = reader.check_digests()
    except CheckpointError as error:
        return CheckResult("files", False, str(error))
    return CheckResult("files", count > 0, f"{count} files" if count else "there is no manifest.json to compare with")


def _check_tensors(reader: TensorReader, config: BamConfig) -> CheckResult:
    mismatch = tensor_mismatch(reader, config)
    if mismatch:
        return CheckResult("tensors", False, mismatch)
    for name in reader.specs:
        if not all(piece.isfinite().all() for piece in reader.chunks(name)):
            return CheckResult("tensors", False, f"{name} has values that are not finite")
        if name in COUNTS and not all((piece >= 0).all() for piece in reader.chunks(name)):
            return CheckResult("tensors", False, f"{name} has counts below 0")
    return CheckResult("tensors", True, f"{len(reader.specs)} tensors, all finite")


def _check_lineage(reader: TensorReader) -> CheckResult:
    data = reader.read_file(LINEAGE)
    if data is None:
        return CheckResult("lineage", False, f"no {LINEAGE}")
    try:
        tensors = parse_object(data, LINEAGE).get("tensors")
    except CheckpointError:
        tensors = None
    if not isinstance(tensors, dict):
        return CheckResult("lineage", False, f"{LINEAGE} is damaged")
    missing = sorted(reader.specs.keys() - tensors.keys())
    if missing:
        return CheckResult("lineage", False, f"{missing[0]} has no origin ({len(missing)} tensors have none)")
    return CheckResult("lineage", True, f"{len(tensors)} tensors have an origin")


def _windows(config: BamConfig, reader: TensorReader, memory: int) -> Iterator[list[int]]:
    """Yield runs of layers, of at least one layer, whose mixture and dense model together fit in `memory` bytes."""
    sizes = [0] * config.num_hidden_layers
    rest = 0
    for spec in reader.specs.values():
        layer = _layer_of(spec.name)
        size = 4 * spec.elements if spec.dtype.is_floating_point else spec.bytes
        if layer is None:  # the tables of embedding experts too, which are in every window
            rest += size
        else:
            sizes[layer] += size
    window: list[int] = []
    for layer, size in enumerate(sizes):
        # The mixture, the dense model, which is no larger, and the tensors that are read before they are copied
        if window and 2 * rest + 2 * (sum(sizes[each] for each in window) + size) > memory:
            yield window
            window = []
        window.append(layer)
    yield window


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def _window_errors(config: BamConfig, reader: TensorReader, layers: list[int]) -> Iterator[tuple[str, float]]:
    """Yield the name and the error of each check on one window."""
    weights = {
        _renumbered(name, layers): widened(reader.read(name))
        for name in reader.specs
        if _layer_of(name) is None or _layer_of(name) in layers
    }
    window = window_config(config, layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=generator)

    def mixture(weights: dict[str, Tensor], only: int | None = None, **changes: Any) -> Tensor:
        model = _mixture(window, weights, changes)
        with nullcontext() if only is None else routed_to(model, only):
            return _logits(model, ids)

    def dense(expert: int) -> Tensor:
        tensors = dense_tensors(config, reader.read, expert, layers)
        renumbered = {_renumbered(name, layers): tensor for name, tensor in tensors.items()}
        return _logits(model_of(dense_window(config, layers), renumbered), ids)

    if is_split(config):
        experts = config.num_experts
        equal_gates = {name: torch.zeros_like(each) if _is_router(name) else each for name, each in weights.items()}
        together = mixture(
            equal_gates,
            num_experts_per_tok=experts,
            norm_topk_prob=False,
            ffn_output_scale=float(experts),
            num_attention_experts_per_tok=0,
        )
        yield "all slices", _error(together, dense(0))
    else:
        first = {name: _first_for_all(each) if is_stacked(name) else each for name, each in weights.items()}
        yield "identical experts", _error(mixture(first, **GATES_SUM_TO_ONE), dense(0))
        for expert in range(config.num_experts):
            yield "one expert alone", _error(mixture(weights, only=expert), dense(expert))
    order = torch.randperm(config.num_experts, generator=generator)
    # Experts with equal scores, such as those of zero routers, are chosen by their numbers: noise makes them unequal
    unequal = {
        name: each + NOISE * torch.randn(each.shape, generator=generator) if name.endswith(".gate.weight") else each
        for name, each in weights.items()
    }
    permuted = {
        name: each[order] if _is_router(name) or (is_stacked(name) and each.shape[0] > 1) else each
        for name, each in unequal.items()
    }
    yield "order", _error(mixture(permuted), mixture(unequal))


def window_config(config: BamConfig, layers: Sequence[int]) -> BamConfig:
    """Return the configuration of a mixture that has only some of the layers."""
    window = copy.deepcopy(config)
    window.num_hidden_layers = len(layers)
    assert config.layer_types is not None
    window.layer_types = [config.layer_types[layer] for layer in layers]
    for key in ("dense_layers", "nope_layers"):
        chosen = [number for number, layer in enumerate(layers) if layer in (getattr(config, key) or ())]
        setattr(window, key, chosen or None)
    return window


def dense_window(config: BamConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Return the configuration of a dense model of the seed's architecture that has only some of the layers."""
    dense = AutoConfig.for_model(**seed_config(config))
    types = getattr(dense, "layer_types", None)
    if types:
        dense.layer_types = [types[layer] for layer in layers]
    dense.num_hidden_layers = len(layers)
    return dense


def _mixture(config: BamConfig, weights: dict[str, Tensor], changes: dict[str, Any]) -> PreTrainedModel:
    """Return a mixture with changed settings."""
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(changed, key, value)
    return model_of(changed, weights)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _is_router(name: str) -> bool:
    return ".gate." in name


def _first_for_all(stacked: Tensor) -> Tensor:
    return stacked[:1].expand_as(stacked)


def _renumbered(name: str, layers: Sequence[int]) -> str:
    """Return a tensor's name with the number that its layer has within the window."""
    return re.sub(r"(?<=layers\.)\d+", lambda found: str(layers.index(int(found.group()))), name, count=1)
