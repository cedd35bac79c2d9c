"""Tokens to text while they arrive: characters of several tokens, and stop strings that may only have begun."""

from typing import Any

INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


class Detokenizer:
    """Text of a growing list of tokens, piece by piece: the pieces joined are the decoded list.

    A character may span tokens; until its last byte is there it decodes to U+FFFD, so a text that ends in U+FFFD is
    held until a later token shows what it is. The tokens of the piece before are decoded again as context, because
    some decoders drop the space of a first word.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens whose text came last
        self._context_length = 0  # in characters
        self._tokens: list[int] = []  # since then

    def feed(self, token: int) -> str:
        """The text that became certain."""
        self._tokens.append(token)
        piece = self._decode()
        return "" if piece.endswith(INCOMPLETE) else self._send(piece)

    def flush(self) -> str:
        """The rest, when no token follows."""
        return self._send(self._decode())

    def _send(self, piece: str) -> str:
        self._context, self._tokens = self._tokens, []
        self._context_length = len(self._text(self._context))
        return piece

    def _decode(self) -> str:
        return self._text(self._context + self._tokens)[self._context_length :]

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Cuts text before the first stop string, and holds back an end that may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """The text that may be sent, and whether a stop string was met."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """What was held, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
