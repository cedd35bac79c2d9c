"""Structured output: text that follows a JSON schema, a regular expression or a list of choices (llguidance).

A grammar is a string in the notation of llguidance. Before each token of a request with a grammar, its matcher says
which tokens may follow, and the sampler excludes the others. llguidance is an optional dependency.
"""

import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bam_ray.errors import ServingError

CACHED_GRAMMARS = 64  # compiled grammars of a server; requests often repeat them
BITS = 32  # tokens in one number of a mask
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The style of JSON: one line. With free white space, small models would often write it until the end."""


def json_grammar(schema: dict[str, Any]) -> str:
    """Return the grammar of the JSON values that a JSON schema describes."""
    matcher = _llguidance().LLMatcher
    return str(matcher.grammar_from_json_schema(schema, overrides=JSON_STYLE))


def regex_grammar(regex: str) -> str:
    """Return the grammar of the texts that a regular expression matches as a whole."""
    return str(_llguidance().LLMatcher.grammar_from_regex(regex))


def choice_grammar(choices: Sequence[str]) -> str:
    """Return the grammar of exactly these texts, at least one."""
    rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return str(_llguidance().LLMatcher.grammar_from_lark(f"start: {rule}"))


class Grammars:
    """The grammars of one server, compiled for its tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_tokens = tokenizer, vocab_size, end_tokens
        self._compiled = lru_cache(maxsize=CACHED_GRAMMARS)(self._compile)
        self._tokens = lru_cache(maxsize=1)(self._read_tokens)

    def matcher(self, grammar: str) -> Any:
        """Return a new matcher at the start of a text. Raises `ServingError` if the grammar is wrong or too large."""
        return self._compiled(grammar).deep_copy()

    def _compile(self, grammar: str) -> Any:
        if not self._end_tokens:
            raise ServingError("structured output needs an end token, which this model does not have")
        matcher = _llguidance().LLMatcher(self._tokens(), grammar, log_level=0)
        if matcher.is_error():
            raise ServingError(f"the grammar cannot be used: {matcher.get_error().splitlines()[0]}")
        return matcher

    def _read_tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        size = max(len(self._tokenizer), self._vocab_size)
        return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=sorted(self._end_tokens))


def allowed_tokens(matchers: Sequence[Any], vocab_size: int, device: torch.device) -> Tensor:
    """Return True for the tokens that may follow, bool [B, V], for B matchers.

    Raises:
        ServingError: The state of a matcher exceeds the limits of llguidance.
    """
    masks = []
    for matcher in matchers:
        masks.append(torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.int32))
        if matcher.is_error():
            raise ServingError("the grammar is too complex for this text")
    packed = torch.stack(masks).to(device)  # [B, V / 32]
    bits = packed.unsqueeze(2) >> torch.arange(BITS, dtype=torch.int32, device=device)
    return (bits & 1).bool().flatten(1)[:, :vocab_size]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ServingError(
            "structured output needs the package llguidance on the server: pip install 'bam-ray[structured]'"
        ) from None
    return llguidance
