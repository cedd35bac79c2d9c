"""JSON values as a stream: one per line, one after the other, or the elements of one array."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20  # characters

_blank = re.compile(r"[ \t\n\r]*")
_decoder = json.JSONDecoder(parse_int=float)  # Python refuses integers of more than 4,300 digits


def json_values(file: TextIO, max_characters: int) -> Iterator[tuple[int, Any]]:
    """Yield each value with the number of its line.

    If the file begins with `[`, the values are the elements of this array. All numbers are floats.

    Args:
        file: Text that is opened with `newline=""` or with translated line ends.
        max_characters: The most characters of one value.

    Raises:
        ValueError: The text is not JSON, or a value is too large or nested too deeply. The message names the line.
    """
    text = _Buffer(file, max_characters)
    in_array = text.next_character() == "["
    if in_array:
        text.skip()
    while (character := text.next_character()) != ("]" if in_array else ""):
        line = text.line
        yield line, text.take_value()
        if in_array and (character := text.next_character()) != "]":
            if character != ",":
                raise ValueError(f"line {text.line}: expected ',' or ']' after an element")
            text.skip()
    text.skip()
    if in_array and text.next_character():
        raise ValueError(f"line {text.line}: text after the end of the array")


class _Buffer:
    """The part of a file that is not decoded yet."""

    def __init__(self, file: TextIO, max_characters: int) -> None:
        self._file = file
        self._max_characters = max_characters
        self._text = ""
        self._position = 0
        self.line = 1

    def next_character(self) -> str:
        """Return the next character that is not blank, without taking it; empty at the end of the file."""
        while True:
            blank = _blank.match(self._text, self._position)
            assert blank is not None
            self._advance(blank.end())
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def skip(self) -> None:
        """Take one character."""
        self._advance(self._position + 1)

    def take_value(self) -> Any:
        """Decode the value at the current position."""
        while True:
            try:
                value, end = _decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                line = self.line + self._text.count("\n", self._position, error.pos)
                if self._read_more():  # the value may be cut off at the end of the buffer
                    continue
                raise ValueError(f"line {line}: not JSON ({error.msg})") from None
            except RecursionError:
                raise ValueError(f"line {self.line}: nested too deeply") from None
            self._advance(end)
            return value

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = min(position, len(self._text))

    def _read_more(self) -> bool:
        """Read at least as much as is in the buffer, so that a value is decoded few times; False at the end."""
        left = len(self._text) - self._position
        if left > self._max_characters:
            raise ValueError(f"line {self.line}: a value has more than {self._max_characters:,} characters")
        more = self._file.read(max(CHUNK, left))
        self._text, self._position = self._text[self._position :] + more, 0
        return bool(more)
