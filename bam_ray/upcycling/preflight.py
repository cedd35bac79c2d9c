"""Checks that a seed and branches fit each other, the drift of each branch, and the estimated cost of upcycling.

The error of a mismatch names the file, the key and both values.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import UpcycleError
from bam_ray.families import Family, Role, check_weights, family_of
from bam_ray.upcycling.expressions import Take, aligned
from bam_ray.upcycling.tokenizers import carried_files, check_same_tokenizer
from bam_ray.upcycling.write import ModelPlan

logger = logging.getLogger(__name__)

SAMPLED = 4
"""Number of matrices that are sampled to distinguish a branch from an unrelated model."""
SAMPLED_ELEMENTS = 1 << 18
"""Number of elements of each of these matrices."""
UNRELATED = 0.1
"""A cosine below this means unrelated: unrelated models rarely reach it, and training rarely goes below it."""


def check_sources(sources: Mapping[str, TensorReader]) -> Family:
    """Return the family of the sources; raise an error if one of them is no whole model, or does not fit the seed.

    The seed is the first source.

    Raises:
        FamilyError: The architecture of a source is not supported, or its weights are not those of its configuration.
        UpcycleError: A source has other settings or another tokenizer than the seed.
    """
    seed_name, seed = next(iter(sources.items()))
    family = family_of(seed.config, seed.uri)
    for name, source in sources.items():
        check_source(source, name, seed.config, seed_name)
        if source is not seed:
            check_same_tokenizer(source, name, seed, seed_name)
    carried_files(seed)  # raises if one of them cannot be copied
    return family


def check_source(source: TensorReader, name: str, seed: Mapping[str, Any], seed_name: str) -> None:
    """Raise an error if `source` is no whole model, or if its configuration means something else than the seed's.

    Args:
        source: The model.
        name: The name of the model.
        seed: The content of the seed's `config.json`.
        seed_name: The name of the seed.

    Raises:
        FamilyError: The architecture is not supported, or the weights are not those of the configuration.
        UpcycleError: A setting is not the seed's.
    """
    theirs, ours = ({"model_type": config.get("model_type")} for config in (source.config, seed))
    if theirs == ours:
        theirs = family_of(source.config, source.uri).meaning(source.config)
        ours = family_of(dict(seed), seed_name).meaning(dict(seed))
    for key in sorted(ours.keys() | theirs.keys()):
        if theirs.get(key) != ours.get(key):
            shown = next((each for each in sorted(seed) if each.endswith(key)), key)  # norm_eps is Llama's rms_norm_eps
            raise UpcycleError(
                f"{source.uri}/config.json: {shown} is {theirs.get(key)!r} in {name!r} but {ours.get(key)!r} in "
                f"{seed_name!r}: all branches must come from one seed"
            )
    check_weights(source, family_of(source.config, source.uri))
    if "auto_map" in source.config:
        logger.warning(
            "%s has model code of its own (auto_map), which is not used: its weights are read as those of a %s model",
            source.uri,
            source.config["model_type"],
        )


def check_seed(sources: Mapping[str, TensorReader], family: Family) -> None:
    """Raise `UpcycleError` if a branch's weights do not descend from the seed's (the first source's).

    The check samples the beginning of a few FFN matrices. Their cosine between a model and one that was trained from it
    is near 1. It is near 0 for an unrelated model, even one with the same configuration.
    """
    seed_name, seed = next(iter(sources.items()))
    ups = [parameter.name for parameter in family.parameters(seed.config) if parameter.role is Role.UP]
    names = ups[:: max(1, len(ups) // SAMPLED)]

    def sample(source: TensorReader, name: str) -> Tensor:
        return next(source.chunks(name, 0, min(source.specs[name].elements, SAMPLED_ELEMENTS))).float()

    for branch, source in sources.items():
        cosines = [float(torch.cosine_similarity(sample(seed, name), sample(source, name), dim=0)) for name in names]
        mean = sum(cosines) / len(cosines)
        if mean < UNRELATED:
            raise UpcycleError(
                f"{source.uri}: {names[0]} of {branch!r} does not descend from {seed_name!r} (cosine {mean:.2f}; 1 "
                "means equal): use branches of this seed, or same_seed=false to skip this check"
            )


@dataclass(frozen=True)
class Drift:
    """The distance of one branch from the seed.

    Attributes:
        by_layer: ‖branch - seed‖ / ‖seed‖ over the tensors of each layer; None stands for tensors outside of layers.
        seconds: The time that the comparison took.
        bytes: The number of bytes read.
    """

    by_layer: dict[int | None, float]
    seconds: float
    bytes: int

    @property
    def largest(self) -> float:
        """The largest drift of any layer."""
        return max(self.by_layer.values())


def drift(seed: TensorReader, branch: TensorReader, family: Family) -> Drift:
    """Return the drift of a branch from the seed. Both models are read once, chunk by chunk."""
    started = time.perf_counter()
    sums: dict[int | None, list[float]] = defaultdict(lambda: [0.0, 0.0])
    read = 0
    layer_of = {parameter.name: parameter.layer for parameter in family.parameters(seed.config)}
    for name, layer in layer_of.items():
        ours, theirs = Take("seed", name), Take("branch", name)
        sources = {"seed": seed, "branch": branch}
        for one, other in aligned([ours.pieces(sources), theirs.pieces(sources)]):
            one = one.float()
            sums[layer][0] += float((other.float() - one).square().sum())
            sums[layer][1] += float(one.square().sum())
        read += seed.specs[name].bytes + branch.specs[name].bytes
    return Drift(
        {layer: math.sqrt(change / max(size, 1e-30)) for layer, (change, size) in sums.items()},
        time.perf_counter() - started,
        read,
    )


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of upcycling.

    Attributes:
        read: The bytes to read.
        written: The bytes to write.
        memory: The bytes of memory in addition to those of the process itself.
    """

    read: int
    written: int
    memory: int


def estimate(planned: ModelPlan, sources: Mapping[str, TensorReader]) -> Estimate:
    """Estimate the bytes to read and to write, and the largest set of whole tensors in memory at the same time."""
    return Estimate(
        read=sum(spec.bytes for source in sources.values() for spec in source.specs.values()),
        written=sum(tensor.spec.bytes for tensor in planned.tensors),
        memory=max(tensor.expression.held(sources) for tensor in planned.tensors),
    )
