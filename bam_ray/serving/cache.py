"""The key/value cache: one slot per active request, in tensors that are allocated once.

The active requests always occupy slots 0..B-1. A decode step therefore reads a view of the first B slots: it copies no
rows and computes nothing for free slots. When a request leaves, the last request moves into its slot.

Each layer takes the shape of its keys and values from its first update, because a mixture with one set of key/value
heads per expert stores more heads than its configuration states.

A model may keep more than keys and values: `SlotCache.rows` has one row of any tensors for each slot. A model that
consists of several models has one cache for each of them (`SlotCache.part`), whose slots move together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bam_ray.model.prefix_bam import RoutingState, SeenTokens


@dataclass
class _CacheWrite:
    """The target of the next forward pass: one slot for a prompt, or one position in each active slot."""

    slot: int | None = None  # None: a decode step
    first: int = 0  # the first of the B slots of a decode step
    rows: Tensor | None = None  # [B], these slots
    positions: Tensor | None = None  # [B], the position that each row writes
    length: int = 0  # number of keys that are read


class _SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, [slots, heads, max_length, head_dim]."""

    is_sliding = False

    def __init__(self, slots: int, max_length: int, write: _CacheWrite) -> None:
        super().__init__()
        self._slots, self._max_length, self._write = slots, max_length, write

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all slots."""
        # Zeros instead of uninitialized memory: masked positions are multiplied by 0, and 0 × NaN is NaN
        self.keys, self.values = (
            states.new_zeros(self._slots, states.shape[1], self._max_length, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return those that the forward pass attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        write = self._write
        if write.slot is not None:  # a prompt, [1, heads, L, head_dim]: it attends to itself only
            length = key_states.shape[2]
            self.keys[write.slot, :, :length] = key_states[0]
            self.values[write.slot, :, :length] = value_states[0]
            return key_states, value_states
        # One token per row, [B, heads, 1, head_dim]
        self.keys[write.rows, :, write.positions] = key_states[:, :, 0]
        self.values[write.rows, :, write.positions] = value_states[:, :, 0]
        slots = slice(write.first, write.first + key_states.shape[0])
        return self.keys[slots, :, : write.length], self.values[slots, :, : write.length]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    # transformers uses the sizes below to build a mask. A prompt starts from an empty cache, and a decode step passes
    # its own mask.
    def get_seq_length(self) -> int:
        """Return 0: a prompt starts from an empty cache."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys and their offset for a prompt of `query_length` tokens."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return the number of positions in a slot."""
        return self._max_length


class SlotRows:
    """Tensors with one row for each slot, which are allocated by the first write.

    A write takes effect with `commit`, so that a forward pass that fails can be repeated.
    """

    def __init__(self, slots: int, write: _CacheWrite) -> None:
        self._slots, self._write = slots, write
        self._stored: tuple[Tensor, ...] = ()  # [slots, ...] each
        self._written: tuple[Tensor, ...] = ()  # [B, ...] each

    def read(self) -> tuple[Tensor, ...] | None:
        """Return the rows of the active slots, [B, ...] each; None: a prompt begins."""
        write = self._write
        if not self._stored or write.rows is None or write.slot is not None:
            return None
        slots = slice(write.first, write.first + len(write.rows))
        return tuple(each[slots] for each in self._stored)

    def write(self, rows: Sequence[Tensor]) -> None:
        """Set the row of a prompt's slot, [1, ...] each, or those of all active slots, [B, ...] each."""
        self._written = tuple(rows)

    def commit(self) -> None:
        """Store the rows that the last forward pass has written, if any."""
        written, self._written = self._written, ()
        if not written:
            return
        if not self._stored:
            self._stored = tuple(each.new_zeros(self._slots, *each.shape[1:]) for each in written)
        first = self._write.first if self._write.slot is None else self._write.slot
        for stored, new in zip(self._stored, written, strict=True):
            stored[first : first + len(new)] = new

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the row of one slot to another."""
        for stored in self._stored:
            stored[target] = stored[source]


class _SlotRoutingState(RoutingState):
    """The state of routers that read the prefix, in the rows of a cache."""

    def __init__(self, rows: SlotRows) -> None:
        super().__init__()
        self._rows = rows

    def read(self) -> SeenTokens | None:
        """Return the state of the active slots; None: a prompt begins."""
        rows = self._rows.read()
        return None if rows is None else SeenTokens(*rows)

    def write(self, seen: SeenTokens) -> None:
        """Store the state of a prompt's slot, or of all active slots."""
        self._rows.write(seen)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Do nothing: the cache copies its rows."""


class SlotCache(Cache):
    """A `transformers` cache made of slots. Call `prefill` or `decode` before each forward pass.

    Attributes:
        rows: What the model keeps for each slot besides keys and values.
    """

    def __init__(self, slots: int, max_length: int, write: _CacheWrite | None = None) -> None:
        """Create a cache whose memory is allocated by the first forward pass.

        Args:
            slots: The number of slots.
            max_length: The number of positions in a slot.
            write: The target of forward passes, for a part of another cache. None: a new one.
        """
        self._write = write or _CacheWrite()
        self._slots, self._max_length = slots, max_length
        self._parts: list[SlotCache] = []
        self.rows = SlotRows(slots, self._write)
        super().__init__(layer_class_to_replicate=lambda: _SlotLayer(slots, max_length, self._write))

    def part(self, index: int) -> "SlotCache":
        """Return the cache of one model of several, which has the same slots."""
        while len(self._parts) <= index:
            self._parts.append(SlotCache(self._slots, self._max_length, self._write))
        return self._parts[index]

    def new_routing_state(self) -> RoutingState:
        """Return the state of routers that read the prefix, which the model adds to the layers."""
        return _SlotRoutingState(self.rows)

    def prefill(self, slot: int) -> None:
        """Make the next forward pass write one prompt into `slot`."""
        self._write.slot = slot

    def decode(self, positions: Tensor, length: int, first: int = 0) -> None:
        """Make the next forward pass write one token in each of B neighboring slots.

        Args:
            positions: The position that each slot writes, [B].
            length: The number of keys that are read.
            first: The first of the slots.
        """
        self._write.slot, self._write.first = None, first
        self._write.rows = torch.arange(first, first + len(positions), device=positions.device)
        self._write.positions, self._write.length = positions, length

    def commit(self) -> None:
        """Store the rows that the last forward pass has written. Keys and values are stored at once."""
        for each in (self, *self._parts):
            each.rows.commit()

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy a request to another slot: its rows, and the first `length` positions of its keys and values."""
        self.rows.copy_slot(source, target)
        for each in (*self.layers, *self._parts):
            each.copy_slot(source, target, length)
