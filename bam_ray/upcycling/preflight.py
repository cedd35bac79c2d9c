"""Pre-flight: whether seed and branches can become one mixture. A mismatch names the place, the key and both values."""

import hashlib

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import UpcycleError
from bam_ray.families import Family, family_of

# What may differ between copies of one model without any effect on its weights' meaning
INDIFFERENT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}


def check_sources(sources: dict[str, TensorReader]) -> Family:
    """Raise `UpcycleError` where a source does not fit the first one (the seed); returns their family."""
    seed_name, seed = next(iter(sources.items()))
    family = family_of(seed.config, seed.uri)
    for name, source in sources.items():
        for key in sorted((seed.config.keys() | source.config.keys()) - INDIFFERENT):
            theirs, ours = source.config.get(key), seed.config.get(key)
            if theirs != ours:
                raise UpcycleError(
                    f"{source.uri}/config.json: {key} is {theirs!r} in {name!r} but {ours!r} in {seed_name!r}: "
                    "all branches must come from one seed"
                )
        expected = set(family.expected(source.config))
        extra = {name for name in source.specs.keys() - expected if not family.ignores(name, source.config)}
        for problem, names in (("lacks", expected - source.specs.keys()), ("has", extra)):
            if names:
                raise UpcycleError(
                    f"{source.uri} {problem} {min(names)}: {len(names)} tensors do not fit {family.model_type}"
                )
        for tensor in sorted(expected):
            shape, seeds = list(source.specs[tensor].shape), list(seed.specs[tensor].shape)
            if shape != seeds:
                raise UpcycleError(f"{source.uri}: {tensor} has shape {shape} but {seeds} in {seed_name!r}")
        if _digest(source.file("tokenizer.json")) != _digest(seed.file("tokenizer.json")):
            raise UpcycleError(f"{source.uri}/tokenizer.json differs from that of {seed_name!r}: they must share one")
    return family


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
