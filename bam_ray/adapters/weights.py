"""The weights of one LoRA adapter, as the server and the files know them.

A linear layer with weight W [out, in] and the adapter computes `x Wᵀ + scale · (x Aᵀ) Bᵀ` (arXiv 2106.09685).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


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
        scale: The factor of the change (`lora_alpha / r`, or `lora_alpha / sqrt(r)` with rank-stabilized LoRA).
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
