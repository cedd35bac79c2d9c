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
    """One token from `logits` [V], any dtype, at a temperature above 0."""
    scaled = logits.double()
    # Less the maximum first: a small temperature then gives 0 and -inf, never inf - inf
    probabilities = torch.softmax((scaled - scaled.max()) / sampling.temperature, dim=-1)
    order = None
    if sampling.top_p < 1:
        probabilities, order = probabilities.sort(descending=True)
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        beyond[0] = False  # the likeliest stays, also for a top_p of 0
        probabilities = probabilities.masked_fill(beyond, 0.0)
    cumulative = probabilities.cumsum(-1)
    # The first token whose sum reaches the draw: it is never out of range, and never one of probability 0
    at = int(torch.searchsorted(cumulative, (1 - stream.random()) * cumulative[-1]))
    return at if order is None else int(order[at])
