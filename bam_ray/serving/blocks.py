"""Memory in blocks whose lengths are doublings of the shortest one (a buddy system).

A block of order k is `unit * 2**k` tokens long. Its two halves are blocks of order k - 1. A request takes one block for
its whole text, so the keys and values of a request are contiguous and never move to a longer block.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Block(NamedTuple):
    """A range of tokens in memory."""

    start: int
    length: int


@dataclass(frozen=True)
class BlockCounts:
    """The number of free blocks of each order, which is all that decides what fits."""

    unit: int
    free: tuple[int, ...]

    def order_of(self, tokens: int) -> int:
        """Return the order of the shortest blocks of at least `tokens` tokens."""
        return (-(-tokens // self.unit) - 1).bit_length()

    def without(self, tokens: int, blocks: int = 1) -> "BlockCounts | None":
        """Return the counts after taking `blocks` blocks of at least `tokens` tokens; None: they do not fit."""
        order, free = self.order_of(tokens), list(self.free)
        for _ in range(blocks):
            source = next((k for k in range(order, len(free)) if free[k]), None)
            if source is None:
                return None
            free[source] -= 1
            for half in range(order, source):  # one half of each split stays free
                free[half] += 1
        return BlockCounts(self.unit, tuple(free))


class Blocks:
    """An allocator of blocks: it takes the lowest of the shortest free blocks that are long enough.

    Attributes:
        size: The number of tokens of the memory.
        unit: The length of the shortest blocks.
    """

    def __init__(self, tokens: int, longest: int, unit: int) -> None:
        """Create an allocator of which nothing is taken.

        Args:
            tokens: The size of the memory. It is rounded up to whole blocks of the highest order.
            longest: The number of tokens of the longest request, which takes a block of the highest order.
            unit: The least length of the shortest blocks. They are up to twice as long, so that `longest` is hardly
                rounded up.
        """
        orders = max(1, longest // unit).bit_length() - 1
        self.unit = -(-longest // (1 << orders))
        self._free: list[set[int]] = [set() for _ in range(orders + 1)]  # the starts of each order, in units
        top = 1 << orders
        self.size = -(-tokens // (top * self.unit)) * top * self.unit
        self._free[orders] = set(range(0, self.size // self.unit, top))

    @property
    def counts(self) -> BlockCounts:
        """The number of free blocks of each order."""
        return BlockCounts(self.unit, tuple(map(len, self._free)))

    @property
    def used(self) -> int:
        """The number of tokens in blocks that are taken."""
        free = sum(len(starts) << order for order, starts in enumerate(self._free))
        return self.size - free * self.unit

    def take(self, tokens: int) -> Block:
        """Take a block of at least `tokens` tokens. It must fit (`BlockCounts.without`)."""
        order = self.counts.order_of(tokens)
        source = next(k for k in range(order, len(self._free)) if self._free[k])
        start = min(self._free[source])
        self._free[source].remove(start)
        for half in range(order, source):
            self._free[half].add(start + (1 << half))
        return Block(start * self.unit, self.unit << order)

    def release(self, block: Block) -> None:
        """Free a block, and join it with its other half if that is free."""
        start, order = block.start // self.unit, self.counts.order_of(block.length)
        while order + 1 < len(self._free) and start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)
