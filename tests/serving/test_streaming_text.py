"""Pieces of text that are decoded one token at a time add up to the whole text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.serving.detokenizer import Detokenizer, StopStringMatcher


@pytest.mark.parametrize("text", ["the naïve ☕ café", "日本語 🎉👩‍🔬 mat", "a\ufffdb", ""])
def test_characters_are_never_split(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_invalid_bytes_are_decoded_as_by_the_tokenizer(tokenizer: Any) -> None:
    emoji = tokenizer("🎉").input_ids
    tokens = [*emoji[:2], *tokenizer("cat").input_ids, *emoji, *emoji[:3]]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token) for token in tokens]
    assert pieces[-1] == ""  # three of four bytes are held back until the fourth arrives
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(tokens)


def test_special_tokens_add_no_text(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    tokens = [*tokenizer("the").input_ids, tokenizer.eos_token_id, *tokenizer(" mat").input_ids]
    assert "".join(detokenizer.feed(token) for token in tokens) == "the mat"


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_pieces_like_the_whole_text(text: str, stops: list[str], data: Any) -> None:
    matcher = StopStringMatcher(tuple(stops))
    emitted, rest, stopped = "", text, False
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        out, stopped = matcher.feed(piece)
        emitted += out
        assert not any(stop in emitted for stop in stops)
    present = [stop for stop in stops if stop in text]
    assert stopped == bool(present)
    if not stopped:
        emitted += matcher.flush()
        assert emitted == text
    else:
        # The match is as early as possible: the emitted text is the text before a stop string
        assert any(text.startswith(emitted + stop) for stop in present)


def test_only_a_possible_stop_string_is_held_back() -> None:
    matcher = StopStringMatcher(("\nuser:",))
    assert matcher.feed("hello\nus") == ("hello", False)
    assert matcher.feed("ual\n") == ("\nusual", False)
    assert matcher.feed("user: more") == ("", True)
