"""The partition of each layer's FFN when one dense model is split into experts (LLaMA-MoE)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import UpcycleError
from bam_ray.families import Family, Role
from bam_ray.settings import SplitSettings
from bam_ray.upcycling.loading import load_model
from bam_ray.upcycling.split.importance import cluster_sequences, neuron_importance
from bam_ray.upcycling.split.partition import (
    Partition,
    clustering_partition,
    inner_partition,
    inter_partition,
    random_partition,
)


def partitions_of(
    family: Family, seed: TensorReader, settings: SplitSettings, texts: Mapping[str, Tensor]
) -> list[Partition]:
    """Return the partition of each layer by the construction in `settings.split`.

    Args:
        family: The family of the seed.
        seed: The model to split.
        settings: The settings of the split.
        texts: Rows of tokens, int64 [S, L], by any names, on which the sharing constructions run the seed forward and
            backward.

    Raises:
        UpcycleError: The neurons or the text cannot be divided among the experts.
    """
    experts = settings.num_experts
    assert experts is not None  # checked by the settings
    sizes = family.convert_config(seed.config)
    layers, neurons = sizes["num_hidden_layers"], sizes["intermediate_size"]
    construction = settings.split.construction
    if construction == "random":
        return [Partition.of(random_partition(neurons, experts, settings.seed + layer)) for layer in range(layers)]
    if construction == "clustering":
        ups = _tensor_names(family, seed, Role.UP)
        return [
            Partition.of(clustering_partition(seed.read(ups[layer]).float(), experts, settings.seed + layer))
            for layer in range(layers)
        ]
    importance = _importance(family, seed, experts, settings.seed, list(texts.values()))
    if construction == "inner":
        return [Partition.of(inner_partition(each, neurons // experts)) for each in importance]
    shared = settings.split.shared_neurons
    if shared is None:  # the size of an expert, plus the neurons that cannot be divided equally among the experts
        shared = neurons // experts + (neurons - neurons // experts) % experts
    size = (neurons - shared) // experts
    return [Partition.of(own, common) for common, own in (inter_partition(each, shared, size) for each in importance)]


def _tensor_names(family: Family, seed: TensorReader, role: Role) -> dict[int | None, str]:
    """Return the names of the tensors of a role by layer."""
    return {parameter.layer: parameter.name for parameter in family.parameters(seed.config) if parameter.role is role}


def _importance(family: Family, seed: TensorReader, experts: int, random_seed: int, groups: list[Tensor]) -> Tensor:
    """Return the importance of each neuron for one group of sequences per expert: [layers, N, f].

    If the number of texts in `groups` differs from the number of experts, their sequences are clustered into groups.

    Raises:
        UpcycleError: There are fewer sequences than experts.
    """
    model = load_model(seed)
    downs = _tensor_names(family, seed, Role.DOWN)
    names = [downs[layer].removesuffix(".weight") for layer in range(model.config.num_hidden_layers)]
    sequences = sum(map(len, groups))
    if sequences < experts:
        raise UpcycleError(f"{sequences} sequences of text are too few for {experts} experts: give more text")
    if len(groups) != experts:
        rows = torch.cat(groups)
        groups = cluster_sequences(model, rows[: len(rows) // experts * experts], experts, random_seed)
    return neuron_importance(model, names, groups)
