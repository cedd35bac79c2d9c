"""Sampling: greedy decoding, or temperature and nucleus (top-p) sampling with one random generator per request.

Each token is sampled from its own request's logits and generator, so the output of a request does not depend on the
requests that are decoded with it.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of one request."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    seed: int | None = None  # None: seeded from the operating system's entropy
    stop: tuple[str, ...] = ()  # the text ends before the first stop string
    logprobs: int | None = None  # None: no log probabilities; n: of the sampled token and of the n most likely tokens


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a token, in nats, under the model (at temperature 1 and without top-p)."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()  # the most likely tokens, in descending order


def sample_token(logits: Tensor, params: SamplingParams, rng: random.Random) -> int:
    """Sample one token from `logits` [V] of any dtype. The temperature must be above 0."""
    scaled = logits.double()
    # Subtract the maximum before dividing: a tiny temperature then gives 0 and -inf, never inf - inf
    probabilities = torch.softmax((scaled - scaled.max()) / params.temperature, dim=-1)
    order = None
    if params.top_p < 1:
        probabilities, order = probabilities.sort(descending=True)
        outside_nucleus = probabilities.cumsum(-1) - probabilities >= params.top_p
        outside_nucleus[0] = False  # the most likely token always stays, even if top_p is 0
        probabilities = probabilities.masked_fill(outside_nucleus, 0.0)
    cumulative = probabilities.cumsum(-1)
    # The first token whose cumulative probability reaches a draw from (0, total]: the index is always in range, and a
    # token of probability 0 is never selected
    index = int(torch.searchsorted(cumulative, (1 - rng.random()) * cumulative[-1]))
    return index if order is None else int(order[index])
