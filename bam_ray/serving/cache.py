"""Keys and values of the requests in flight: one slot a request, in tensors that are allocated once.

The requests being decoded always hold slots 0..B-1, so a step reads a view of the first B slots, and no row is copied
or computed for a slot that is free. When a request leaves, the last one moves into its slot.

The shapes of keys and values are taken from the first update of each layer: a mixture with one set of key-value heads
an expert stores more heads than its configuration names.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Window:
    """What the next forward pass writes: a prompt into one slot, or one token into each of the first slots."""

    slot: int | None = None
    rows: Tensor | None = None  # [B], 0..B-1
    positions: Tensor | None = None  # [B], where each row writes
    length: int = 0  # of the keys that are read


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [slots, heads, max_length, head_dim]."""

    is_sliding = False

    def __init__(self, slots: int, max_length: int, window: _Window) -> None:
        super().__init__()
        self._slots, self._max_length, self._window = slots, max_length, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: masked positions are multiplied by 0, and 0 × NaN of unwritten memory is NaN
        self.keys, self.values = (
            states.new_zeros(self._slots, states.shape[1], self._max_length, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self._window
        if window.slot is not None:  # a prompt, [1, heads, L, head_dim]: it attends to itself alone
            length = key_states.shape[2]
            self.keys[window.slot, :, :length] = key_states[0]
            self.values[window.slot, :, :length] = value_states[0]
            return key_states, value_states
        # one token a row, [B, heads, 1, head_dim]
        self.keys[window.rows, :, window.positions] = key_states[:, :, 0]
        self.values[window.rows, :, window.positions] = value_states[:, :, 0]
        batch = key_states.shape[0]
        return self.keys[:batch, :, : window.length], self.values[:batch, :, : window.length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another."""
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    # A prompt starts from nothing; a decode step brings its own mask, so transformers asks for no sizes then.
    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self._max_length


class SlotCache(Cache):
    """A `transformers` cache over slots. Say what the next forward pass is, then pass it as `cache`."""

    def __init__(self, slots: int, max_length: int) -> None:
        self._window = _Window()
        super().__init__(layer_class_to_replicate=lambda: _SlotLayer(slots, max_length, self._window))

    def prefill(self, slot: int) -> None:
        """The next pass holds one prompt, which goes into `slot`."""
        self._window.slot = slot

    def decode(self, positions: Tensor, length: int) -> None:
        """The next pass holds one token for each of the first slots, at `positions` [B]; `length` keys are read."""
        self._window.slot = None
        self._window.rows = torch.arange(len(positions), device=positions.device)
        self._window.positions, self._window.length = positions, length

    def move(self, source: int, target: int, length: int) -> None:
        """Move one request's keys and values, `length` positions, to another slot."""
        for layer in self.layers:
            layer.move(source, target, length)
