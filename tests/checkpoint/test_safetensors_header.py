"""Headers of safetensors files: what the library refuses is refused, and what it reads is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bam_ray.checkpoint.safetensors_header import BITS, HeaderError, TensorEntry, parse_header

X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
Y = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
# Headers that the library refuses, with the number of bytes of data behind them
REFUSED: dict[str, tuple[Any, int]] = {
    "no object": ([], 0),
    "null": (None, 0),
    "negative size": ({"x": {**X, "shape": [-2]}}, 8),
    "fractional size": ({"x": {**X, "shape": [2.0]}}, 8),
    "true as a size": ({"x": {**X, "shape": [True, 2]}}, 8),
    "infinite size": ({"x": {**X, "shape": [float("inf")]}}, 8),
    "size beyond 64 bits": ({"x": {"dtype": "F32", "shape": [2**64, 0], "data_offsets": [0, 0]}}, 0),
    "sizes that overflow": ({"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, 8),
    "shape is a number": ({"x": {**X, "shape": 2}}, 8),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}}, 8),
    "three offsets": ({"x": {**X, "data_offsets": [0, 8, 8]}}, 8),
    "negative offset": ({"x": {**X, "data_offsets": [-8, 0]}}, 8),
    "offsets in the wrong order": ({"x": {**X, "data_offsets": [8, 0]}}, 8),
    "text as an offset": ({"x": {**X, "data_offsets": ["0", 8]}}, 8),
    "unknown dtype": ({"x": {**X, "dtype": "F33"}}, 8),
    "dtype is a list": ({"x": {**X, "dtype": ["F32"]}}, 8),
    "shape and length differ": ({"x": {**X, "shape": [3]}}, 8),
    "half a byte": ({"x": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1),
    "overlap": ({"x": X, "y": {**Y, "data_offsets": [4, 8]}}, 8),
    "hole": ({"x": X, "y": {**Y, "data_offsets": [12, 16]}}, 16),
    "hole at the beginning": ({"y": Y}, 12),
    "too little data": ({"x": X, "y": Y}, 10),
    "too much data": ({"x": X}, 9),
    "metadata is a text": ({"__metadata__": "a", "x": X}, 8),
    "metadata has a number": ({"__metadata__": {"a": 1}, "x": X}, 8),
    "tensor is a list of numbers": ({"x": [1, 2]}, 8),
    "tensor is null": ({"x": None}, 0),
}
RAW = {
    "text behind": json.dumps({"x": X}).encode() + b" x",
    "not closed": b'{"x": ',
    "no UTF-8": b'{"\xff": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "half of a surrogate pair": b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "UTF-16": json.dumps({"x": X}).encode("utf-16-le"),
    "deep": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a field twice": b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "a number of 5000 digits": b'{"x": {"dtype": "F32", "shape": [' + b"1" * 5000 + b'], "data_offsets": [0, 8]}}',
}


def library_reads(path: Path, header: bytes, data_bytes: int) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes that the library reads from a file with this header, or None if it refuses the file."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_bytes))
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError:
        return None


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_the_library_refuses_is_refused(tmp_path: Path, name: str) -> None:
    header, data_bytes = REFUSED[name]
    text = json.dumps(header).encode()
    assert library_reads(tmp_path / "file", text, data_bytes) is None
    with pytest.raises(HeaderError):
        parse_header(text, data_bytes)


@pytest.mark.parametrize("name", RAW)
def test_a_text_that_is_no_header_is_refused(tmp_path: Path, name: str) -> None:
    assert library_reads(tmp_path / "file", RAW[name], 8) is None
    with pytest.raises(HeaderError):
        parse_header(RAW[name], 8)


def test_a_name_that_occurs_twice_is_refused() -> None:
    twice = b'{"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "x": {"dtype": "U8", "shape": [1]}}'
    with pytest.raises(HeaderError, match="has 'x' twice"):
        parse_header(twice, 1)


def test_the_order_of_a_header_is_kept() -> None:
    header = {"__metadata__": {"format": "pt"}, "y": Y, "x": {**X, "more": 1}}
    assert parse_header(json.dumps(header).encode(), 12) == [
        TensorEntry("y", "F32", (1,), 8, 12),
        TensorEntry("x", "F32", (2,), 0, 8),
    ]


NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63, 2**64, 0.0, True, None, "1"]))
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F32", "F32", "f32", 7]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=2), TENSORS, max_size=3), st.integers(0, 16))
def test_random_headers_are_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data_bytes: int
) -> None:
    check_against_library(tmp_path_factory.getbasetemp() / "random", json.dumps(header).encode(), data_bytes)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_headers_are_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One character of a valid header is replaced, removed or doubled."""
    file = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(())})
    length = int.from_bytes(file[:8], "little")
    header = bytearray(file[8 : 8 + length])
    place = data.draw(st.integers(0, length - 1))
    header[place : place + data.draw(st.integers(0, 1))] = data.draw(
        st.sampled_from([b"", *map(bytes, zip(b'0129{}[],:"a- '))])
    )
    if b"-0" not in header:  # the library takes it for a fraction, Python for 0
        check_against_library(tmp_path_factory.getbasetemp() / "changed", bytes(header), len(file) - 8 - length)


def check_against_library(path: Path, header: bytes, data_bytes: int) -> None:
    theirs = library_reads(path, header, data_bytes)
    try:
        ours: Any = {entry.name: entry.shape for entry in parse_header(header, data_bytes)}
    except HeaderError:
        ours = None
    if ours is None and theirs is not None:
        assert len(json.loads(header, object_pairs_hook=list)) > len(theirs)  # a name occurs twice
    else:
        assert ours == theirs
