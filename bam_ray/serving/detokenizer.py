"""Incremental detokenization: characters that span several tokens, and stop strings that span several pieces."""

from typing import Any

REPLACEMENT_CHARACTER = "\ufffd"  # a decoder writes it for bytes that do not form a character, or do not yet


class Detokenizer:
    """An incremental decoder of a growing list of tokens; its concatenated pieces equal the decoded list.

    A character may span several tokens. Until its last byte arrives, it decodes to U+FFFD, so a text that ends in
    U+FFFD is held back until a later token completes it. The tokens of the previous piece are decoded again as
    context, because some decoders drop the leading space of a first word.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens of the previous piece
        self._context_length = 0  # in characters
        self._pending: list[int] = []  # the tokens since then

    def feed(self, token: int) -> str:
        """Add a token and return the text that it completes, which may be empty."""
        self._pending.append(token)
        piece = self._decode_pending()
        return "" if piece.endswith(REPLACEMENT_CHARACTER) else self._emit(piece)

    def flush(self) -> str:
        """Return the remaining text. Call this when no token follows."""
        return self._emit(self._decode_pending())

    def _emit(self, piece: str) -> str:
        self._context, self._pending = self._pending, []
        self._context_length = len(self._decode(self._context))
        return piece

    def _decode_pending(self) -> str:
        return self._decode(self._context + self._pending)[self._context_length :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStringMatcher:
    """A filter that ends a text before its first stop string, and holds back a suffix that may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Add a piece of text. Return the text that can be emitted, and True if a stop string was found."""
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """Return the text that was held back. Call this when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
