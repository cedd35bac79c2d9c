"""The sampler: selects the next tokens of a batch of requests on the device.

The number that a token is drawn with is a hash of the request's seed and the position (`sampling.uniform`), and each
row of the logits is processed alone, so the output of a request does not depend on the requests beside it. One copy to
the host returns the tokens and their log-probabilities.

Lower bound of the memory traffic: the logits of greedy rows are read once. A row with a temperature is written and read
again in double precision, and it is sorted only with `top_k` or `top_p`.

Shapes: B rows, V vocabulary size, n number of most likely tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bam_ray.serving.grammar import allowed_tokens
from bam_ray.serving.sampling import SamplingParams, SamplingState, uniform


class Sampled(NamedTuple):
    """The next token of a request."""

    token: int
    is_finite: bool  # False: the model has returned NaN or infinity, and the token means nothing
    logprob: float = 0.0  # of the token; only if the request asks for log-probabilities
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log-probabilities


class TokenSampler:
    """A sampler with the tables that penalties need: one row for each request that has them."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(max_rows, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(max_rows, vocab_size, dtype=torch.bool, device=device)

    def start(self, state: SamplingState) -> None:
        """Begin a request."""
        if state.params.penalizes:
            self._counts[state.row] = 0
            self._in_prompt[state.row] = False
            self._in_prompt[state.row, torch.tensor(state.prompt, device=self._device)] = True

    def __call__(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """Return the next token of each request from its logits, fp32 [B, V]."""
        processed = self._process(logits, states)
        tokens = greedy = processed.argmax(-1)
        drawn = [row for row, state in enumerate(states) if state.params.temperature > 0]
        if drawn:
            tokens = greedy.clone()
            tokens[drawn] = draw(processed[drawn], [states[row] for row in drawn])
        best = logits.gather(1, greedy.unsqueeze(1))  # NaN if the row contains one
        columns = [tokens.unsqueeze(1), best.isfinite()]
        wanted = [state.params.logprobs for state in states if state.params.logprobs is not None]
        top = min(max(wanted, default=0), logits.shape[1])
        if wanted:
            total = logits.logsumexp(-1, keepdim=True)
            values, ids = logits.topk(top)
            columns += [logits.gather(1, tokens.unsqueeze(1)) - total, ids, values - total]
        host = torch.cat([column.double() for column in columns], dim=1).tolist()  # the only copy
        self._count(tokens, states)
        for state, row_values in zip(states, host, strict=True):
            if state.matcher is not None:
                state.matcher.consume_token(int(row_values[0]))
        return [_sampled(row, state.params, top) for row, state in zip(host, states, strict=True)]

    def _process(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Return the logits with penalties and biases, and without tokens that must not follow."""
        penalized = [row for row, state in enumerate(states) if state.params.penalizes]
        biases = [(row, *bias) for row, state in enumerate(states) for bias in state.params.logit_bias]
        early = [state.generated < state.params.min_tokens for state in states]
        biases += [
            (row, token, -torch.inf) for row, state in enumerate(states) if early[row] for token in state.stop_tokens
        ]
        matched = [row for row, state in enumerate(states) if state.matcher is not None]
        if not penalized and not biases and not matched:
            return logits
        logits = logits.clone()
        if penalized:
            logits[penalized] = self._penalize(logits[penalized], [states[row] for row in penalized])
        if biases:
            rows, tokens, values = zip(*biases, strict=True)
            index = (torch.tensor(rows, device=self._device), torch.tensor(tokens, device=self._device))
            logits.index_put_(index, torch.tensor(values, device=self._device, dtype=logits.dtype), accumulate=True)
        if matched:
            allowed = allowed_tokens([states[row].matcher for row in matched], logits.shape[1], self._device)
            logits[matched] = logits[matched].masked_fill(~allowed, -torch.inf)
        return logits

    def _penalize(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        rows = torch.tensor([state.row for state in states], device=self._device)
        counts, generated = self._counts[rows], self._counts[rows] > 0
        column = _columns(states, logits)
        repetition = column(lambda params: params.repetition_penalty)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(generated | self._in_prompt[rows], repeated, logits)
        logits = logits - counts * column(lambda params: params.frequency_penalty)
        return logits - generated * column(lambda params: params.presence_penalty)

    def _count(self, tokens: Tensor, states: Sequence[SamplingState]) -> None:
        penalized = [row for row, state in enumerate(states) if state.params.penalizes]
        if penalized:
            rows = torch.tensor([states[row].row for row in penalized], device=self._device)
            self._counts[rows, tokens[penalized]] += 1


def draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Return a token for each row of `logits` [B, V], int64 [B]. The temperatures must be above 0."""
    scaled = logits.double()
    column = _columns(states, scaled)
    # Subtract the maximum before dividing: a tiny temperature then gives 0 and -inf, never inf - inf
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / column(lambda params: params.temperature)
    if any(state.params.min_p > 0 for state in states):
        scaled = scaled.masked_fill(scaled < column(lambda params: params.min_p).log(), -torch.inf)
    numbers = torch.tensor([[uniform(state.seed, state.generated)] for state in states], dtype=torch.double)
    numbers = numbers.to(logits.device)
    cut = [row for row, state in enumerate(states) if state.params.top_k > 0 or state.params.top_p < 1]
    if not cut:
        return _select(scaled.softmax(-1), numbers)
    tokens = torch.empty(len(states), dtype=torch.long, device=logits.device)
    whole = sorted(set(range(len(states))) - set(cut))
    if whole:
        tokens[whole] = _select(scaled[whole].softmax(-1), numbers[whole])
    tokens[cut] = _draw_sorted(scaled[cut], numbers[cut], [states[row] for row in cut])
    return tokens


def _draw_sorted(scaled: Tensor, numbers: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Return a token for each row, of its `top_k` and `top_p` most likely ones."""
    scaled, order = scaled.sort(descending=True, stable=True)
    column = _columns(states, scaled)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    probabilities = scaled.masked_fill(rank >= column(lambda params: params.top_k or torch.inf), -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = (before >= column(lambda params: params.top_p)) & (rank > 0)  # the most likely token always stays
    return order.gather(1, _select(probabilities.masked_fill(outside, 0.0), numbers).unsqueeze(1)).squeeze(1)


def _select(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return the first token of each row whose cumulative probability reaches its number in (0, total], int64 [B].

    A token of probability 0 is never selected.
    """
    cumulative = probabilities.cumsum(-1)
    index = torch.searchsorted(cumulative, numbers * cumulative[:, -1:]).squeeze(1)
    return index.clamp_max(probabilities.shape[1] - 1)  # out of range only if there are NaNs


def _columns(states: Sequence[SamplingState], like: Tensor) -> Callable[[Callable[[SamplingParams], float]], Tensor]:
    """Return a function that makes a column [B, 1] of one parameter of all requests, in the dtype of `like`."""

    def column(parameter: Callable[[SamplingParams], float]) -> Tensor:
        values = [[parameter(state.params)] for state in states]
        return torch.tensor(values, dtype=like.dtype, device=like.device)

    return column


def prompt_logprobs(logits: Tensor, targets: list[int], top: int) -> list[Sampled]:
    """Return the log-probabilities of the tokens that follow in a prompt.

    Args:
        logits: The logits before each of them, fp32 [C, V].
        targets: The tokens, C of them.
        top: The number of most likely tokens to return with each.
    """
    tokens = torch.tensor(targets, device=logits.device).unsqueeze(1)
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(top, logits.shape[1]))
    host = torch.cat([logprobs.gather(1, tokens).double(), ids.double(), values.double()], dim=1).tolist()
    count = values.shape[1]
    return [
        Sampled(token, True, row[0], tuple(zip(map(int, row[1 : 1 + count]), row[1 + count :], strict=True)))
        for token, row in zip(targets, host, strict=True)
    ]


def _sampled(row: list[float], params: SamplingParams, top: int) -> Sampled:
    """Return the token of one row of the copy, which has the `top` most likely ones."""
    token, is_finite = int(row[0]), bool(row[1])
    if params.logprobs is None:
        return Sampled(token, is_finite)
    count = min(params.logprobs, top)
    ids, values = row[3 : 3 + count], row[3 + top : 3 + top + count]
    return Sampled(token, is_finite, row[2], tuple((int(id_), value) for id_, value in zip(ids, values, strict=True)))
