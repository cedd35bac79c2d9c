"""Adapters as folders of peft: `adapter_config.json` and `adapter_model.safetensors`.

`PeftModel.from_pretrained` loads such a folder. A folder from elsewhere is read only if its adapter is
plain LoRA, which is all that the server computes. peft itself is not needed for either direction.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bam_ray.adapters.bundles import SUFFIXES, AdapterIndexFile, BaseIdentity, pairs_of, tensors_of
from bam_ray.adapters.weights import AdapterWeights, lora_scale
from bam_ray.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of a layer's name in peft's files
BASE_DIGEST = "base_sha256"  # in the metadata of the weights: the digest of the model that an adapter belongs to
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "fan_in_fan_out": (False, None),
    "megatron_config": (None,),
    "eva_config": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base model
}
"""Settings of peft's LoRA that change what is computed, with the values of plain LoRA."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PeftAdapter:
    """A plain LoRA that was read from a folder of peft."""

    weights: AdapterWeights
    rank: int
    alpha: float
    rank_stabilized: bool
    targets: tuple[str, ...]


def write_peft_folder(folder: Path, weights: AdapterWeights, index: AdapterIndexFile, base: str) -> None:
    """Write an adapter of `index` to an existing folder, in the format of peft.

    Args:
        folder: The folder.
        weights: The adapter.
        index: The index that the adapter is from.
        base: The path or name of the base model, for people and for tools that load it.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": index.rank,
        "lora_alpha": int(index.alpha) if index.alpha.is_integer() else index.alpha,  # peft declares an integer
        "use_rslora": index.rank_stabilized,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(index.targets),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {PREFIX + name: tensor for name, tensor in tensors_of(weights).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt", BASE_DIGEST: index.base.sha256})


def read_peft_folder(
    folder: Path, name: str, layers: Mapping[str, tuple[int, int]], base: BaseIdentity | None = None
) -> PeftAdapter:
    """Read an adapter from a folder of peft, and check that it is plain LoRA for the base model.

    Args:
        folder: The folder.
        name: The name that the adapter gets.
        layers: The shape [out, in] of each linear layer of the base model that an adapter can change, by name.
        base: The base model. A folder that states the digest of another one is refused. None: the digest is not
            compared.

    Raises:
        CheckpointError: The folder has no adapter, it is damaged, it is not plain LoRA, or it does not fit the model.
    """
    config = _read_config(folder)
    rank = config["r"]
    tensors = _read_tensors(folder, base)
    for tensor_name, tensor in tensors.items():
        _check_tensor(f"{folder / WEIGHTS}: {tensor_name}", tensor_name, tensor, rank, layers)
    # All values at once: a thread that loads has to wait for the engine's thread before each operation
    if not bool(torch.cat([tensor.flatten().float() for tensor in tensors.values()]).isfinite().all()):
        raise CheckpointError(f"{folder / WEIGHTS} has values that are not finite: train the adapter again")
    for tensor_name in tensors:
        ends = SUFFIXES if tensor_name.endswith(SUFFIXES[0]) else SUFFIXES[::-1]
        if tensor_name.removesuffix(ends[0]) + ends[1] not in tensors:
            raise CheckpointError(f"{folder / WEIGHTS} has {tensor_name} without {ends[1][1:]}: export it again")
    alpha, stabilized = float(config["lora_alpha"]), bool(config.get("use_rslora"))
    weights = AdapterWeights(name, lora_scale(rank, alpha, stabilized), pairs_of(tensors))
    targets = config.get("target_modules")
    listed = tuple(targets) if isinstance(targets, list) else tuple(weights.pairs)
    return PeftAdapter(weights, rank, alpha, stabilized, listed)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter; raise `CheckpointError` if it is not that of plain LoRA."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{folder} is not a folder of peft: {CONFIG} is missing or is no JSON") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path} has peft_type {kind!r}: only LORA can be served, so train a LoRA adapter")
    for key, plain in PLAIN.items():
        if key in config and config[key] not in plain:
            raise CheckpointError(
                f"{path} has {key} {config[key]!r}: only plain LoRA can be served, so merge the adapter with peft or "
                f"train it without {key}"
            )
    if type(config.get("r")) is not int or config["r"] < 1 or not _is_positive(config.get("lora_alpha")):
        raise CheckpointError(
            f"{path} has r {config.get('r')!r} and lora_alpha {config.get('lora_alpha')!r}: both must be positive "
            "numbers, so export the adapter again"
        )
    return config


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _read_tensors(folder: Path, base: BaseIdentity | None) -> dict[str, Tensor]:
    """Return the tensors of a folder by the names of layers of the base model, in one dtype."""
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(BASE_DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {WEIGHTS}: save the adapter with safetensors") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; export the adapter again") from None
    if base is not None and stated is not None and stated != base.sha256:
        raise CheckpointError(
            f"{path} belongs to a model with digest {stated[:12]}, not to {base.id} (digest {base.sha256[:12]}): "
            "choose the run of its own model"
        )
    if not tensors:
        raise CheckpointError(f"{path} has no tensors: export the adapter again")
    # Older releases of peft name the adapter in each tensor
    named = {
        re.sub(r"\.default\.weight$", ".weight", name.removeprefix(PREFIX)): each for name, each in tensors.items()
    }
    dtypes = {tensor.dtype for tensor in named.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def _check_tensor(what: str, name: str, tensor: Tensor, rank: int, layers: Mapping[str, tuple[int, int]]) -> None:
    """Raise `CheckpointError` if a tensor of an adapter does not fit the base model."""
    suffix = next((each for each in SUFFIXES if name.endswith(each)), None)
    if suffix is None:
        raise CheckpointError(f"{what} is no factor of LoRA: only lora_A and lora_B of linear layers can be served")
    layer = name.removesuffix(suffix)
    if layer not in layers:
        raise CheckpointError(f"{what} is for a layer that the base model does not have: choose the run of its model")
    out_size, in_size = layers[layer]
    wanted = (rank, in_size) if suffix == SUFFIXES[0] else (out_size, rank)
    if tuple(tensor.shape) != wanted:
        raise CheckpointError(
            f"{what} has the shape {list(tensor.shape)}, but rank {rank} and the base model need {list(wanted)}: "
            "choose the run of its model"
        )
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{what} has dtype {tensor.dtype}: save the adapter in float32, bfloat16 or float16")
