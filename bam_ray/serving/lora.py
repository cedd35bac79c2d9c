"""LoRA adapters in the decode engine: each row of a batch may have another one.

`LoraSlots` replaces the linear layers of a dense model once by layers that add the change of the adapters. The factors
of the adapters are in adapter slots: tensors that are allocated once, with one place for each adapter. Adapter slot 0
has no change, so it stands for the base model.

For rows that decode, each layer reads the factors of each row where they are, as two weighted sums of rows of its
tensors (`embedding_bag`). Nothing is gathered or padded, adapters in the batch may all differ, and the result of a row
does not depend on the others. The chunk of a prompt has one adapter, so two matrix products compute it.

Lower bound of the memory traffic of a step beside that of the base model: the factors of the batch's adapters once.

Shapes: S adapter slots, R largest rank, B rows of a batch, T tokens of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bam_ray.adapters.weights import AdapterWeights, LoraPair, check_pairs
from bam_ray.errors import CheckpointError, ServingError

BASE_SLOT = 0
"""The slot of the base model."""


@dataclass(frozen=True)
class SlotAdapter:
    """An adapter that is in a slot.

    Attributes:
        key: The identity of its weights. Keys and values that were computed with it are of no use to another one.
        slot: Its slot.
    """

    key: str
    slot: int = field(compare=False)


class LoraBatch:
    """The slots of the rows of the next forward pass, which all layers read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.slots: tuple[int, ...] = ()
        self.is_base = True
        self._indices: dict[int, Tensor] = {}

    def select(self, slots: Sequence[int]) -> None:
        """Set the slot of each request of the next forward pass."""
        if self.slots != (now := tuple(slots)):
            self.slots, self.is_base = now, not any(now)
            self._indices = {}

    def indices(self, size: int) -> Tensor:
        """Return the rows that belong to each slot of the batch in a tensor [S · size, ...], int64 [B, size]."""
        if size not in self._indices:
            first = torch.tensor(self.slots, device=self._device).unsqueeze(1) * size
            self._indices[size] = first + torch.arange(size, device=self._device)
        return self._indices[size]


class LoraLinear(nn.Module):
    """A linear layer that adds the changes of adapters.

    Attributes:
        base: The layer without adapters.
        a: The first factors, transposed, [S, in, R].
        b: The second factors with the scale, transposed, [S, R, out].
        used: The slots whose adapters change this layer.
    """

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Linear, slots: int, rank: int, batch: LoraBatch) -> None:
        """Create a layer that adds to the output of `base`."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.register_buffer("a", base.weight.new_zeros(slots, base.in_features, rank), persistent=False)
        self.register_buffer("b", base.weight.new_zeros(slots, rank, base.out_features), persistent=False)
        self.used: set[int] = set()
        self._batch = batch

    def forward(self, input: Tensor) -> Tensor:
        """Return the output for `input` [B, 1, in] or [1, T, in]."""
        output: Tensor = self.base(input)
        batch = self._batch
        if batch.is_base or not self.used:
            return output
        if len(batch.slots) * self.in_features != input.numel():
            (slot,) = batch.slots
            return output + input @ self.a[slot] @ self.b[slot]
        x = input.reshape(-1, self.in_features)
        rank = self.b.shape[1]
        hidden = F.embedding_bag(
            batch.indices(self.in_features), self.a.view(-1, rank), mode="sum", per_sample_weights=x
        )
        change = F.embedding_bag(
            batch.indices(rank), self.b.view(-1, self.out_features), mode="sum", per_sample_weights=hidden
        )
        return output + change.view_as(output)

    def write(self, slot: int, pair: LoraPair | None, scale: float) -> None:
        """Set the factors of a slot. None: its adapter does not change this layer."""
        if pair is None:
            for factor in (self.a, self.b):  # both, because the product of 0 and NaN is NaN
                factor[slot].zero_()
            self.used.discard(slot)
            return
        rank = len(pair.a)
        self.a[slot, :, :rank] = pair.a.T.to(self.a)
        self.a[slot, :, rank:].zero_()
        self.b[slot, :rank] = scale * pair.b.T.to(self.b)
        self.b[slot, rank:].zero_()
        self.used.add(slot)


class LoraSlots:
    """The adapters that a model can use at the same time.

    Attributes:
        slots: The number of adapters. Their slots are 1 to `slots`.
        max_rank: The largest rank of an adapter. Those of lower rank use the memory of this one.
        shapes: The shape [out, in] of each linear layer that adapters may change, by name.
    """

    def __init__(self, model: nn.Module, slots: int, max_rank: int) -> None:
        """Replace the linear layers of a dense model, all but the output head.

        Raises:
            ServingError: The model is a mixture, or has no linear layers.
        """
        base: Any = model
        head = base.get_output_embeddings()
        layers = {name: each for name, each in model.named_modules() if type(each) is nn.Linear and each is not head}
        if not layers or getattr(base.config, "num_experts", None):
            raise ServingError(
                f"{base.config.model_type} has no adapters: serve adapters with the dense model that they were made for"
            )
        self.slots, self.max_rank = slots, max_rank
        self.shapes = {name: (each.out_features, each.in_features) for name, each in layers.items()}
        self._batch = LoraBatch(base.device)
        self._layers: dict[str, LoraLinear] = {}
        for name, layer in layers.items():
            self._layers[name] = LoraLinear(layer, slots + 1, max_rank, self._batch)
            model.set_submodule(name, self._layers[name])

    @property
    def slot_bytes(self) -> int:
        """The memory of one slot in bytes."""
        return sum(each[0].nbytes for layer in self._layers.values() for each in (layer.a, layer.b))

    def select(self, slots: Sequence[int]) -> None:
        """Set the slot of each request of the next forward pass, which is one chunk or one token of each."""
        self._batch.select(slots)

    def check(self, weights: AdapterWeights) -> None:
        """Raise `CheckpointError` if an adapter does not fit the model or the slots."""
        check_pairs(f"adapter {weights.name}", weights.pairs, self.shapes)
        rank = max(len(pair.a) for pair in weights.pairs.values())
        if rank > self.max_rank:
            raise CheckpointError(
                f"adapter {weights.name} has rank {rank}, above {self.max_rank}: raise serve.adapters.max_rank"
            )

    @torch.inference_mode()
    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter that `check` accepts to a slot, which no request may use."""
        assert 1 <= slot <= self.slots
        for name, layer in self._layers.items():
            layer.write(slot, weights.pairs.get(name), weights.scale)
