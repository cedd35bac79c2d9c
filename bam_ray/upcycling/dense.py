"""Dense models that are rebuilt from a mixture: one expert's parameters with those that all experts share.

If the experts are slices of one model (a split), the dense model consists of all slices. Its neurons are in another
order than in the original model, which does not change its output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError, UpcycleError, one_line
from bam_ray.families import (
    FFN_ROLES,
    DenseParameter,
    Role,
    expert_name,
    family_of,
    is_stacked,
    plain_name,
    shared_name,
)
from bam_ray.model import BamConfig, is_mixture
from bam_ray.upcycling.methods import EMBEDDING_ROLES, is_plain
from bam_ray.upcycling.plan import COLUMNS

ReadTensor = Callable[[str], Tensor]
"""A function that returns the tensor of a name."""


def mixture_config_of(reader: TensorReader) -> BamConfig:
    """Return the configuration of the mixture at `reader`; raise `UpcycleError` if the model is no mixture."""
    if not is_mixture(reader.config):
        raise UpcycleError(
            f"{reader.uri} is a dense {reader.config.get('model_type')!r} model, not a mixture of bam_ray: make a "
            "mixture of it with `bam upcycle` first"
        )
    try:
        config: BamConfig = BamConfig.from_dict(reader.config)
    except Exception as error:  # the checks of transformers raise many types
        raise UpcycleError(
            f"{reader.uri}/config.json is not the configuration of a mixture: {one_line(error, all_lines=True)}"
        ) from None
    stacked = {spec.shape[0] for name, spec in reader.specs.items() if is_stacked(name) and spec.shape}
    if config.num_experts not in stacked:
        raise UpcycleError(
            f"{reader.uri}/config.json: num_experts is {config.num_experts}, but no tensor holds so many experts: use "
            "the config.json that was saved with the weights"
        )
    return config


def meta_model(config: PreTrainedConfig, uri: str) -> PreTrainedModel:
    """Return a model without memory for its weights; `uri` is its folder for messages.

    Raises:
        CheckpointError: The configuration describes no model that can be built.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except Exception as error:  # torch and transformers raise many types
        raise CheckpointError(f"{uri}/config.json describes a model that cannot be built: {one_line(error)}") from None
    return model


def tensor_mismatch(reader: TensorReader, config: BamConfig) -> str:
    """Return the first tensor whose shape is not that of the mixture's configuration, for people; empty if all fit."""
    model = meta_model(config, reader.uri)
    saved = model.state_dict()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    expected = {name: tuple(each.shape) for name, each in (*model.named_parameters(), *buffers)}  # tied parameters once
    found = {name: spec.shape for name, spec in reader.specs.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not wrong:
        return ""
    shapes = f"shape {found.get(wrong[0])}, expected {expected.get(wrong[0])}"
    return f"{wrong[0]} has {shapes} ({len(wrong)} tensors differ)"


def check_mixture(reader: TensorReader) -> BamConfig:
    """Return the configuration of the mixture at `reader`; raise `UpcycleError` if its tensors are others."""
    config = mixture_config_of(reader)
    mismatch = tensor_mismatch(reader, config)
    if mismatch:
        raise UpcycleError(
            f"{reader.uri}: {mismatch}: use a complete mixture with the config.json that was saved with it"
        )
    return config


def is_split(config: BamConfig) -> bool:
    """Return True if the FFN experts are slices of one dense FFN, not whole FFNs."""
    whole = config.dense_intermediate_size
    return whole is not None and whole != config.intermediate_size


def seed_config(config: BamConfig) -> dict[str, Any]:
    """Return the `config.json` of the seed that a mixture came from.

    Raises:
        UpcycleError: It is not recorded, or has another number of layers than the mixture.
        FamilyError: It is no configuration of a supported architecture.
    """
    dense = config.seed_config
    if not isinstance(dense, dict):
        raise UpcycleError("the mixture's config.json has no seed_config, the configuration of its seed: upcycle again")
    if dense.get("num_hidden_layers", config.num_hidden_layers) != config.num_hidden_layers:
        raise UpcycleError("the mixture's config.json and the seed_config in it differ in num_hidden_layers")
    family_of(dense, "the seed_config of the mixture")
    return dict(dense)


def dense_tensors(config: BamConfig, read: ReadTensor, expert: int, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors of the dense model of one expert.

    Args:
        config: The configuration of the mixture.
        read: Returns a tensor of the mixture by name.
        expert: The number of the expert. It is ignored for a split.
        layers: The layers to return. Tensors outside of layers are always returned.

    Returns:
        The tensors in fp32, by the names of the dense architecture.
    """
    dense = seed_config(config)
    family = family_of(dense, "the seed")
    found: dict[str, list[tuple[DenseParameter, Tensor]]] = {}
    for parameter in family.parameters(dense):
        if parameter.layer is None or parameter.layer in layers:
            tensor = _parameter_tensor(config, read, parameter, expert)
            found.setdefault(parameter.name, []).append((parameter, tensor))
    return {name: _assembled(parts) for name, parts in found.items()}


def _assembled(parts: list[tuple[DenseParameter, Tensor]]) -> Tensor:
    """Return a dense tensor from the parameters that it consists of."""
    if parts[0][0].rows is None:
        return parts[0][1]
    total = sum(tensor.shape[0] for _, tensor in parts)
    whole = torch.empty(total, *parts[0][1].shape[1:])
    for parameter, tensor in parts:
        taken = 0
        for start, stop in parameter.rows or ():
            whole[start:stop] = tensor[taken : taken + stop - start]
            taken += stop - start
    return whole


def _parameter_tensor(config: BamConfig, read: ReadTensor, parameter: DenseParameter, expert: int) -> Tensor:
    role, layer = parameter.role, parameter.layer
    if is_plain(config, role, layer):
        return read(plain_name(role, layer)).float()
    if role in FFN_ROLES:
        assert layer is not None
        return _ffn(config, read, role, layer, expert)
    stacked = read(expert_name(role, layer)).float()
    if role in EMBEDDING_ROLES:
        return stacked[expert]
    if config.dense_num_attention_heads not in (None, config.expert_num_attention_heads):
        return _joined(role, stacked)
    return stacked[expert if stacked.shape[0] > 1 else 0]


def _ffn(config: BamConfig, read: ReadTensor, role: Role, layer: int, expert: int) -> Tensor:
    stacked = read(expert_name(role, layer, config.mlp_gated)).float()
    if config.mlp_gated and role not in (Role.DOWN, Role.DOWN_BIAS):
        gate, up = stacked.chunk(2, dim=1)
        stacked = gate if role in (Role.GATE, Role.GATE_BIAS) else up
    if not is_split(config):
        return stacked[expert]
    whole = _joined(role, stacked)
    if config.shared_expert_intermediate_size:
        shared = read(shared_name(role, layer)).float()
        whole = whole + shared if role is Role.DOWN_BIAS else torch.cat([whole, shared], 1 if role in COLUMNS else 0)
    return whole


def _joined(role: Role, stacked: Tensor) -> Tensor:
    """Join all slices of one tensor: [N, ...] -> [...]."""
    if role in (Role.DOWN_BIAS, Role.OUTPUT_BIAS):
        return stacked.sum(0)
    if role in COLUMNS:
        return torch.cat(list(stacked), dim=1)
    if role in (Role.QUERY_NORM, Role.KEY_NORM) and stacked.ndim == 2:
        return stacked[0]
    return stacked.flatten(0, 1)
