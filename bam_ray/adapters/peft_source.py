"""Adapters in the folder format of the peft library: `adapter_config.json` and `adapter_model.safetensors`."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bam_ray.adapters.source import AdapterKey
from bam_ray.adapters.weights import AdapterWeights, LoraPair, check_pairs
from bam_ray.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft wraps the base model twice
FACTORS = {".lora_A.weight": "a", ".lora_B.weight": "b"}
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
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


class PeftFolders:
    """A folder with one peft folder for each adapter, whose name is that of its folder.

    Folders with other characters in their names than letters, digits, `.`, `_` and `-` are left out, because names are
    in headers of responses.
    """

    tier = "disk"

    def __init__(self, root: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Create a source.

        Args:
            root: The folder that has the folders of the adapters.
            shapes: The shape [out, in] of each linear layer of the base model, by name.

        Raises:
            CheckpointError: The folder does not exist.
        """
        self._root, self._shapes = root, shapes
        self.keys()

    def keys(self) -> Mapping[str, AdapterKey]:
        """Return the folders that have both files of an adapter."""
        try:
            folders = [each for each in self._root.iterdir() if NAME.fullmatch(each.name)]
        except OSError as error:
            raise CheckpointError(
                f"{self._root} cannot be read ({error.strerror}): set serve.adapters.source to a folder of adapters"
            ) from None
        keys = (self._key(folder) for folder in sorted(folders))
        return {key.name: key for key in keys if key is not None}

    def fetch(self, key: AdapterKey) -> AdapterWeights:
        """Return the weights of an adapter."""
        weights = read_peft_folder(self._root / key.name, self._shapes)
        if self._key(self._root / key.name) != key:
            raise CheckpointError(f"adapter {key.name} has changed while it was read: retry")
        return weights

    def _key(self, folder: Path) -> AdapterKey | None:
        """Return the key of an adapter, or None if a file is missing, as while it is being written."""
        try:
            files = [(folder / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
        except OSError:
            return None
        stamp = repr([(each.st_mtime_ns, each.st_size, each.st_ino) for each in files])
        return AdapterKey(folder.name, hashlib.sha256(stamp.encode()).hexdigest()[:12])


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
    # All values at once: a loading thread has to wait for the engine's thread before each operation
    if not bool(torch.cat([each.flatten().float() for each in tensors.values()]).isfinite().all()):
        raise CheckpointError(f"{folder}: factors are not finite: train the adapter again")
    wrong = next((name for name, pair in pairs.items() if len(pair.a) != rank), None)
    if wrong is not None:
        raise CheckpointError(
            f"{folder}: {wrong} has rank {len(pairs[wrong].a)}, but the configuration says {rank}: save it again"
        )
    return AdapterWeights(folder.name, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), pairs)


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
