"""The key/value cache of the decode engine: one block of memory for each request, in tensors that are allocated once.

Each layer has one tensor for the keys and one for the values of all requests. A block of L tokens (`blocks.Block`) is a
range of it with the layout [heads, L, head_dim], so its keys are read without a copy. Neighboring blocks of one length
form a run [n, heads, L, head_dim], whose n requests one call of SDPA computes up to the longest of them. Requests of
different lengths therefore do not compute the masked positions of one another.

Each layer takes the shape of its keys and values from its first update, because a mixture with one set of key/value
heads per expert stores more heads than its configuration states.

A model may keep more than keys and values: `SlotCache.rows` has one row of any tensors for each request. A model that
consists of several models has one cache for each of them (`SlotCache.part`), which use the same blocks.

Shapes: B requests, L length of a block, C tokens of a chunk, S number of keys, h head_dim.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bam_ray.model.prefix_bam import RoutingState, SeenTokens
from bam_ray.serving.blocks import Block

SLOT_ATTENTION = "bam_slots"
"""The name of the attention that reads the blocks of a `SlotCache`, in transformers' table of attentions."""


class _Run(NamedTuple):
    """Requests of one forward pass whose blocks are neighbors."""

    rows: slice  # of the batch
    block: Block  # the first one
    keys: int  # S, the number of keys that are read
    mask: Tensor | None  # the keys that each query attends to, bool [B, 1, 1, S] or [1, 1, C, S]


class _Pass:
    """The next forward pass: one chunk of a prompt, or one token of each of B requests."""

    def __init__(self, blocks: Sequence[Block], rows: Sequence[int], positions: Tensor, lengths: Sequence[int]) -> None:
        """Describe a forward pass.

        Args:
            blocks: The block of each request.
            rows: The row of each request in `SlotRows`.
            positions: The positions of the tokens of the pass, [B, 1] or [1, C].
            lengths: The number of tokens that each request has before the pass.
        """
        self.blocks, self.positions, self.lengths = blocks, positions, lengths
        self.rows = torch.tensor(rows, device=positions.device)
        self.chunk = positions.shape[1]
        self.begins = not lengths[0] and len(blocks) == 1  # a prompt that attends only to the chunk itself
        self.runs = [*self._runs()]
        self._targets: dict[int, Tensor] = {}

    def _runs(self) -> Iterator[_Run]:
        first = 0
        for row in range(1, len(self.blocks) + 1):
            before = self.blocks[row - 1]
            if row == len(self.blocks) or self.blocks[row] != Block(before.start + before.length, before.length):
                yield self._run(slice(first, row))
                first = row

    def _run(self, rows: slice) -> _Run:
        lengths = self.lengths[rows]
        keys = max(lengths) + self.chunk
        mask = None
        if self.chunk > 1 or min(lengths) < max(lengths):
            places = torch.arange(keys, device=self.positions.device)
            mask = (places <= self.positions[rows].unsqueeze(2)).unsqueeze(1)  # [B, 1, 1, S] or [1, 1, C, S]
        return _Run(rows, self.blocks[rows.start], keys, mask)

    def targets(self, heads: int) -> Tensor:
        """Return the index of the new keys of B requests among vectors of h numbers, [B · heads]."""
        if heads not in self._targets:
            device = self.positions.device
            starts, lengths = (torch.tensor(each, device=device) for each in zip(*self.blocks, strict=True))
            base = starts.unsqueeze(1) * heads + self.positions  # [B, 1]
            step = torch.arange(heads, device=device) * lengths.unsqueeze(1)  # [B, heads]
            self._targets[heads] = (base + step).flatten()
        return self._targets[heads]


class _SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, [tokens · heads, h] each."""

    is_sliding = False

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory of all requests."""
        # Zeros instead of uninitialized memory: masked positions are multiplied by 0, and 0 × NaN is NaN
        self.heads = key_states.shape[1]
        self.keys, self.values = (
            states.new_zeros(self._cache.tokens * self.heads, states.shape[-1]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, heads, C, h], and return them. `attend` reads the others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self._cache.now
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if now.chunk > 1:
                self._view(stored, now.blocks[0])[0, :, now.lengths[0] : now.lengths[0] + now.chunk] = new[0]
            else:
                stored.index_copy_(0, now.targets(self.heads), new.flatten(0, 2))
        return key_states, value_states

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Return the attention of `query` [B, query heads, C, h] over the stored keys, [B, C, query heads, h].

        `key` and `value` [B, heads, C, h] are those that the last `update` has stored.
        """
        now = self._cache.now
        if now.begins:
            out: Tensor = sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0]
            return out
        outs = []
        for rows, block, keys, mask in now.runs:
            count = rows.stop - rows.start
            read = (self._view(stored, block, count)[:, :, :keys] for stored in (self.keys, self.values))
            outs.append(sdpa_attention_forward(module, query[rows], *read, mask, scaling=scaling)[0])
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def views(self, block: Block, length: int) -> Iterator[Tensor]:
        """Yield the keys and the values of the first `length` tokens of a block, [heads, length, h] each."""
        if self.is_initialized:
            for stored in (self.keys, self.values):
                yield self._view(stored, block)[0, :, :length]

    def _view(self, stored: Tensor, first: Block, count: int = 1) -> Tensor:
        """Return neighboring blocks, [count, heads, L, h]."""
        rows = stored[first.start * self.heads : (first.start + count * first.length) * self.heads]
        return rows.view(count, self.heads, first.length, stored.shape[1])

    # transformers uses these sizes to build masks, which the attention over slots does not need
    def get_seq_length(self) -> int:
        """Return 0, because requests have different lengths."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys and their offset for a prompt of `query_length` tokens."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return the number of tokens of all requests."""
        return self._cache.tokens


class SlotRows:
    """Tensors with one row for each request, which are allocated by the first write.

    A write takes effect with `commit`, so that a forward pass that fails can be repeated.

    A row is the state of a request after its newest token. With an `interval`, the state after each `interval` tokens
    of a block is stored, too: a request that begins with the same tokens can continue from there.
    """

    def __init__(self, cache: "SlotCache", interval: int) -> None:
        """Create rows; `interval` 0 stores only the newest state of each request."""
        self._cache = cache
        self._interval = interval
        self._stored: tuple[Tensor, ...] = ()  # [rows, ...] each; those after the row of each request are for intervals
        self._written: tuple[Tensor, ...] = ()  # [B, ...] each

    def read(self) -> tuple[Tensor, ...] | None:
        """Return the rows of the requests of the pass, [B, ...] each; None: a prompt begins."""
        now = self._cache.now
        return None if now.begins or not self._stored else tuple(each[now.rows] for each in self._stored)

    def write(self, rows: Sequence[Tensor]) -> None:
        """Set the rows of the requests of the pass, [B, ...] each."""
        self._written = tuple(rows)

    def commit(self) -> None:
        """Store the rows that the last forward pass has written, if any."""
        written, self._written = self._written, ()
        if not written:
            return
        if not self._stored:
            rows = self._cache.max_rows + (self._cache.tokens // self._interval if self._interval else 0)
            self._stored = tuple(each.new_zeros(rows, *each.shape[1:]) for each in written)
        now = self._cache.now
        for stored, new in zip(self._stored, written, strict=True):
            stored[now.rows] = new
        if self._interval:
            for index, (block, before) in enumerate(zip(now.blocks, now.lengths, strict=True)):
                length = before + now.chunk
                if not length % self._interval:
                    for stored, new in zip(self._stored, written, strict=True):
                        stored[self._states(block, length).stop - 1] = new[index]

    def copy(self, source: int, target: int) -> None:
        """Copy a row to another."""
        for stored in self._stored:
            stored[target] = stored[source]

    @property
    def interval(self) -> int:
        """The number of tokens after which the state of a block is stored; 0: there are no such states."""
        return self._interval if self._stored else 0

    def restore(self, row: int, block: Block, length: int) -> None:
        """Set a row to the state after the first `length` tokens of a block, a multiple of `interval`."""
        for stored in self._stored:
            stored[row] = stored[self._states(block, length).stop - 1]

    def views(self, block: Block, length: int) -> Iterator[Tensor]:
        """Yield the states of the first `length` tokens of a block, [length // interval, ...] each."""
        for stored in self._stored if self._interval else ():
            yield stored[self._states(block, length)]

    def _states(self, block: Block, length: int) -> slice:
        first = self._cache.max_rows + block.start // self._interval
        return slice(first, first + length // self._interval)


class _SlotRoutingState(RoutingState):
    """The state of routers that read the prefix, in the rows of a cache."""

    def __init__(self, rows: SlotRows) -> None:
        super().__init__()
        self._rows = rows

    def read(self) -> SeenTokens | None:
        """Return the state of the requests of the pass; None: a prompt begins."""
        rows = self._rows.read()
        return None if rows is None else SeenTokens(*rows)

    def write(self, seen: SeenTokens) -> None:
        """Store the state of the requests of the pass."""
        self._rows.write(seen)


class SlotCache(Cache):
    """A `transformers` cache made of blocks. Call `prefill` or `decode` before each forward pass, and `commit` after.

    The model must run with the attention `SLOT_ATTENTION` and pass the cache to it (`slot_attention`).

    Attributes:
        rows: The tensors that the model keeps for each request besides keys and values.
        max_rows: The number of requests.
        tokens: The number of tokens of all requests.
    """

    now: _Pass

    def __init__(self, max_rows: int, tokens: int, interval: int = 0) -> None:
        """Create a cache whose memory is allocated by the first forward pass.

        Args:
            max_rows: The number of requests.
            tokens: The number of tokens of all requests.
            interval: The number of tokens after which the rows of a block are stored, too (`SlotRows`). Longer blocks
                must start at multiples of it.
        """
        self.max_rows, self.tokens = max_rows, tokens
        self._parts: list[SlotCache] = []
        self.rows = SlotRows(self, interval)
        super().__init__(layer_class_to_replicate=lambda: _SlotLayer(self))

    def part(self, index: int) -> "SlotCache":
        """Return the cache of one model of several, which has the same blocks and rows."""
        while len(self._parts) <= index:
            self._parts.append(SlotCache(self.max_rows, self.tokens))
        self._parts[index].now = self.now
        return self._parts[index]

    def new_routing_state(self) -> RoutingState:
        """Return the state of routers that read the prefix, which the model adds to the layers."""
        return _SlotRoutingState(self.rows)

    def prefill(self, block: Block, row: int, positions: Tensor, length: int) -> None:
        """Make the next forward pass compute a chunk of a prompt.

        Args:
            block: The block of the request.
            row: The row of the request.
            positions: The positions of the chunk, int64 [1, C].
            length: The first of them.
        """
        self.now = _Pass([block], [row], positions, [length])

    def decode(self, blocks: Sequence[Block], rows: Sequence[int], positions: Tensor, lengths: Sequence[int]) -> None:
        """Make the next forward pass compute one token of each of B requests.

        Args:
            blocks: Their blocks; those of one length are best in ascending order.
            rows: Their rows.
            positions: The positions of the tokens, int64 [B, 1].
            lengths: The same positions.
        """
        self.now = _Pass(blocks, rows, positions, lengths)

    def commit(self) -> None:
        """Store the rows that the last forward pass has written. Keys and values are stored at once."""
        for each in (self, *self._parts):
            each.rows.commit()

    def copy(self, source: Block, target: Block, length: int) -> None:
        """Copy the first `length` tokens of a block to another one, which may have another length."""
        overlap = source.start < target.start + target.length and target.start < source.start + source.length
        for old, new in zip(self._views(source, length), self._views(target, length), strict=True):
            new.copy_(old.clone() if overlap else old)

    def exchange(self, first: Block, second: Block, lengths: tuple[int, int]) -> None:
        """Exchange the first `lengths` tokens of two blocks that do not overlap."""
        pairs = [[self._views(block, length) for block in (first, second)] for length in lengths]
        for from_first, to_second, to_first, from_second in zip(*pairs[0], *pairs[1], strict=True):
            held = from_second.clone()
            to_second.copy_(from_first)
            to_first.copy_(held)

    def zero(self, block: Block) -> None:
        """Set a block to zeros."""
        for view in self._views(block, block.length):
            view.zero_()

    def reusable(self, length: int) -> int:
        """Return how many of the first `length` tokens of a block another request can continue."""
        interval = self.rows.interval
        return length // interval * interval if interval else length

    def end_of_pass(self, length: int) -> int:
        """Return the token up to which a forward pass that begins after `length` tokens may go, to store its rows."""
        interval = self.rows.interval
        return length // interval * interval + interval if interval else sys.maxsize

    def _views(self, block: Block, length: int) -> Iterator[Tensor]:
        """Yield all that is stored of the first `length` tokens of a block."""
        for each in (self, *self._parts):
            for layer in each.layers:
                if isinstance(layer, _SlotLayer):
                    yield from layer.views(block, length)
            yield from each.rows.views(block, length)

    def copy_row(self, source: int, target: int) -> None:
        """Copy the row of a request to another."""
        for each in (self, *self._parts):
            each.rows.copy(source, target)

    def restore(self, row: int, block: Block, length: int) -> None:
        """Set the row of a request to that after the first `length` tokens of its block (`reusable`)."""
        if self.rows.interval:
            self.rows.restore(row, block, length)


def _attend_to_slots(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    slots: SlotCache,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention over the blocks of a cache, as transformers calls it."""
    return slots.layers[module.layer_idx].attend(module, query, key, value, scaling), None


AttentionInterface.register(SLOT_ATTENTION, _attend_to_slots)


@contextmanager
def slot_attention(model: nn.Module) -> Iterator[None]:
    """Make all models in `model` use the attention over slots, and restore their attention afterwards.

    Forward passes must be called with `slots`, the `SlotCache` that is also their cache.
    """
    configs = [vars(each.config) for each in (model, *getattr(model, "members", ()))]
    name = "_attn_implementation_internal"  # the setter of the property costs 3 % of a step of a small model
    before = [config[name] for config in configs]
    try:
        for config in configs:
            config[name] = SLOT_ATTENTION
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config[name] = implementation
