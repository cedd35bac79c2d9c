"""LoRA modules in a frozen model. peft creates and computes them, so that its users get the same adapters."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bam_ray.adapters.embedders import require_package
from bam_ray.adapters.weights import AdapterWeights, LoraPair
from bam_ray.errors import SettingsError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

NAME = "default"  # peft's name of the only adapter of a module


class LoraModel:
    """A model whose weights are frozen, with one adapter that can be trained.

    Args:
        model: The model. Its linear layers are replaced by those of peft, and its weights are shared with them.
        rank: The rank of the factors.
        alpha: The change is multiplied by `alpha / rank`.
        targets: The ends of the names of the layers, or `all-linear`.

    Raises:
        SettingsError: The model has no such layer, or peft is not installed.
    """

    def __init__(self, model: PreTrainedModel, rank: int, alpha: float, targets: str | Sequence[str]) -> None:
        require_package("peft", "LoRA")
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        chosen = targets if isinstance(targets, str) else list(targets)
        # peft declares alpha as an integer, and computes with any number
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen)  # type: ignore[arg-type]
        try:
            inject_adapter_in_model(config, model, NAME)
        except ValueError as error:  # no layer has such a name, or it is not linear
            raise SettingsError(f"adapters.targets {chosen} does not fit the seed: {error}") from None
        self.model = model
        self.scale = alpha / rank
        self.layers: dict[str, LoraLayer] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }

    @property
    def targets(self) -> tuple[str, ...]:
        """The ends of the names of the layers."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.layers}))

    def reset(self, seed: int) -> None:
        """Set all factors to the start of a training: A is random (as in peft) and B is zero.

        The same seed gives the same values on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.layers.values():
                a, b = _factors(layer)
                start = torch.empty(a.shape)
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                a.copy_(start)
                b.zero_()

    def load(self, weights: AdapterWeights) -> None:
        """Copy an adapter of the same layers, rank and scale into the model."""
        assert weights.pairs.keys() == self.layers.keys() and weights.scale == self.scale, weights.name
        with torch.no_grad():
            for name, layer in self.layers.items():
                a, b = _factors(layer)
                a.copy_(weights.pairs[name].a)
                b.copy_(weights.pairs[name].b)

    def weights(self, name: str, dtype: torch.dtype = torch.float32) -> AdapterWeights:
        """Return a copy of the adapter on the CPU."""

        def copy(factor: Tensor) -> Tensor:
            return factor.detach().to("cpu", dtype, copy=True)

        pairs = {layer: LoraPair(*map(copy, _factors(module))) for layer, module in self.layers.items()}
        return AdapterWeights(name, self.scale, pairs)


def _factors(layer: "LoraLayer") -> tuple[Tensor, Tensor]:
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return a, b
