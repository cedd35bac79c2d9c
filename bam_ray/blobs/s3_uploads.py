"""Uploads to S3 in several parts: the size of the parts, and the bytes of a stream in such parts."""

from collections.abc import Iterator

from bam_ray.errors import StoreError
from bam_ray.units import MIB

PART_BYTES = 8 * MIB  # size of one part of a stream that is short enough, or whose length is unknown
MAX_PARTS = 10_000  # of one blob, a limit of S3
MAX_PART_BYTES = 5120 * MIB  # a limit of S3


def part_bytes(uri: str, size: int | None) -> int:
    """Return the size of the parts in which a stream of `size` bytes is sent.

    Raises:
        StoreError: S3 cannot hold a blob of this size.
    """
    needed = -(-(size or 0) // MAX_PARTS)
    if needed <= PART_BYTES:
        return PART_BYTES
    if needed > MAX_PART_BYTES:
        raise StoreError(
            f"{uri} would have {size:,} bytes, but a blob in S3 has at most {MAX_PARTS * MAX_PART_BYTES:,}: "
            "write it in several blobs"
        )
    return -(-needed // MIB) * MIB


def rechunk(chunks: Iterator[bytes | memoryview], size: int) -> Iterator[bytearray]:
    """Yield the bytes of `chunks` in parts of exactly `size` bytes; the last part has between 1 and `size` bytes."""
    part = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        if not view.nbytes:  # an empty view has no bytes to add and cannot be cast
            continue
        rest = view.cast("B")
        while len(rest):
            taken = rest[: size - len(part)]
            part += taken
            rest = rest[len(taken) :]
            if len(part) == size:
                yield part
                part = bytearray()
    if part:
        yield part
