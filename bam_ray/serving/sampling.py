"""The sampling parameters of a request, and the numbers that its tokens are drawn with."""

import secrets
from dataclasses import dataclass, field
from typing import Any

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of one request.

    The order of their effects on the logits is: penalties, `logit_bias`, `min_tokens`, `temperature`, `min_p`, `top_k`,
    `top_p`.
    """

    max_tokens: int  # 0: only the prompt is computed
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the most likely tokens whose probabilities add up to this
    seed: int | None = None  # None: from the operating system's entropy
    stop: tuple[str, ...] = ()  # the text ends before the first stop string
    logprobs: int | None = None  # None: no log probabilities; n: of the sampled token and of the n most likely tokens
    top_k: int = 0  # keep the k most likely tokens; 0: all
    min_p: float = 0.0  # keep tokens with at least this fraction of the probability of the most likely one
    repetition_penalty: float = 1.0  # divides positive logits of the tokens so far, multiplies negative ones
    presence_penalty: float = 0.0  # subtracted from the logits of the tokens that have been generated
    frequency_penalty: float = 0.0  # the same, for each time that they have been generated
    logit_bias: tuple[tuple[int, float], ...] = ()  # tokens and what is added to their logits
    min_tokens: int = 0  # no token ends the text before this number of tokens
    ignore_eos: bool = False  # the end tokens of the model do not end the text
    stop_token_ids: tuple[int, ...] = ()  # more tokens that end the text
    n: int = 1  # number of completions of the prompt, which is computed once
    prompt_logprobs: int | None = None  # as `logprobs`, for the tokens of the prompt after the first one
    grammar: str | None = None  # of the text, in the notation of llguidance (`serving.grammar`)
    expert_weights: tuple[float, ...] | None = None  # of each expert, in place of the router prior; they sum to 1
    routing: bool = False  # with the shares of the experts that computed each token; only for mixtures

    @property
    def penalizes(self) -> bool:
        """True if logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a token, in nats, under the model (at temperature 1 and with all tokens)."""

    token: bytes  # its text in UTF-8; some tokens are a part of a character
    logprob: float
    top: tuple["TokenLogprob", ...] = ()  # the most likely tokens, in descending order
    offset: int = 0  # characters of the completion before the one that the token begins or continues


@dataclass
class SamplingState:
    """The state of the sampling of one request.

    Attributes:
        params: Its sampling parameters.
        prompt: The tokens of its prompt.
        choice: The number of the completion among `SamplingParams.n`. Each has numbers of its own.
        seed: The seed of its numbers.
        row: The row of the tables of the sampler that it owns.
        stop_tokens: The tokens that end its text.
        generated: The number of tokens that have been sampled.
        matcher: The llguidance matcher of the text so far; None: any text is allowed.
    """

    params: SamplingParams
    prompt: list[int]
    choice: int = 0
    seed: int = field(init=False)
    row: int = 0
    stop_tokens: frozenset[int] = frozenset()
    generated: int = 0
    matcher: Any = None

    def __post_init__(self) -> None:
        seed = secrets.randbits(64) if self.params.seed is None else self.params.seed & _MASK
        self.seed = seed if not self.choice else _mix(seed ^ _mix(self.choice))


def uniform(seed: int, position: int) -> float:
    """Return a number in (0, 1] that depends on nothing but a 64-bit seed and a position (SplitMix64)."""
    return 1.0 - (_mix(_mix(seed) + position) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
