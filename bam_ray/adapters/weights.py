"""The weights of one LoRA adapter, as the server and the files know them.

A linear layer with weight W [out, in] and the adapter computes `x Wᵀ + scale · (x Aᵀ) Bᵀ` (arXiv 2106.09685).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bam_ray.errors import CheckpointError


@dataclass(frozen=True)
class LoraPair:
    """The two factors of the change of one linear layer.

    Attributes:
        a: The factor that is applied first, [r, in].
        b: The factor that is applied second, [out, r].
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter in memory.

    Attributes:
        name: The name of the adapter, which is that of its topic.
        scale: The factor of the change (`lora_scale`).
        pairs: The factors of each linear layer, by the name of the layer in the base model
            (`model.layers.0.self_attn.q_proj`).
    """

    name: str
    scale: float
    pairs: Mapping[str, LoraPair]

    @property
    def bytes(self) -> int:
        """The size of all factors in bytes."""
        return sum(each.nbytes for pair in self.pairs.values() for each in (pair.a, pair.b))


def lora_scale(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """Return the factor of the change of a layer. Rank-stabilized LoRA is that of arXiv 2312.03732."""
    return alpha / (rank**0.5 if rank_stabilized else rank)


def check_pairs(source: str, pairs: Mapping[str, LoraPair], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `CheckpointError` if the factors of an adapter do not fit the linear layers of a base model.

    Args:
        source: The adapter, for the error message.
        pairs: The factors of each linear layer, by name.
        shapes: The shape [out, in] of each linear layer of the base model, by name.
    """
    if not pairs:
        raise CheckpointError(f"{source} changes no layer: train it with target_modules, and save it again")
    for name, pair in pairs.items():
        if name not in shapes:
            raise CheckpointError(
                f"{source} changes {name}, which is no linear layer of the base model: serve it with its own base model"
            )
        fits = pair.a.ndim == pair.b.ndim == 2 and len(pair.a) == pair.b.shape[1] > 0
        if not fits or (len(pair.b), pair.a.shape[1]) != shapes[name]:
            raise CheckpointError(
                f"{source}: the factors of {name} are {[*pair.a.shape]} and {[*pair.b.shape]}, but the layer is "
                f"{[*shapes[name]]}: serve it with its own base model"
            )
