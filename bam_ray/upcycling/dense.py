"""The way back: the dense model of one expert with what the experts share, from a mixture's tensors.

Where experts are slices of one model (a split), the dense model is that of all of them together; its neurons are in
another order, which changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import UpcycleError
from bam_ray.families import FFN_ROLES, DenseParameter, Role, expert_name, family_of, plain_name, shared_name
from bam_ray.model import BamConfig, is_mixture
from bam_ray.upcycling.plan import COLUMNS, is_plain

Read = Callable[[str], Tensor]


def mixture_config_of(reader: TensorReader) -> BamConfig:
    """The configuration of the mixture at `reader`; raises `UpcycleError` where it is none."""
    if not is_mixture(reader.config):
        raise UpcycleError(f"{reader.uri} is a {reader.config.get('model_type')!r} model, no mixture of bam_ray")
    config: BamConfig = BamConfig.from_dict(reader.config)
    return config


def is_split(config: BamConfig) -> bool:
    """Whether the FFN experts are slices of one dense FFN, not whole ones."""
    whole = config.dense_intermediate_size
    return whole is not None and whole != config.intermediate_size


def seed_config(config: BamConfig) -> dict[str, Any]:
    """The `config.json` of the dense model that a mixture came from; raises `UpcycleError` where it is not recorded."""
    if config.seed_config is None:
        raise UpcycleError("this mixture does not say what dense model it came from (seed_config): upcycle it again")
    return dict(config.seed_config)


def dense_tensors(config: BamConfig, read: Read, expert: int, layers: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of the dense model of `expert`, fp32, by the dense architecture's names.

    `read` gives the mixture's tensors; of its layers those in `layers`, and all that belong to none.
    """
    dense = seed_config(config)
    family = family_of(dense, "the seed")
    found: dict[str, list[tuple[DenseParameter, Tensor]]] = {}
    for place in family.parameters(dense):
        if place.layer is None or place.layer in layers:
            found.setdefault(place.name, []).append((place, _role_tensor(config, read, place, expert)))
    return {name: _assembled(parts) for name, parts in found.items()}


def _assembled(parts: list[tuple[DenseParameter, Tensor]]) -> Tensor:
    """A dense tensor of its roles' tensors."""
    if parts[0][0].rows is None:
        return parts[0][1]
    total = sum(tensor.shape[0] for _, tensor in parts)
    whole = torch.empty(total, *parts[0][1].shape[1:])
    for place, tensor in parts:
        taken = 0
        for start, stop in place.rows or ():
            whole[start:stop] = tensor[taken : taken + stop - start]
            taken += stop - start
    return whole


def _role_tensor(config: BamConfig, read: Read, place: DenseParameter, expert: int) -> Tensor:
    role, layer = place.role, place.layer
    if is_plain(config, role, layer):
        return read(plain_name(role, layer)).float()
    assert layer is not None
    if role in FFN_ROLES:
        return _ffn(config, read, role, layer, expert)
    stacked = read(expert_name(role, layer)).float()
    if config.dense_num_attention_heads not in (None, config.num_attention_heads):
        return _joined(role, stacked)
    return stacked[expert if stacked.shape[0] > 1 else 0]


def _ffn(config: BamConfig, read: Read, role: Role, layer: int, expert: int) -> Tensor:
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
    """All slices of one tensor together: [N, ...] -> [...]."""
    if role in (Role.DOWN_BIAS, Role.OUTPUT_BIAS):
        return stacked.sum(0)
    if role in COLUMNS:
        return torch.cat(list(stacked), dim=1)
    if role in (Role.QUERY_NORM, Role.KEY_NORM) and stacked.ndim == 2:
        return stacked[0]
    return stacked.flatten(0, 1)
