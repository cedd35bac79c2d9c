"""Text that arrives in pieces is the text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.serving.detokenizer import Detokenizer, StopStringMatcher


@pytest.mark.parametrize("text", ["the naïve ☕ café", "日本語 🎉👩‍🔬 mat", "a\ufffdb", ""])
def test_characters_come_whole(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_bytes_that_are_no_text_come_as_decoded(tokenizer: Any) -> None:
    party = tokenizer("🎉").input_ids
    tokens = [*party[:2], *tokenizer("cat").input_ids, *party, *party[:3]]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token) for token in tokens]
    assert pieces[-1] == ""  # three bytes of four wait for the last
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(tokens)


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    tokens = [*tokenizer("the").input_ids, tokenizer.eos_token_id, *tokenizer(" mat").input_ids]
    assert "".join(detokenizer.feed(token) for token in tokens) == "the mat"


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_as_on_the_whole_text(text: str, stops: list[str], data: Any) -> None:
    matcher = StopStringMatcher(tuple(stops))
    sent, rest, stopped = "", text, False
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        out, stopped = matcher.feed(piece)
        sent += out
        assert not any(stop in sent for stop in stops)
    met = [stop for stop in stops if stop in text]
    assert stopped == bool(met)
    if not stopped:
        sent += matcher.flush()
        assert sent == text
    else:
        # met at the earliest moment: what was sent is the text before some stop string
        assert any(text.startswith(sent + stop) for stop in met)


def test_only_what_may_be_a_stop_is_held() -> None:
    matcher = StopStringMatcher(("\nuser:",))
    assert matcher.feed("hello\nus") == ("hello", False)
    assert matcher.feed("ual\n") == ("\nusual", False)
    assert matcher.feed("user: more") == ("", True)
