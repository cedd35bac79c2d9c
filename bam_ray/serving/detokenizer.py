"""Incremental detokenization: characters that span several tokens, and stop strings that span several pieces."""

from dataclasses import replace
from typing import Any

from bam_ray.serving.engine import Delta, Output
from bam_ray.serving.sampler import Sampled
from bam_ray.serving.sampling import SamplingParams, TokenLogprob
from bam_ray.serving.token_text import REPLACEMENT_CHARACTER, TokenTexts

MAX_PENDING_TOKENS = 16  # that wait for the end of a character; a character has at most four bytes
HELD_TOKENS = 8  # the newest of them, which stay if there are more


class TextStream:
    """The text of one request: makes text of its tokens, and ends it before its first stop string."""

    def __init__(self, tokenizer: Any, params: SamplingParams, token_texts: TokenTexts | None = None) -> None:
        """Create an empty stream.

        Args:
            tokenizer: The tokenizer of the model.
            params: The sampling parameters of the request.
            token_texts: The texts of single tokens, which all streams of a server share.
        """
        self._tokenizer, self._params = tokenizer, params
        self._token_texts = TokenTexts(tokenizer) if token_texts is None else token_texts
        self._generated = self._characters = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_matcher = StopStringMatcher(params.stop)

    def feed(self, output: Output) -> Delta:
        """Return what an output of the engine adds to the text.

        If the delta has a finish reason that the output does not have, a stop string was found: remove the request from
        the engine, and do not feed what it has generated meanwhile.
        """
        sampled = [] if output.sampled is None else [output.sampled]
        ended = output.finish_reason == "stop"  # by the token, which is left out of the text
        piece = "" if ended else "".join(self._detokenizer.feed(each.token) for each in sampled)
        if output.is_last:
            piece += self._detokenizer.flush()
        offset, self._characters = self._characters, self._characters + len(piece)
        self._generated += len(sampled)
        if self._generated < self._params.min_tokens:
            text, stopped = piece, False
        else:
            text, stopped = self._stop_matcher.feed(piece)
        if output.is_last and not stopped:
            text += self._stop_matcher.flush()
        return Delta(
            text,
            tuple(each.token for each in sampled),
            () if self._params.logprobs is None else tuple(self._logprob(each, offset) for each in sampled),
            "stop" if stopped else output.finish_reason,
            tuple(self._logprob(each, 0) for each in output.prompt),
            () if output.routing is None else (replace(output.routing, text=text),),
            output.cached,
        )

    def _logprob(self, sampled: Sampled, offset: int) -> TokenLogprob:
        top = tuple(TokenLogprob(self._token_texts[token], logprob) for token, logprob in sampled.top)
        return TokenLogprob(self._token_texts[sampled.token], sampled.logprob, top, offset)


class Detokenizer:
    """An incremental decoder of a growing list of tokens; its concatenated pieces equal the decoded list.

    A character may span several tokens. Until its last byte arrives, it decodes to U+FFFD, so a text that ends in
    U+FFFD is held back until a later token completes it. Of text that is never completed, only the newest tokens are
    held back. The tokens of the previous piece are decoded again as context, because some decoders drop the leading
    space of a first word.
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
        if not piece.endswith(REPLACEMENT_CHARACTER):
            return self._emit(piece)
        return self._emit_oldest(piece) if len(self._pending) > MAX_PENDING_TOKENS else ""

    def _emit_oldest(self, piece: str) -> str:
        """Return the first part of the text `piece` of all pending tokens, and keep the newest tokens pending."""
        pending = self._pending
        for cut in range(len(pending) - HELD_TOKENS, 0, -1):
            self._pending = pending[:cut]
            first = self._decode_pending()
            if first + self._decode(pending)[len(self._decode(pending[:cut])) :] == piece:  # not within a character
                self._emit(first)
                self._pending = pending[cut:]
                return first
        self._pending = pending
        return ""

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
