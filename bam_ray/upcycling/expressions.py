"""What a tensor of a mixture is made of: small expressions over tensors of the sources, evaluated chunk by chunk.

    Concat(Take("code", "model.layers.0.mlp.gate_proj.weight"), Take("code", "model.layers.0.mlp.up_proj.weight"))
    Mean((Take("seed", "model.norm.weight"), Take("code", "model.norm.weight")))

An expression knows its shape, what it is called in a lineage, and how to give its values as flat pieces in order.
Whole tensors and their concatenations and means never hold more than a chunk of each source; what picks rows or
columns, redraws or trims holds the whole tensors that it works on.
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
Rows = tuple[tuple[int, int], ...]
"""Half-open ranges of rows."""


class Expression(Protocol):
    """How a tensor is made."""

    def shape(self, sources: Sources) -> tuple[int, ...]:
        """Its shape."""
        ...

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        """Its values in row-major order, as flat pieces."""
        ...

    def held(self, sources: Sources) -> int:
        """Bytes of whole tensors that are held while it is made; chunks of `CHUNK_BYTES` are not counted."""
        ...

    def origin(self) -> dict[str, Any]:
        """For the lineage: the operation and its inputs, as plain JSON."""
        ...


@dataclass(frozen=True)
class Take:
    """One tensor of one source, or ranges of its rows, or (in a stacked tensor) one slice. Values must be finite."""

    source: str
    tensor: str
    rows: Rows | None = None

    def shape(self, sources: Sources) -> tuple[int, ...]:
        first, *rest = sources[self.source].specs[self.tensor].shape
        return (first if self.rows is None else sum(stop - start for start, stop in self.rows), *rest)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        reader = sources[self.source]
        if self.rows is None:
            for piece in reader.chunks(self.tensor):
                yield finite(piece, self, reader)
            return
        spec = reader.specs[self.tensor]
        width = spec.elements // spec.shape[0]
        if spec.bytes <= CHUNK_BYTES:  # one request for all rows
            tensor = torch.cat(list(reader.chunks(self.tensor)))
            rows = [tensor[start * width : stop * width] for start, stop in self.rows]
            yield finite(torch.cat(rows), self, reader)
            return
        for start, stop in self.rows:
            for piece in reader.chunks(self.tensor, start * width, stop * width):
                yield finite(piece, self, reader)

    def held(self, sources: Sources) -> int:
        return 0

    def origin(self) -> dict[str, Any]:
        return {"take": f"{self.source}:{self.tensor}"} | ({} if self.rows is None else {"rows": self.rows})


@dataclass(frozen=True)
class Slice:
    """Rows [first, last) of one expert's slice of a stacked tensor: [N, rows, ...] -> [last - first, ...]."""

    source: str
    tensor: str
    expert: int
    first: int
    last: int

    def shape(self, sources: Sources) -> tuple[int, ...]:
        return (self.last - self.first, *sources[self.source].specs[self.tensor].shape[2:])

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        reader = sources[self.source]
        _, rows, *rest = reader.specs[self.tensor].shape
        width = math.prod(rest)
        start = self.expert * rows
        return reader.chunks(self.tensor, (start + self.first) * width, (start + self.last) * width)

    def held(self, sources: Sources) -> int:
        return 0

    def origin(self) -> dict[str, Any]:
        return {"slice": f"{self.source}:{self.tensor}", "expert": self.expert, "rows": [self.first, self.last]}


def finite(piece: Tensor, take: Take, reader: TensorReader) -> Tensor:
    """`piece`, where all its values are finite; raises `UpcycleError`."""
    # A sum is one pass at the speed of memory, and not finite where a value is not (or where it overflows: look closer)
    if not piece.sum().isfinite() and not piece.isfinite().all():
        raise UpcycleError(
            f"{reader.uri}: {take.tensor} of {take.source!r} holds values that are not finite: "
            "that checkpoint is damaged or its training diverged"
        )
    return piece


@dataclass(frozen=True)
class Concat:
    """One after the other along the rows; with `stacked`, along a new first dimension (all of one shape)."""

    parts: tuple[Expression, ...]
    stacked: bool = False

    def shape(self, sources: Sources) -> tuple[int, ...]:
        shapes = [part.shape(sources) for part in self.parts]
        if self.stacked:
            assert len(set(shapes)) == 1, shapes
            return (len(shapes), *shapes[0])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        return chain.from_iterable(part.pieces(sources) for part in self.parts)

    def held(self, sources: Sources) -> int:
        return max(part.held(sources) for part in self.parts)

    def origin(self) -> dict[str, Any]:
        return {"stack" if self.stacked else "concat": [part.origin() for part in self.parts]}


@dataclass(frozen=True)
class Mean:
    """The weighted mean, computed in fp32; without weights the uniform one."""

    parts: tuple[Expression, ...]
    weights: tuple[float, ...] | None = None

    def shape(self, sources: Sources) -> tuple[int, ...]:
        return self.parts[0].shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        shares = self.weights or (1.0,) * len(self.parts)
        total = sum(shares)
        for group in aligned([part.pieces(sources) for part in self.parts]):
            mean = group[0].float() * (shares[0] / total)
            for piece, share in zip(group[1:], shares[1:], strict=True):
                mean.add_(piece.float(), alpha=share / total)
            yield mean

    def held(self, sources: Sources) -> int:
        return sum(part.held(sources) for part in self.parts)

    def origin(self) -> dict[str, Any]:
        weights = {} if self.weights is None else {"weights": self.weights}
        return {"mean": [part.origin() for part in self.parts], **weights}


def aligned(streams: Sequence[Iterator[Tensor]]) -> Iterator[list[Tensor]]:
    """The pieces of several tensors of one size, cut alike, whatever pieces each comes in."""
    left = [next(stream, None) for stream in streams]
    while all(piece is not None for piece in left):
        pieces = [piece for piece in left if piece is not None]
        length = min(piece.numel() for piece in pieces)
        yield [piece[:length] for piece in pieces]
        left = [
            piece[length:] if piece.numel() > length else next(stream, None)
            for piece, stream in zip(pieces, streams, strict=True)
        ]
    assert all(piece is None for piece in left), "tensors of different sizes"


@dataclass(frozen=True)
class Scaled:
    """A factor on another."""

    part: Expression
    factor: float

    def shape(self, sources: Sources) -> tuple[int, ...]:
        return self.part.shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        return (piece.float() * self.factor for piece in self.part.pieces(sources))

    def held(self, sources: Sources) -> int:
        return self.part.held(sources)

    def origin(self) -> dict[str, Any]:
        return {"scaled": self.part.origin(), "factor": self.factor}


@dataclass(frozen=True)
class Pick:
    """The rows (`dim` 0) or columns (1) at `index`, int64. Holds the whole tensor."""

    part: Expression
    index: tuple[int, ...]
    dim: int
    label: str  # for the lineage: what was picked, in words

    def shape(self, sources: Sources) -> tuple[int, ...]:
        shape = list(self.part.shape(sources))
        shape[self.dim] = len(self.index)
        return tuple(shape)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        yield whole(self.part, sources).index_select(self.dim, torch.tensor(self.index)).flatten()

    def held(self, sources: Sources) -> int:
        return 4 * math.prod(self.part.shape(sources)) * 2

    def origin(self) -> dict[str, Any]:
        return {"pick": self.part.origin(), "dim": self.dim, "which": self.label}


@dataclass(frozen=True)
class Redrawn:
    """Drop-Upcycling (arXiv 2502.19261): rows (`dim` 0) or columns (1) at `index` drawn anew, from a normal
    distribution with the mean and deviation of what they held. Holds the whole tensor.
    """

    part: Expression
    index: tuple[int, ...]
    dim: int
    seed: int
    label: str  # what is drawn, whatever else is

    def shape(self, sources: Sources) -> tuple[int, ...]:
        return self.part.shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        tensor = whole(self.part, sources).clone()
        index = torch.tensor(self.index)
        dropped = tensor.index_select(self.dim, index).float()
        std, mean = torch.std_mean(dropped, correction=0)
        fresh = torch.randn(dropped.shape, generator=generator(self.seed, self.label)) * std + mean
        yield tensor.index_copy_(self.dim, index, fresh.to(tensor.dtype)).flatten()

    def held(self, sources: Sources) -> int:
        return 4 * math.prod(self.part.shape(sources)) * 2

    def origin(self) -> dict[str, Any]:
        return {
            "redrawn": self.part.origin(),
            "dim": self.dim,
            "count": len(self.index),
            "seed": self.seed,
            "label": self.label,
        }


@dataclass(frozen=True)
class Ties:
    """TIES-merging of the branches' changes to the seed, added to it. Holds the whole tensors."""

    seed: Expression
    branches: tuple[Expression, ...]
    density: float
    scale: float

    def shape(self, sources: Sources) -> tuple[int, ...]:
        return self.seed.shape(sources)

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        seed, *branches = (whole(part, sources).flatten().float() for part in (self.seed, *self.branches))
        yield ties(seed, branches, self.density, self.scale)

    def held(self, sources: Sources) -> int:
        return 4 * math.prod(self.shape(sources)) * (len(self.branches) + 3)

    def origin(self) -> dict[str, Any]:
        merged = [branch.origin() for branch in self.branches]
        return {"ties": merged, "onto": self.seed.origin(), "density": self.density, "scale": self.scale}


@dataclass(frozen=True)
class Draw:
    """New: normal with deviation `std`, zeros where that is 0. Seeded by a label too: the draw depends on no order."""

    sizes: tuple[int, ...]
    std: float
    seed: int
    label: str

    def shape(self, sources: Sources) -> tuple[int, ...]:
        return self.sizes

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        yield (torch.randn(self.sizes, generator=generator(self.seed, self.label)) * self.std).flatten()

    def held(self, sources: Sources) -> int:
        return 4 * math.prod(self.sizes)

    def origin(self) -> dict[str, Any]:
        return (
            {"new": "normal", "std": self.std, "seed": self.seed, "label": self.label} if self.std else {"new": "zeros"}
        )


@dataclass(frozen=True)
class Fitted:
    """A router that is fitted when all other tensors of the mixture are written."""

    sizes: tuple[int, ...]
    how: Literal["means", "ridge"]

    def shape(self, sources: Sources) -> tuple[int, ...]:
        return self.sizes

    def pieces(self, sources: Sources) -> Iterator[Tensor]:
        raise AssertionError("fitted routers come from `routers.fit_routers`")

    def held(self, sources: Sources) -> int:
        return 4 * math.prod(self.sizes)

    def origin(self) -> dict[str, Any]:
        return {"new": "fitted", "how": self.how}


def whole(part: Expression, sources: Sources) -> Tensor:
    """All of an expression's values, in its shape."""
    pieces = list(part.pieces(sources))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(part.shape(sources))
