"""Checks that the weights of a dense checkpoint are those that its configuration describes.

The model that transformers would load must be the one that the table of its family describes: a tensor that is missing
would be drawn at random, and a tensor too many or an output head of its own would be left out. All of it is checked
from names, shapes and dtypes; values are read only to compare a head with the embedding that it should be tied to.
"""

from typing import Any

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import FamilyError
from bam_ray.families.family import Family, Role

Shape = tuple[int, ...]
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTIZED_PARTS = ("qweight", "qzeros", "absmax", "quant_map", "quant_state", "weight_scale", "weight_scale_inv", "SCB")
"""Parts of the names of tensors that only quantized checkpoints have."""
COMPARED_ELEMENTS = 1 << 22
"""Elements of two tensors that are in memory at once while they are compared."""


def tensor_shapes(family: Family, config: dict[str, Any]) -> dict[str, Shape]:
    """Return the shape of each tensor that a dense checkpoint with this configuration must have.

    The time is proportional to the number of layers, however large the other sizes are.
    """
    settings = family.meaning(config)
    by_role = _shapes_by_role(settings)
    by_name: dict[str, Shape] = {}
    for template in family.present_templates(settings):
        first, *rest = by_role.get(template.role, (settings["hidden_size"],))
        rows = by_name.get(template.name, (0,))[0]  # several roles may share one tensor
        by_name[template.name] = (rows + first, *rest)
    return {
        name.format(layer=layer): shape
        for name, shape in by_name.items()
        for layer in range(settings["num_hidden_layers"] if "{layer}" in name else 1)
    }


def _shapes_by_role(settings: dict[str, Any]) -> dict[Role, Shape]:
    """Return the shapes of parameters, of those roles that are not vectors of the hidden size."""
    hidden, ffn, vocabulary = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    heads, groups, width = settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"]
    norms: dict[str, tuple[Shape, Shape]] = {
        "per_head": ((heads, width), (groups, width)),
        "shared": ((width,), (width,)),
        "full": ((heads * width,), (groups * width,)),
    }
    query_norm, key_norm = norms.get(str(settings.get("qk_norm")), ((width,), (width,)))
    return {
        Role.EMBEDDING: (vocabulary, hidden),
        Role.HEAD: (vocabulary, hidden),
        Role.QUERY: (heads * width, hidden),
        Role.KEY: (groups * width, hidden),
        Role.VALUE: (groups * width, hidden),
        Role.OUTPUT: (hidden, heads * width),
        Role.QUERY_BIAS: (heads * width,),
        Role.KEY_BIAS: (groups * width,),
        Role.VALUE_BIAS: (groups * width,),
        Role.QUERY_NORM: query_norm,
        Role.KEY_NORM: key_norm,
        Role.GATE: (ffn, hidden),
        Role.UP: (ffn, hidden),
        Role.DOWN: (hidden, ffn),
        Role.GATE_BIAS: (ffn,),
        Role.UP_BIAS: (ffn,),
    }


def check_weights(reader: TensorReader, family: Family) -> None:
    """Raise `FamilyError` if the weights at `reader` are not those of a model with its configuration."""
    shapes = tensor_shapes(family, reader.config)
    _check_names(reader, family, set(shapes))
    for name, shape in shapes.items():
        spec = reader.specs[name]
        if spec.dtype not in WEIGHT_DTYPES:
            raise FamilyError(
                f"{reader.uri}: {name} has dtype {str(spec.dtype).removeprefix('torch.')}, so the model is quantized: "
                "load it with transformers, call dequantize() and save it in float32, bfloat16 or float16"
            )
        if spec.shape != shape:
            remedy = "use the config.json that was saved with the weights"
            if spec.shape == (0,):
                remedy = (
                    "the weights were saved under DeepSpeed ZeRO stage 3 or FSDP without gathering them, save again"
                )
            raise FamilyError(
                f"{reader.uri}: {name} has shape {list(spec.shape)}, but config.json describes {list(shape)}: {remedy}"
            )
    head = family.name_of(Role.HEAD)
    if head in reader.specs and head not in shapes:
        _check_tied(reader, head, family.name_of(Role.EMBEDDING))


def _check_names(reader: TensorReader, family: Family, expected: set[str]) -> None:
    """Raise `FamilyError` if a tensor is missing, or one that is no buffer is left over."""
    found = {name for name in reader.specs if not family.ignores(name)} - {family.name_of(Role.HEAD)}
    quantized = [name for name in found - expected if not set(QUANTIZED_PARTS).isdisjoint(name.split("."))]
    if quantized:
        raise FamilyError(
            f"{reader.uri} is quantized (it has {min(quantized)}): load it with transformers, call dequantize() and "
            "save it, or use the model that it was made from"
        )
    missing = expected - reader.specs.keys()
    for problem, names in (("lacks", missing), ("has", found - expected)):
        if names:
            raise FamilyError(
                f"{reader.uri} {problem} {min(names)}: {len(names)} tensors do not fit {family.model_type}, "
                "use a complete checkpoint of this architecture"
            )


def _check_tied(reader: TensorReader, head: str, embedding: str) -> None:
    """Raise `FamilyError` if an output head that should be tied to the embedding has other values.

    transformers then does not tie them, whatever the configuration says.
    """
    elements = reader.specs[head].elements
    same = reader.specs[head].shape == reader.specs[embedding].shape and all(
        torch.equal(_range(reader, head, first), _range(reader, embedding, first))
        for first in range(0, elements, COMPARED_ELEMENTS)
    )
    if not same:
        raise FamilyError(
            f"{reader.uri}: {head} differs from {embedding}, though config.json has tie_word_embeddings true: set it "
            f"to false if the head was trained (in all models), or remove {head} from the file"
        )


def _range(reader: TensorReader, name: str, first: int) -> Tensor:
    """Return `COMPARED_ELEMENTS` of a tensor, fewer at its end, in fp64, which represents all other dtypes."""
    last = min(first + COMPARED_ELEMENTS, reader.specs[name].elements)
    return torch.cat(list(reader.chunks(name, first, last))).double()
