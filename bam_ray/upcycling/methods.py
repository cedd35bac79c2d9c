"""The consequences of a method's settings: the experts of a mixture, and the operation on each parameter.

The methods themselves are the classes in `bam_ray.settings.methods`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bam_ray.errors import UpcycleError
from bam_ray.families import FFN_ROLES, Role
from bam_ray.model import BamConfig
from bam_ray.settings import AverageSettings, BranchedMixture, MixtureSettings, Operation, RoutedMixture

QUERY_SIDE = frozenset({Role.QUERY, Role.QUERY_BIAS, Role.QUERY_NORM, Role.OUTPUT, Role.OUTPUT_BIAS})
EMBEDDING_ROLES = frozenset({Role.EMBEDDING, Role.HEAD})
KEY_SIDE = frozenset({Role.KEY, Role.KEY_BIAS, Role.KEY_NORM, Role.VALUE, Role.VALUE_BIAS})


@dataclass(frozen=True)
class Expert:
    """The name of an expert, and the source that it is made from."""

    name: str
    source: str


def models_of(sources: Sequence[str], settings: MixtureSettings) -> list[str]:
    """Return the sources that become experts or are averaged: all of them, or all but the first, which is the seed."""
    return list(sources if settings.includes_seed else sources[1:])


def experts_of(sources: Sequence[str], settings: RoutedMixture) -> list[Expert]:
    """Return the experts of a mixture.

    There is one expert per model, followed by copies of the first source (the seed) up to `num_experts`. A mixture
    without an expert of the seed has no copies. A split has `num_experts` slices of the seed instead.

    Raises:
        UpcycleError: `num_experts` is smaller than the number of models, or differs from it without the seed.
    """
    seed, *_ = sources
    models = models_of(sources, settings)
    count = settings.expert_count(len(sources))
    if not settings.includes_seed and count != len(models):
        raise UpcycleError(
            f"num_experts is {count}, but with seed_expert=false each of the {len(models)} branches is one expert: "
            "leave out num_experts"
        )
    if count < len(models):
        raise UpcycleError(
            f"num_experts is {count}, fewer than the {len(models)} models: leave out models or increase num_experts"
        )
    if settings.ffn is Operation.PARTITION:
        return [Expert(f"slice-{number}", seed) for number in range(1, count + 1)]
    copies = [Expert(f"{seed}-{number}", seed) for number in range(2, count - len(models) + 2)]
    return [*(Expert(name, name) for name in models), *copies]


def operation_on(role: Role, settings: MixtureSettings) -> Operation:
    """Return what becomes of a role's tensors in a mixture layer."""
    if role in FFN_ROLES:
        return settings.ffn
    if role in EMBEDDING_ROLES:
        return settings.embedding
    if role in QUERY_SIDE:
        return settings.query
    return settings.key if role in KEY_SIDE else Operation.AVERAGE


def average_of(settings: MixtureSettings) -> AverageSettings:
    """Return how shared parameters are merged. A method without branches has one model and nothing to merge."""
    return settings.average if isinstance(settings, BranchedMixture) else AverageSettings()


def weights_embedding_rows(settings: MixtureSettings) -> bool:
    """Return True if the rows of embedding and output head are weighted by the token counts of each model's text."""
    return isinstance(settings, BranchedMixture) and settings.embeddings == "counts"


def is_plain(config: BamConfig, role: Role, layer: int | None) -> bool:
    """Return True if a mixture stores a role as one tensor under its plain name, not as one slice per expert.

    Keys and values that attention experts share are stored with the stacked tensors, with a first dimension of 1.
    """
    if role in EMBEDDING_ROLES:
        return config.embeddings == "averaged"
    if layer is None or layer not in config.mixture_layers:
        return True
    if role in FFN_ROLES:
        return False
    return role not in QUERY_SIDE | KEY_SIDE or config.attention_experts == "averaged"
