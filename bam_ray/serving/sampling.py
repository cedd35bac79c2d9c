"""From logits to tokens: greedy, or temperature and nucleus with a random stream of the request's own.

A row is drawn from its own logits and its own stream, so what a request gets doesn't depend on its neighbours.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one request is to be continued."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    seed: int | None = None  # None: from the operating system's entropy
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    logprobs: int | None = None  # None: none; n: of the chosen token and of the n likeliest


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability, in nats, under the model (temperature 1, nucleus not applied)."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()  # the likeliest tokens, best first


def draw(logits: Tensor, sampling: Sampling, stream: random.Random) -> int:
    """One token from `logits` [V], any dtype."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Less the maximum first: a small temperature then gives 0 and -inf, never inf - inf
    scaled = logits.double()
    probabilities = torch.softmax((scaled - scaled.max()) / sampling.temperature, dim=-1)
    order = None
    if sampling.top_p < 1:
        probabilities, order = probabilities.sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before > sampling.top_p, 0.0)
        # Top-p 0 keeps the best token: nothing lies before it
    cumulative = probabilities.cumsum(-1)
    at = int(torch.searchsorted(cumulative, stream.random() * cumulative[-1], right=True))
    at = min(at, len(cumulative) - 1)
    return at if order is None else int(order[at])
