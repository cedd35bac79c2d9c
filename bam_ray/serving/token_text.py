"""The text of single tokens, and the places of tokens in a text. Tokens may be parts of characters."""

import codecs
import itertools
import re
from collections.abc import Iterable
from typing import Any

REPLACEMENT_CHARACTER = "\ufffd"  # a decoder writes it for bytes that do not form a character, or do not yet
SPACE = "\u2581"  # SentencePiece writes a space so
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a token for one byte


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level tokenizers write it as (`bytes_to_unicode` of GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


class TokenTexts(dict[int, bytes]):
    """The text of each token in UTF-8, made when it is first read. A part of a character is no valid UTF-8."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        self[token] = text = self._text(token)
        return text

    def _text(self, token: int) -> bytes:
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        name: str = self._tokenizer.convert_ids_to_tokens(token)
        if name.startswith(SPACE) and not text.startswith(" "):  # a decoder drops the space before a first word
            return f" {text}".encode()
        if REPLACEMENT_CHARACTER not in text:
            return text.encode()
        if found := _BYTE_FALLBACK.fullmatch(name):
            return bytes([int(found[1], 16)])
        if all(character in _BYTE_LEVEL_ALPHABET for character in name):
            return bytes(_BYTE_LEVEL_ALPHABET[character] for character in name)
        return text.encode()


def text_offsets(tokens: Iterable[bytes], text: str) -> list[int]:
    """Return the place of each token in the text of all: the characters before the one that it begins or continues.

    A space before the first word that is not in the text does not count.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(token) for token in tokens]
    dropped = int("".join([*pieces, decoder.decode(b"", final=True)]) == f" {text}")
    ends = itertools.accumulate(map(len, pieces[:-1]), initial=-dropped)
    return [min(max(0, end), len(text)) for end in ends]


def readable(token: bytes, prefix: str = "") -> str:
    """Return a token as OpenAI writes it: `prefix` and escaped bytes if it is a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return prefix + token.decode(errors="backslashreplace")
