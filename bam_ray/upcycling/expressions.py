"""Expressions over the tensors of the sources, which compute the tensors of a mixture chunk by chunk.

    Concat(Take("code", "model.layers.0.mlp.gate_proj.weight"), Take("code", "model.layers.0.mlp.up_proj.weight"))
    Mean((Take("seed", "model.norm.weight"), Take("code", "model.norm.weight")))

An expression knows its shape and its entry in a lineage, and yields its values as flat pieces in order. Whole tensors,
and concatenations and means of them, never hold more than a chunk of each source in memory. Expressions that pick rows
or columns, redraw neurons or trim changes hold the whole tensors that they work on.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import CHUNK_BYTES, TensorReader
from bam_ray.errors import UpcycleError
from bam_ray.upcycling.averaging import ties
from bam_ray.upcycling.routers.rows import generator

Sources = Mapping[str, TensorReader]
RowSpans = tuple[tuple[int, int], ...]
"""Half-open ranges of rows."""


class Expression(Protocol):
    """A tensor that is computed from tensors of the sources."""

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        ...

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        ...

    def held(self, sources: Sources) -> int:
        """Return the bytes of the whole tensors in memory during evaluation; chunks of `CHUNK_BYTES` do not count."""
        ...

    def origin(self) -> dict[str, Any]:
        """Return the operation and its inputs for the lineage, as plain JSON."""
        ...


@dataclass(frozen=True)
class Take:
    """One tensor of one source, or ranges of its rows. Its values must be finite."""

    source: str
    tensor: str
    rows: RowSpans | None = None

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        first, *rest = sources[self.source].specs[self.tensor].shape
        return (first if self.rows is None else sum(stop - start for start, stop in self.rows), *rest)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        reader = sources[self.source]
        if self.rows is None:
            for piece in reader.chunks(self.tensor):
                yield finite(piece, self, reader)
            return
        spec = reader.specs[self.tensor]
        width = spec.elements // spec.shape[0]
        if spec.bytes <= CHUNK_BYTES:  # read all rows with one request
            tensor = torch.cat(list(reader.chunks(self.tensor)))
            rows = [tensor[start * width : stop * width] for start, stop in self.rows]
            yield finite(torch.cat(rows), self, reader)
            return
        for start, stop in self.rows:
            for piece in reader.chunks(self.tensor, start * width, stop * width):
                yield finite(piece, self, reader)

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return 0

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {"take": f"{self.source}:{self.tensor}"} | ({} if self.rows is None else {"rows": self.rows})


@dataclass(frozen=True)
class Slice:
    """The rows [first, last) of one expert's slice of a stacked tensor: [N, rows, ...] -> [last - first, ...]."""

    source: str
    tensor: str
    expert: int
    first: int
    last: int

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return (self.last - self.first, *sources[self.source].specs[self.tensor].shape[2:])

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        reader = sources[self.source]
        _, rows, *rest = reader.specs[self.tensor].shape
        width = math.prod(rest)
        start = self.expert * rows
        return reader.chunks(self.tensor, (start + self.first) * width, (start + self.last) * width)

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return 0

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {"slice": f"{self.source}:{self.tensor}", "expert": self.expert, "rows": [self.first, self.last]}


def finite(piece: Tensor, take: Take, reader: TensorReader) -> Tensor:
    """Return `piece`; raise `UpcycleError` if a value is not finite."""
    # A sum takes one pass at the speed of memory. It is not finite if a value is not, or if it overflows: only then
    # each value is checked.
    if not piece.sum().isfinite() and not piece.isfinite().all():
        raise UpcycleError(
            f"{reader.uri}: {take.tensor} of {take.source!r} has values that are not finite: the "
            "checkpoint is damaged or its training diverged, use another one"
        )
    return piece


@dataclass(frozen=True)
class Concat:
    """A concatenation along the rows, or with `stacked` along a new first dimension (of parts of equal shape)."""

    parts: tuple[Expression, ...]
    stacked: bool = False

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        shapes = [part.shape(sources) for part in self.parts]
        if self.stacked:
            assert len(set(shapes)) == 1, shapes
            return (len(shapes), *shapes[0])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        return chain.from_iterable(part.pieces(sources) for part in self.parts)

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return max(part.held(sources) for part in self.parts)

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {"stack" if self.stacked else "concat": [part.origin() for part in self.parts]}


@dataclass(frozen=True)
class Mean:
    """A weighted mean, computed in fp32. Without weights it is uniform."""

    parts: tuple[Expression, ...]
    weights: tuple[float, ...] | None = None

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.parts[0].shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        shares = self.weights or (1.0,) * len(self.parts)
        total = sum(shares)
        for pieces in aligned([part.pieces(sources) for part in self.parts]):
            mean = pieces[0].float() * (shares[0] / total)
            for piece, share in zip(pieces[1:], shares[1:], strict=True):
                mean.add_(piece.float(), alpha=share / total)
            yield mean

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return sum(part.held(sources) for part in self.parts)

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        weights = {} if self.weights is None else {"weights": self.weights}
        return {"mean": [part.origin() for part in self.parts], **weights}


@dataclass(frozen=True, eq=False)
class RowMean:
    """A mean with weights of its own for each row, computed in fp32.

    `weights` is fp32 [parts, rows], and the weights of a row sum to 1. `tokens` is the number of tokens of each part's
    text, from which the weights come. Where all parts are equal, the mean has exactly their values.
    """

    parts: tuple[Expression, ...]
    weights: Tensor
    tokens: tuple[int, ...]

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.parts[0].shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        width = math.prod(self.shape(sources)[1:])
        start = 0
        for first, *others in aligned([part.pieces(sources) for part in self.parts]):
            stop = start + first.numel()
            row = start // width
            rows = slice(row, -(-stop // width))
            values = slice(start - row * width, stop - row * width)
            origin = first.float()
            mean = origin.clone()
            for other, weights in zip(others, self.weights[1:], strict=True):
                mean.addcmul_(other.float() - origin, weights[rows].repeat_interleave(width)[values])
            yield mean
            start = stop

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return self.weights.nbytes + sum(part.held(sources) for part in self.parts)

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {"row_mean": [part.origin() for part in self.parts], "token_counts": self.tokens}


def aligned(streams: Sequence[Iterator[Tensor]]) -> Iterator[list[Tensor]]:
    """Yield pieces of several tensors of equal size, cut at the same places, however each stream is cut."""
    rest = [next(stream, None) for stream in streams]
    while all(piece is not None for piece in rest):
        pieces = [piece for piece in rest if piece is not None]
        length = min(piece.numel() for piece in pieces)
        yield [piece[:length] for piece in pieces]
        rest = [
            piece[length:] if piece.numel() > length else next(stream, None)
            for piece, stream in zip(pieces, streams, strict=True)
        ]
    assert all(piece is None for piece in rest), "tensors of different sizes"


@dataclass(frozen=True)
class Scaled:
    """An expression multiplied by a constant, computed in fp32."""

    part: Expression
    factor: float

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.part.shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        return (piece.float() * self.factor for piece in self.part.pieces(sources))

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return self.part.held(sources)

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {"scaled": self.part.origin(), "factor": self.factor}


@dataclass(frozen=True)
class Pick:
    """The rows (`dim` 0) or columns (1) of a matrix at `index`. It holds the whole tensor.

    `label` describes in the lineage what was picked.
    """

    part: Expression
    index: tuple[int, ...]
    dim: int
    label: str

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        shape = list(self.part.shape(sources))
        shape[self.dim] = len(self.index)
        return tuple(shape)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        yield whole(self.part, sources).index_select(self.dim, torch.tensor(self.index)).flatten()

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return 4 * math.prod(self.part.shape(sources)) * 2

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {"pick": self.part.origin(), "dim": self.dim, "which": self.label}


@dataclass(frozen=True)
class Redrawn:
    """A tensor whose rows (`dim` 0) or columns (1) at `index` are redrawn (Drop-Upcycling, arXiv 2502.19261).

    They are drawn from a normal distribution with the mean and standard deviation of the values that they replace. The
    draw depends only on `seed` and `label`, not on other draws. It holds the whole tensor.
    """

    part: Expression
    index: tuple[int, ...]
    dim: int
    seed: int
    label: str

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.part.shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        tensor = whole(self.part, sources).clone()
        index = torch.tensor(self.index)
        dropped = tensor.index_select(self.dim, index).float()
        std, mean = torch.std_mean(dropped, correction=0)
        fresh = torch.randn(dropped.shape, generator=generator(self.seed, self.label)) * std + mean
        yield tensor.index_copy_(self.dim, index, fresh.to(tensor.dtype)).flatten()

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return 4 * math.prod(self.part.shape(sources)) * 2

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {
            "redrawn": self.part.origin(),
            "dim": self.dim,
            "count": len(self.index),
            "seed": self.seed,
            "label": self.label,
        }


@dataclass(frozen=True)
class Ties:
    """The seed plus the TIES-merged changes of the branches to it. It holds the whole tensors."""

    seed: Expression
    branches: tuple[Expression, ...]
    density: float
    scale: float

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.seed.shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        seed, *branches = (whole(part, sources).flatten().float() for part in (self.seed, *self.branches))
        yield ties(seed, branches, self.density, self.scale)

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return 4 * math.prod(self.shape(sources)) * (len(self.branches) + 3)

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        merged = [branch.origin() for branch in self.branches]
        return {"ties": merged, "onto": self.seed.origin(), "density": self.density, "scale": self.scale}


@dataclass(frozen=True)
class Draw:
    """A new tensor, normal with standard deviation `std`, or zeros if it is 0.

    The draw depends only on `seed` and `label`, not on the order of draws.
    """

    sizes: tuple[int, ...]
    std: float
    seed: int
    label: str

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.sizes

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        yield (torch.randn(self.sizes, generator=generator(self.seed, self.label)) * self.std).flatten()

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return 4 * math.prod(self.sizes)

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return (
            {"new": "normal", "std": self.std, "seed": self.seed, "label": self.label} if self.std else {"new": "zeros"}
        )


@dataclass(frozen=True)
class Counted:
    """The counts of the text of all experts."""

    counts: Tensor
    models: tuple[str, ...]

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return tuple(self.counts.shape)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        yield from self.counts

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return self.counts.nbytes

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {"new": "counted", "text_of": self.models}


@dataclass(frozen=True)
class Fitted:
    """A router that is fitted after all other tensors of the mixture are written."""

    sizes: tuple[int, ...]
    method: Literal["means", "ridge"]

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.sizes

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Yield the values in row-major order, as flat pieces."""
        raise AssertionError("fitted routers are computed by `fit_routers`")

    def held(self, sources: Sources) -> int:
        """Return the bytes of whole tensors in memory during evaluation."""
        return 4 * math.prod(self.sizes)

    def origin(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        return {"new": "fitted", "how": self.method}


def whole(part: Expression, sources: Sources) -> Tensor:
    """Return all values of an expression, in its shape."""
    pieces = list(part.pieces(sources))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(part.shape(sources))
