"""Pre-flight: whether seed and branches can become one mixture, how far each drifted, and what the work will take.

A mismatch names the place, the key and both values.
"""

import hashlib
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
from bam_ray.families import Family, Role, family_of
from bam_ray.upcycling.expressions import Take, aligned
from bam_ray.upcycling.write import Planned

# What may differ between copies of one model without any effect on its weights' meaning
INDIFFERENT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
TOKENIZER = "tokenizer.json"
SAMPLED = 4  # matrices that are looked at to tell a branch from an unrelated model,
SAMPLED_ELEMENTS = 1 << 18  # so many elements of each:
UNRELATED = 0.1  # a cosine that chance hardly reaches, and training hardly leaves


def check_sources(sources: Mapping[str, TensorReader]) -> Family:
    """Raise `UpcycleError` where a source does not fit the first one (the seed); returns their family."""
    seed_name, seed = next(iter(sources.items()))
    family = family_of(seed.config, seed.uri)
    for name, source in sources.items():
        check_config(source, name, seed.config, seed_name)
        check_tensors(source, family)
        for tensor in family.tensor_names(seed.config):
            check_shape(source, tensor, seed.specs[tensor].shape, seed_name)
        check_tokenizer(source, name, seed, seed_name)
    return family


def check_config(source: TensorReader, name: str, seed: Mapping[str, Any], seed_name: str) -> None:
    """Raise `UpcycleError` where a setting of `source` is not the seed's, both as transformers reads them."""
    theirs, ours = ({"model_type": config.get("model_type")} for config in (source.config, seed))
    if theirs == ours:
        family = family_of(dict(seed), seed_name)
        theirs, ours = family.normalize_config(source.config), family.normalize_config(dict(seed))
    for key in sorted((ours.keys() | theirs.keys()) - INDIFFERENT):
        if theirs.get(key) != ours.get(key):
            raise UpcycleError(
                f"{source.uri}/config.json: {key} is {theirs.get(key)!r} in {name!r} but {ours.get(key)!r} in "
                f"{seed_name!r}: all branches must come from one seed"
            )


def check_tensors(source: TensorReader, family: Family) -> None:
    """Raise `UpcycleError` where a checkpoint lacks a tensor of its architecture, or has one more."""
    expected = set(family.tensor_names(source.config))
    found = {name for name in source.specs if not family.ignores(name, source.config)}
    for problem, names in (("lacks", expected - found), ("has", found - expected)):
        if names:
            raise UpcycleError(
                f"{source.uri} {problem} {min(names)}: {len(names)} tensors do not fit {family.model_type}"
            )


def check_shape(source: TensorReader, tensor: str, shape: tuple[int, ...], seed_name: str) -> None:
    """Raise `UpcycleError` where a tensor has not the seed's shape."""
    theirs = source.specs[tensor].shape
    if theirs != shape:
        raise UpcycleError(f"{source.uri}: {tensor} has shape {list(theirs)} but {list(shape)} in {seed_name!r}")


def check_tokenizer(source: TensorReader, name: str, seed: TensorReader, seed_name: str) -> None:
    """Raise `UpcycleError` where a source has another tokenizer than the seed."""
    theirs, ours = source.read_file(TOKENIZER), seed.read_file(TOKENIZER)
    if _digest(theirs) != _digest(ours):
        raise UpcycleError(
            f"{source.uri}/{TOKENIZER} of {name!r} {_what(theirs)} but that of {seed_name!r} {_what(ours)}: "
            "tokens must mean the same to all models"
        )


def check_seed(sources: Mapping[str, TensorReader], family: Family) -> None:
    """Raise `UpcycleError` where a branch's weights have nothing of the seed's (the first source's).

    Looks at the beginning of a few FFN matrices: the cosine of a model with one trained from it is near 1, with an
    unrelated one, which may well have the same configuration, near 0.
    """
    seed_name, seed = next(iter(sources.items()))
    ups = [place.name for place in family.parameters(seed.config) if place.role is Role.UP]
    names = ups[:: max(1, len(ups) // SAMPLED)]

    def sample(source: TensorReader, name: str) -> Tensor:
        return next(source.chunks(name, 0, min(source.specs[name].elements, SAMPLED_ELEMENTS))).float()

    for branch, source in sources.items():
        cosines = [float(torch.cosine_similarity(sample(seed, name), sample(source, name), dim=0)) for name in names]
        mean = sum(cosines) / len(cosines)
        if mean < UNRELATED:
            raise UpcycleError(
                f"{source.uri}: {names[0]} of {branch!r} has nothing of {seed_name!r} (cosine {mean:.2f}; 1 is the "
                "same): branches must come from one seed (same_seed=false lets it pass)"
            )


@dataclass(frozen=True)
class Drift:
    """How far one branch is from the seed: ‖branch - seed‖ / ‖seed‖ over a layer's tensors; None: all others."""

    by_layer: dict[int | None, float]
    seconds: float
    bytes: int

    @property
    def largest(self) -> float:
        """Of any layer."""
        return max(self.by_layer.values())


def drift(seed: TensorReader, branch: TensorReader, family: Family) -> Drift:
    """Read both models once, chunk by chunk, and compare them layer by layer."""
    started = time.perf_counter()
    sums: dict[int | None, list[float]] = defaultdict(lambda: [0.0, 0.0])
    read = 0
    layer_of = {place.name: place.layer for place in family.parameters(seed.config)}
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
    """What an upcycle will take. Bytes; `memory` is beyond what the process itself needs."""

    read: int
    written: int
    memory: int


def estimate(planned: Planned, sources: Mapping[str, TensorReader]) -> Estimate:
    """Bytes read and written, and the largest group of whole tensors that is held at once."""
    outputs = [*planned.outputs, *planned.routers]
    return Estimate(
        read=sum(spec.bytes for source in sources.values() for spec in source.specs.values()),
        written=sum(output.spec.bytes for output in outputs),
        memory=max(output.made.held(sources) for output in outputs),
    )


def _what(data: bytes | None) -> str:
    return "is missing" if data is None else f"has SHA-256 {_digest(data)}"


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()[:12]
