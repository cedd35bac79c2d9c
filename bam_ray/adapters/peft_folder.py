"""LoRA adapters in the folder format of the peft library: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bam_ray.adapters.weights import AdapterWeights, LoraPair
from bam_ray.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft wraps the base model twice
FACTORS = {".lora_A.weight": "a", ".lora_B.weight": "b"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}
"""The settings that must have one of these values, because others change more than linear layers by `scale · B A`."""


def read_peft_folder(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> AdapterWeights:
    """Read an adapter, whose name is that of its folder.

    Args:
        folder: A folder that peft's `save_pretrained` could have written.
        shapes: The shape [out, in] of each linear layer of the base model, by name.

    Raises:
        CheckpointError: A file is missing or damaged, the adapter is no plain LoRA, or it does not fit the base model.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: r is {rank!r} and lora_alpha is {alpha!r}: write the file again"
        )
    pairs = _pairs(folder, tensors)
    check_pairs(str(folder), pairs, shapes)
    wrong = next((name for name, pair in pairs.items() if len(pair.a) != rank), None)
    if wrong is not None:
        raise CheckpointError(
            f"{folder}: {wrong} has rank {len(pairs[wrong].a)}, but the configuration says {rank}: save it again"
        )
    return AdapterWeights(folder.name, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), pairs)


def check_pairs(source: str, pairs: Mapping[str, LoraPair], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `CheckpointError` if the factors of an adapter do not fit the linear layers of a base model.

    Args:
        source: The adapter, for the error message.
        pairs: The factors of each linear layer, by name.
        shapes: The shape [out, in] of each linear layer of the base model, by name.
    """
    if not pairs:
        raise CheckpointError(f"{source} changes no layer: train it with target_modules, and save it again")
    for name, pair in pairs.items():
        if name not in shapes:
            raise CheckpointError(
                f"{source} changes {name}, which is no linear layer of the base model: serve it with its own base model"
            )
        fits = pair.a.ndim == pair.b.ndim == 2 and len(pair.a) == pair.b.shape[1] > 0
        if not fits or (len(pair.b), pair.a.shape[1]) != shapes[name]:
            raise CheckpointError(
                f"{source}: the factors of {name} are {[*pair.a.shape]} and {[*pair.b.shape]}, but the layer is "
                f"{[*shapes[name]]}: serve it with its own base model"
            )
        if not all(bool(each.isfinite().all()) for each in (pair.a, pair.b)):
            raise CheckpointError(f"{source}: the factors of {name} are not finite: train the adapter again")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): pass the folder of a peft adapter") from None
    except ValueError:
        raise CheckpointError(f"{path} is no JSON: save the adapter again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object: save the adapter again")
    for name, values in PLAIN_SETTINGS.items():
        if config.get(name, values[0]) not in values:
            raise CheckpointError(
                f"{path}: {name} is {config[name]!r}, which is not supported: use a LoRA adapter with {values[0]!r}"
            )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): save the adapter again") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): save the adapter again") from None


def _pairs(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, LoraPair]:
    """Return the factors of each layer. The names in the file are `base_model.model.LAYER.lora_A.weight`."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((each for each in FACTORS if key.endswith(each)), None)
        if (
            suffix is None
            or not key.startswith(PREFIX)
            or tensor.dtype not in (torch.float32, torch.bfloat16, torch.half)
        ):
            raise CheckpointError(f"{folder}: {key} ({tensor.dtype}) is no factor of a LoRA adapter: save it again")
        factors.setdefault(key[len(PREFIX) : -len(suffix)], {})[FACTORS[suffix]] = tensor
    for name, pair in factors.items():
        if len(pair) != len(FACTORS):
            raise CheckpointError(f"{folder}: {name} has only one factor: save the adapter again")
    return {name: LoraPair(**pair) for name, pair in factors.items()}
