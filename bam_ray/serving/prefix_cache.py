"""The prefix cache: requests whose prompts begin alike share the work of computing keys and values.

The memory of a request that ends is free, but keeps what it holds until another request takes it. A prompt that begins
like the text of such a request, or like the prompt of a running one, takes a copy of the keys and values of the common
tokens. A copy costs a small part of the computation, and blocks stay contiguous.

Requests take the lowest free memory (`Blocks`), which is often the most recently freed. What it holds then moves to the
memory that has been unused for longest, so the least recently used texts are lost first.

Keys and values depend on the model, on the adapter and on the weights of the experts, so only requests that agree in
all of them share (`CachedRequest.cache_key`). The tokens themselves are compared, not hashes of them.
"""

import math
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

import numpy as np

from bam_ray.serving.blocks import Block, Blocks
from bam_ray.serving.cache import SlotCache
from bam_ray.serving.sampling import SamplingParams, SamplingState

FEWEST_TOKENS = 16
"""The least number of tokens that are worth a copy. Nearly all prompts share a first token."""


class CachedRequest(Protocol):
    """The part of a request that the cache reads and changes."""

    prompt: list[int]
    params: SamplingParams
    sampling: SamplingState
    block: Block
    length: int  # the number of tokens whose keys and values are stored
    cached: int  # the number of them that were copied

    @property
    def cache_key(self) -> Hashable:
        """All that keys and values depend on besides tokens."""
        ...


@dataclass(eq=False)
class StoredText:
    """The tokens of a request that has ended, and the block that still has their keys and values."""

    key: Hashable
    tokens: list[int]
    block: Block


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of a prompt, whose keys and values are those of `source`."""

    source: StoredText | CachedRequest
    length: int


class PrefixCache:
    """An allocator of blocks that remembers what free memory holds.

    Attributes:
        enabled: False: nothing is stored or found.
        queries: The number of tokens of all prompts that began while it was enabled.
        hits: The number of them whose keys and values were copied.
    """

    def __init__(self, memory: Blocks, slots: SlotCache) -> None:
        """Create an empty cache.

        Args:
            memory: The allocator, which nothing else may use from now on.
            slots: The keys and values.
        """
        self.enabled = False
        self.queries = self.hits = 0
        self._memory, self._slots = memory, slots
        units = memory.size // memory.unit
        self._last_use = np.zeros(units)  # of each unit of memory; 0: it holds nothing; infinity: it is taken
        self._stored: list[StoredText | None] = [None] * units  # the text in each unit of memory
        self._texts: dict[Hashable, list[StoredText]] = {}  # of each key, in ascending order of their tokens
        self._clock = 0

    def take(self, tokens: int) -> Block:
        """Take a block (`Blocks.take`)."""
        block = self._memory.take(tokens)
        self._vacate(block)
        self._last_use[self._units(block)] = math.inf
        return block

    def release(self, block: Block, key: Hashable = None, tokens: list[int] | None = None) -> None:
        """Free a block, and remember that it has the keys and values of `tokens`.

        Of two texts of which one begins with the other, only the longer one is remembered.
        """
        self._memory.release(block)
        self._last_use[self._units(block)] = 0
        if not self.enabled or tokens is None or len(tokens) < FEWEST_TOKENS:
            return
        texts = self._texts.get(key, [])
        place = bisect_left(texts, tokens, key=attrgetter("tokens"))
        if place < len(texts) and texts[place].tokens[: len(tokens)] == tokens:
            self._touch(texts[place])
            return
        if place and texts[place - 1].tokens == tokens[: len(texts[place - 1].tokens)]:
            place -= 1
            self._drop(texts[place].block)
        text = StoredText(key, tokens, block)
        self._texts.setdefault(key, []).insert(place, text)
        self._place(text, block)
        self._touch(text)

    def clear(self) -> None:
        """Forget all texts. No block may be taken."""
        self._last_use[:] = 0
        self._stored = [None] * len(self._stored)
        self._texts.clear()

    def begin(self, request: CachedRequest, running: Iterable[CachedRequest]) -> Prefix | None:
        """Return the prefix that a request can copy (`copy`) as soon as it has taken its block."""
        if self.enabled:
            self.queries += len(request.prompt)
        return self._find(request, running)

    def extend(self, request: CachedRequest, running: Iterable[CachedRequest]) -> None:
        """Copy a longer prefix to a request whose prompt is not complete, if others have computed one meanwhile."""
        self.copy(self._find(request, running), request)

    def copy(self, prefix: Prefix | None, request: CachedRequest) -> None:
        """Copy the keys and values of a prefix to a request that has fewer tokens."""
        if prefix is None or prefix.length <= request.length:
            return
        if prefix.source.block != request.block:
            self._slots.copy(prefix.source.block, request.block, prefix.length)
        self._slots.restore(request.sampling.row, request.block, prefix.length)
        self.hits += prefix.length - request.length
        request.cached += prefix.length - request.length
        request.length = prefix.length

    def _find(self, request: CachedRequest, running: Iterable[CachedRequest]) -> Prefix | None:
        """Return the longest prefix of a prompt that is stored, or that a running request has computed.

        It never has the last token of the prompt, because the logits after that are needed. A request that needs the
        logits of its whole prompt has no prefix.
        """
        if not self.enabled or request.params.prompt_logprobs is not None:
            return None
        texts = self._texts.get(request.cache_key, [])
        place = bisect_left(texts, request.prompt, key=attrgetter("tokens"))
        # Neighbors in the order of their tokens have the longest common prefixes
        sources: list[tuple[StoredText | CachedRequest, list[int]]] = [
            (text, text.tokens) for text in texts[max(0, place - 1) : place + 1]
        ]
        # A sampled token tells that the keys and values before it are finite
        sources += [
            (each, each.prompt) for each in running if each.sampling.generated and each.cache_key == request.cache_key
        ]
        prefixes = [
            Prefix(source, self._slots.reusable(_common_length(tokens, request.prompt))) for source, tokens in sources
        ]
        found = max(prefixes, key=attrgetter("length"), default=None)
        if found is None or found.length < FEWEST_TOKENS:
            return None
        if isinstance(found.source, StoredText):
            self._touch(found.source)
        return found

    def _vacate(self, block: Block) -> None:
        """Move the texts in a block that has been taken to memory that has been unused for longer, or drop them."""
        first = self._stored[block.start // self._memory.unit]
        if first is not None and first.block.length > block.length:
            block = first.block  # a text cannot be divided, because the tokens of each head are together
        ages = self._last_use.reshape(-1, block.length // self._memory.unit).max(1)  # of all blocks of this length
        oldest = int(ages.argmin())
        if ages[oldest] >= ages[block.start // block.length]:
            self._drop(block)
            return
        target = Block(oldest * block.length, block.length)
        self._drop(target)
        self._slots.copy(block, target, block.length)
        self._last_use[self._units(target)] = self._last_use[self._units(block)]
        self._last_use[self._units(block)] = 0
        for text in self._in(block):
            self._place(None, text.block)
            text.block = Block(text.block.start - block.start + target.start, text.block.length)
            self._place(text, text.block)

    def _drop(self, block: Block) -> None:
        """Forget the texts in a block."""
        for text in self._in(block):
            texts = self._texts[text.key]
            del texts[bisect_left(texts, text.tokens, key=attrgetter("tokens"))]
            if not texts:
                del self._texts[text.key]
            self._place(None, text.block)
            self._last_use[self._units(text.block)] = 0

    def _in(self, block: Block) -> Iterator[StoredText]:
        """Return the texts in a block, in the order of their blocks."""
        return iter(dict.fromkeys(text for text in self._stored[self._units(block)] if text is not None))

    def _place(self, text: StoredText | None, block: Block) -> None:
        """Note that a block has a text."""
        units = self._units(block)
        self._stored[units] = [text] * (units.stop - units.start)

    def _touch(self, text: StoredText) -> None:
        """Note that a text is used now."""
        self._clock += 1
        self._last_use[self._units(text.block)] = self._clock

    def _units(self, block: Block) -> slice:
        unit = self._memory.unit
        return slice(block.start // unit, (block.start + block.length) // unit)


def _common_length(tokens: list[int], prompt: list[int]) -> int:
    """Return the number of tokens with which both lists begin, without the last one of the prompt."""
    low, most = 0, min(len(tokens), len(prompt) - 1)
    while low < most:  # slices are compared at the speed of C
        middle = (low + most + 1) // 2
        if tokens[low:middle] == prompt[low:middle]:
            low = middle
        else:
            most = middle - 1
    return low
