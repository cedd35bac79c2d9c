"""The header of a safetensors file, checked by the rules of the safetensors library.

Problem: headers come from anywhere. A tensor whose byte range overlaps another one or the header, or whose range does
not have the length that its shape needs, would be read as weights without any sign of damage.

Design choice: the library reads headers only from local files, so its rules are repeated here for files in any store: a
header of at most 100 MB in UTF-8, non-negative integers, known dtypes, byte ranges of the right length that cover the
file without holes or overlaps. A name that occurs twice is refused too. The tests compare both on random headers.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

LENGTH_BYTES = 8  # the length of the header, little endian, is the beginning of every file
MAX_HEADER_BYTES = 100_000_000
MAX_INTEGER = 2**64  # the library counts in 64 bits
METADATA = "__metadata__"
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""The bits of an element of each dtype."""


class HeaderError(ValueError):
    """A header breaks a rule; the message completes the sentence "the file ..."."""


class TensorEntry(NamedTuple):
    """One tensor of a header: its byte range [start, stop) counts from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_header(header: bytes, data_bytes: int) -> list[TensorEntry]:
    """Return the tensors of a header in the order of the header.

    Args:
        header: The bytes of the header, without its length.
        data_bytes: The number of bytes of the file after the header.

    Raises:
        HeaderError: The header breaks a rule.
    """
    try:
        parsed = json.loads(header.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, HeaderError):
            raise
        raise HeaderError("is not a safetensors file, or it is truncated") from None
    if not isinstance(parsed, dict):
        raise HeaderError("is not a safetensors file: its header is no JSON object")
    _check_metadata(parsed.pop(METADATA, None))
    entries = [_entry(name, value) for name, value in parsed.items()]
    _check_ranges(entries, data_bytes)
    return entries


def parse_metadata(header: bytes) -> dict[str, str]:
    """Return the metadata of a header that `parse_header` has accepted."""
    return json.loads(header).get(METADATA) or {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; raise `HeaderError` if a name occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise HeaderError(f"is damaged: its header has {twice!r} twice")
    return found


def _no_constant(text: str) -> None:
    raise HeaderError(f"is damaged: its header has the value {text}")


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"is damaged: {METADATA} of its header is no table of texts")
    for key, value in metadata.items():
        _check_text(key)
        _check_text(value)


def _check_text(text: str) -> None:
    """Raise `HeaderError` if JSON escapes made a text that is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise HeaderError("is damaged: its header has a text that is not Unicode") from None


def _entry(name: str, value: Any) -> TensorEntry:
    """Return the entry of one tensor, with the length that its shape needs."""
    _check_text(name)
    if not isinstance(value, Mapping) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise HeaderError(f"is damaged: its header does not give dtype, shape and data_offsets of {name!r}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise HeaderError(f"has a tensor {name!r} of the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(f"is damaged: its header gives {name!r} the shape {shape!r} and the offsets {offsets!r}")
    bits = BITS[dtype]
    elements = 1
    for size in shape:
        elements *= size
        if elements >= MAX_INTEGER:
            raise HeaderError(f"is damaged: its header gives {name!r} the shape {shape}")
    if elements * bits >= MAX_INTEGER or elements * bits % 8 or offsets[1] - offsets[0] != elements * bits // 8:
        raise HeaderError(
            f"is damaged: its header gives {name!r} the bytes {offsets[0]} to {offsets[1]}, but the shape {shape} "
            f"of {dtype}"
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    """Return True if a JSON value is a list of integers that are not negative."""
    return isinstance(value, list) and all(type(each) is int and 0 <= each < MAX_INTEGER for each in value)


def _check_ranges(entries: list[TensorEntry], data_bytes: int) -> None:
    """Raise `HeaderError` if the byte ranges overlap, leave holes or do not end with the file."""
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            problem = "overlaps another one" if entry.start < end else "does not begin where the one before it ends"
            raise HeaderError(f"is damaged: the tensor {entry.name!r} {problem}")
        end = entry.stop
        if end > data_bytes:
            raise HeaderError(f"is truncated: tensor {entry.name} ends past its last byte")
    if end < data_bytes:
        raise HeaderError(f"is damaged: it has {data_bytes - end} bytes that belong to no tensor")
