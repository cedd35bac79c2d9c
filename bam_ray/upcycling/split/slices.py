"""Which neurons of each layer's FFN go to which expert when one dense model is split (LLaMA-MoE)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import UpcycleError
from bam_ray.families import Family, Role
from bam_ray.settings import MixtureSettings
from bam_ray.upcycling.loading import load_model
from bam_ray.upcycling.plan import Partition
from bam_ray.upcycling.split.importance import cluster_sequences, neuron_importance
from bam_ray.upcycling.split.partition import clustering_partition, inner_partition, inter_partition, random_partition


def partitions_of(
    family: Family, seed: TensorReader, settings: MixtureSettings, texts: Mapping[str, Tensor]
) -> list[Partition]:
    """One partition a layer, as `settings.split` says; raises `UpcycleError` where the neurons cannot be shared out.

    The sharing constructions run the seed, forward and backward, on `texts` ([S, L] int64, by any names): its sequences
    are clustered in as many groups as there are experts, unless there are just as many texts.
    """
    experts = settings.num_experts
    assert experts is not None  # checked by the settings
    sizes = family.convert_config(seed.config)
    layers, neurons = sizes["num_hidden_layers"], sizes["intermediate_size"]
    construction = settings.split.construction
    if construction == "random":
        return [_partition(random_partition(neurons, experts, settings.seed + layer)) for layer in range(layers)]
    if construction == "clustering":
        ups = {place.layer: place for place in family.parameters(seed.config) if place.role is Role.UP}
        return [
            _partition(clustering_partition(seed.read(ups[layer].name).float(), experts, settings.seed + layer))
            for layer in range(layers)
        ]
    model = load_model(seed)
    downs = {place.layer: place for place in family.parameters(seed.config) if place.role is Role.DOWN}
    names = [downs[layer].name.removesuffix(".weight") for layer in range(layers)]
    groups = list(texts.values())
    if sum(map(len, groups)) < experts:
        raise UpcycleError(f"{sum(map(len, groups))} sequences of text are too few for {experts} experts: give more")
    if len(groups) != experts:
        rows = torch.cat(groups)
        groups = cluster_sequences(model, rows[: len(rows) // experts * experts], experts, settings.seed)
    importance = neuron_importance(model, names, groups)  # [layers, N, f]
    if construction == "inner":
        return [_partition(inner_partition(each, neurons // experts)) for each in importance]
    shared = settings.split.shared_neurons
    if shared is None:  # as many as an expert has, and what cannot be shared out alike
        shared = neurons // experts + (neurons - neurons // experts) % experts
    size = (neurons - shared) // experts
    return [
        Partition(_partition(own).experts, tuple(common.tolist()))
        for common, own in (inter_partition(each, shared, size) for each in importance)
    ]


def _partition(index: Tensor) -> Partition:
    return Partition(tuple(tuple(row) for row in index.tolist()))
