"""The content of a Hugging Face folder: the weight files that transformers would load, and the kind of other folders.

Problem: a folder may hold two sets of weights, weights in another format, an adapter or pointers of Git LFS. The
tensors must be those that transformers would load, and a user whose folder is of another kind must read what it is.

Design choice: `weight_files` follows the order of transformers: `model.safetensors`, then the shards of
`model.safetensors.index.json`. Every other folder is refused in one line that names its kind and the way to convert it.
Names of tensors are handled as in transformers too: the prefix of the base model is added if it is missing, and the
prefixes of wrappers, which transformers would not load, are refused.
"""

import json
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from bam_ray.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

CONVERT = "load it with AutoModelForCausalLM.from_pretrained and save it with save_pretrained"
# The first pattern that a file of a folder without weights matches describes the folder
KINDS = (
    ("*.incomplete", "is a download that was interrupted", "download it again"),
    ("pytorch_model*.bin", "has its weights in PyTorch's .bin format, which can run code", CONVERT),
    ("*.gguf", "has its weights in the GGUF format of llama.cpp", f"{CONVERT} (gguf_file=...)"),
    ("model-*-of-*.safetensors", f"has shards but no {INDEX}", "download the index too, or save the model again"),
    ("model.*.safetensors", "has only a variant of its weights", f"rename the file to {WEIGHTS}"),
    ("consolidated*", "has its weights in their publisher's own format", "get the version for transformers"),
    ("tf_model*.h5", "has its weights in TensorFlow's format", "convert it with transformers 4 (from_tf=True)"),
    ("flax_model*.msgpack", "has its weights in Flax's format", "convert it with transformers 4 (from_flax=True)"),
    (
        "zero_to_fp32.py",
        "is a checkpoint of DeepSpeed",
        f"run its zero_to_fp32.py --safe_serialization to get {WEIGHTS}",
    ),
    (
        "global_step*/*",
        "is a checkpoint of DeepSpeed",
        f"run its zero_to_fp32.py --safe_serialization to get {WEIGHTS}",
    ),
    ("*.distcp", "is a checkpoint of torch.distributed", "convert it with torch.distributed.checkpoint.format_utils"),
)
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Parts of names that wrappers insert anywhere, and the wrappers."""
OUTER_WRAPPERS = {
    "module": "a parallel wrapper of PyTorch or DeepSpeed",
    "base_model": "PEFT",
    "pretrained_model": "TRL",
}
"""First parts of names that wrappers insert, and the wrappers."""


class FolderFiles(Protocol):
    """The files of one folder by name."""

    @property
    def uri(self) -> str:
        """The URI of the folder, for messages."""
        ...

    def has_file(self, name: str) -> bool:
        """Return True if the folder has a file of this name."""
        ...

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        ...

    def file_names(self, folder: str = "") -> list[str]:
        """Return the names of the files in the folder, or in one of its subfolders."""
        ...


def read_config(files: FolderFiles) -> dict[str, Any]:
    """Return the content of `config.json`.

    Raises:
        CheckpointError: There is none, it is damaged, or the folder is an adapter.
    """
    if files.has_file(ADAPTER):
        raise CheckpointError(
            f"{files.uri} is a PEFT adapter, not a whole model ({ADAPTER}): merge it into its base model with "
            "merge_and_unload() and save_pretrained() to a new folder"
        )
    data = files.read_file("config.json")
    if data is None:
        raise CheckpointError(f"{files.uri} is not a Hugging Face model folder: it has no config.json")
    return parse_object(data, f"{files.uri}/config.json")


def parse_object(data: bytes, uri: str) -> dict[str, Any]:
    """Return the JSON object in `data`; raise a `CheckpointError` that names `uri` if there is none."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{uri} is not JSON: the file is damaged") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{uri} is not a JSON object: the file is damaged")
    return parsed


def is_part(name: str) -> bool:
    """Return True if a file is a part of the weights or of the optimizer states (see `part_name`)."""
    return fnmatchcase(name, "*.part-*-of-*.safetensors")


def part_name(kind: str, number: int, count: int) -> str:
    """Return the name of the part `number` (from 0) of `count` of the tensors of `kind`, "model" or "optimizer"."""
    return f"{kind}.part-{number + 1:04d}-of-{count:04d}.safetensors"


def weight_files(files: FolderFiles, config: dict[str, Any]) -> list[str]:
    """Return the names of the weight files that transformers would load, or of the parts of a training checkpoint.

    Raises:
        CheckpointError: There are none; the message says what the folder is instead.
    """
    named = config.get("transformers_weights")
    if named is not None:  # it would be lost when transformers saves the configuration again
        raise CheckpointError(
            f"{files.uri}/config.json names its weights (transformers_weights is {named!r}): rename the file to "
            f"{WEIGHTS} and remove the setting"
        )
    if files.has_file(WEIGHTS):
        return [WEIGHTS]
    index = files.read_file(INDEX)
    if index is None:
        parts = [name for name in files.file_names() if is_part(name) and name.startswith("model.")]
        if parts:
            return parts
        raise CheckpointError(_describe(files))
    shards = parse_object(index, f"{files.uri}/{INDEX}").get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(_is_file_name(shard) for shard in shards.values()):
        raise CheckpointError(f"{files.uri}/{INDEX} is not an index of shards: the file is damaged")
    return sorted(set(shards.values()))


def _is_file_name(name: Any) -> bool:
    """Return True if a JSON value is the name of a file inside of the folder."""
    if not isinstance(name, str) or "\0" in name or not name.isprintable():
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


def _describe(files: FolderFiles) -> str:
    """Return what a folder without weights is, and how to get weights from it."""
    names = files.file_names()
    for pattern, what, remedy in KINDS:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if matches:
            return f"{files.uri} {what} ({matches[0]}); only safetensors can be read: {remedy}"
    return f"{files.uri}/{WEIGHTS} is missing: download or save the model again"


def refuse_pointer(data: bytes, uri: str) -> None:
    """Raise `CheckpointError` if `data` is the beginning of a pointer of Git LFS."""
    if data.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{uri} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository"
        )


def refuse_wrappers(names: Iterable[str], uri: str) -> None:
    """Raise `CheckpointError` if names of tensors have a prefix of a wrapper, which transformers does not remove."""
    for name in names:
        first, *rest = name.split(".")
        found = next((part for part in (first, *rest) if part in WRAPPERS), None)
        wrapper = WRAPPERS.get(found or "") or OUTER_WRAPPERS.get(first)
        if wrapper:
            raise CheckpointError(
                f"{uri}: the name of tensor {name} has the prefix {found or first!r} of {wrapper}, so transformers "
                "would not load it: save the model that is inside of the wrapper, or rename the tensors"
            )


def base_prefix(config: dict[str, Any], names: Collection[str]) -> str:
    """Return the prefix that transformers adds to all names except the head's.

    It is empty unless the checkpoint was saved from the model without its head (`AutoModel`).
    """
    prefix = "gpt_neox." if config.get("model_type") == "gpt_neox" else "model."
    is_base = any(name.startswith("layers.") for name in names)
    return prefix if is_base and not any(name.startswith(prefix) for name in names) else ""


def check_layers(config: dict[str, Any], names: Iterable[str], uri: str) -> None:
    """Raise `CheckpointError` if the configuration has more layers than the weights.

    Code that visits every layer may then trust the number. The layer is the first number in the name of a tensor.
    """
    layers = config.get("num_hidden_layers")
    found = {next((part for part in name.split(".") if part.isdecimal()), None) for name in names} - {None}
    if isinstance(layers, int) and layers > len(found):
        raise CheckpointError(
            f"{uri}/config.json: num_hidden_layers is {layers}, but the weights have {len(found)} layers: use the "
            "config.json that was saved with them"
        )


def refuse_outside_link(store_uri: str, prefix: str, name: str) -> None:
    """Raise `CheckpointError` if a file is a link that leads out of its folder, so that other files are not published.

    The links of the Hub's cache lead from `snapshots/<revision>` to the `blobs` beside it, and are allowed.
    """
    folder = Path(store_uri, prefix).resolve()
    path = folder / name
    if "://" in store_uri or not path.exists():
        return
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    target = path.resolve()
    if not target.is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link to {target}, outside of the folder: replace it with a copy if the file is meant"
        )
