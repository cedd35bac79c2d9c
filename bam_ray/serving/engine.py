"""The decode engine: continuous batching of any causal language model that follows the conventions of transformers.

Requests join one at a time, and each prompt is computed alone. They may leave at any time. One forward pass per step
produces the next token of every active request, whatever the lengths: each row has its own position and its own mask.
The output of a request equals the output that it would have alone.

    engine = DecodeEngine(model, tokenizer, slots=8, max_length=512)
    generation, first = engine.add(prompt, SamplingParams(max_tokens=16, temperature=0))
    while engine.active:
        for generation, delta in engine.step():
            print(delta.text, delta.finish_reason)

The engine is not thread-safe. `bam_ray.serving.scheduler` drives it from asyncio.
"""

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bam_ray.errors import ServingError
from bam_ray.serving.cache import SlotCache
from bam_ray.serving.detokenizer import Detokenizer, StopStringMatcher
from bam_ray.serving.sampling import SamplingParams, TokenLogprob, sample_token

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """The output that one or more steps add to a request."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None  # set on the last delta only
    error: Exception | None = None  # the error that has ended the request in place of a finish reason

    def __add__(self, after: "Delta") -> "Delta":
        return Delta(
            self.text + after.text,
            self.tokens + after.tokens,
            self.logprobs + after.logprobs,
            after.finish_reason,
            after.error,
        )

    @property
    def is_last(self) -> bool:
        """True if no delta of the request follows."""
        return self.finish_reason is not None or self.error is not None


class Generation:
    """The decoding state of one active request."""

    def __init__(self, prompt: list[int], params: SamplingParams, tokenizer: Any, stop_tokens: set[int]) -> None:
        self.params = params
        self.stop_tokens = stop_tokens  # those that end this text
        self.rng = random.Random(params.seed)
        self.length = len(prompt)  # positions in the cache
        self.token = prompt[-1]  # the newest token, which is not in the cache yet
        self.generated = 0
        self.detokenizer = Detokenizer(tokenizer)
        self.stop_matcher = StopStringMatcher(params.stop)


class DecodeEngine:
    """An engine that decodes up to `slots` requests together, each with a prompt and completion of `max_length` tokens.

    The constructor computes the longest prompt and runs one step, which allocates the memory of all slots. A machine
    with too little memory therefore fails at start and not under load.
    """

    def __init__(self, model: Any, tokenizer: Any, slots: int, max_length: int) -> None:
        """Create an engine and allocate its memory.

        Args:
            model: A causal language model on its device, with SDPA attention.
            tokenizer: The tokenizer of the model.
            slots: The maximum number of requests that are decoded together.
            max_length: The maximum number of tokens of a request, prompt and completion together.

        Raises:
            ServingError: The engine cannot reproduce the model's attention.
        """
        _check_attention(model.config, max_length)
        self.tokenizer = tokenizer
        self.slots = slots
        self.max_length = max_length
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self._model = model.eval()
        self._device: torch.device = model.device
        self._end_tokens = _end_tokens(model, tokenizer)
        self._special_tokens = {
            added.content: token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }
        self._cache = SlotCache(slots, max_length)
        self._active: list[Generation] = []  # the request at index i occupies slot i
        for length in (max_length - 1, 1):
            self.test(length)

    def test(self, length: int = 1) -> None:
        """Compute a prompt of `length` tokens and one step. Raises any error that the model raises."""
        generation, _ = self.add([0] * length, SamplingParams(max_tokens=2, temperature=0))
        try:
            for _, delta in self.step():
                if delta.error is not None:
                    raise delta.error
        finally:
            self.remove(generation)

    @property
    def active(self) -> int:
        """The number of requests being decoded."""
        return len(self._active)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self.slots - len(self._active)

    @torch.inference_mode()
    def add(self, prompt: list[int], params: SamplingParams) -> tuple[Generation, Delta]:
        """Compute a prompt of 1 to `max_length` - 1 tokens and its first new token.

        The request takes a slot unless its first token ends it. A slot must be free.
        """
        assert self.free and 0 < len(prompt) < self.max_length
        # Special tokens are left out of the text, so a stop string that is one must be found among the tokens
        stop_tokens = {self._special_tokens[stop] for stop in params.stop if stop in self._special_tokens}
        generation = Generation(prompt, params, self.tokenizer, self._end_tokens | stop_tokens)
        self._cache.prefill(len(self._active))
        input_ids = torch.tensor([prompt], device=self._device)
        logits = self._forward(input_ids, torch.arange(len(prompt), device=self._device)[None], None)
        self._cache.commit()
        delta = self._append_token(generation, logits[0], int(logits[0].argmax()))
        if delta.finish_reason is None:
            self._active.append(generation)
        return generation, delta

    @torch.inference_mode()
    def step(self) -> list[tuple[Generation, Delta]]:
        """Generate one token for every active request, and free the slots of the requests that end.

        If the computation fails, each request is computed again alone, so that only those that cause an error end
        (`Delta.error`).
        """
        if not self._active:
            return []
        active = list(self._active)
        try:
            deltas = self._decode(0, len(active))
        except Exception:
            deltas = [self._decode_alone(slot) for slot in range(len(active))]
        for generation, delta in zip(active, deltas, strict=True):
            if delta.is_last:
                self.remove(generation)
        return list(zip(active, deltas, strict=True))

    def _decode_alone(self, slot: int) -> Delta:
        try:
            return self._decode(slot, slot + 1)[0]
        except Exception as error:
            return Delta(error=error)

    def _decode(self, start: int, stop: int) -> list[Delta]:
        """Generate one token for the requests in the slots `start` to `stop` - 1."""
        active = self._active[start:stop]
        positions = torch.tensor([generation.length for generation in active], device=self._device)
        length = max(generation.length for generation in active) + 1
        self._cache.decode(positions, length, start)
        input_ids = torch.tensor([[generation.token] for generation in active], device=self._device)
        # [B, 1, 1, length]: a row attends to its own past and itself, not to leftovers of the slot's earlier requests
        mask = (torch.arange(length, device=self._device) <= positions[:, None])[:, None, None]
        logits = self._forward(input_ids, positions[:, None], mask)
        greedy_tokens = logits.argmax(-1).tolist()  # of all rows at once: one device synchronization instead of B
        self._cache.commit()
        deltas = []
        for generation, row, greedy_token in zip(active, logits, greedy_tokens, strict=True):
            generation.length += 1
            try:
                deltas.append(self._append_token(generation, row, greedy_token))
            except Exception as error:  # the forward pass must not be repeated for it
                deltas.append(Delta(error=error))
        return deltas

    @torch.inference_mode()
    def remove(self, generation: Generation) -> None:
        """Free the slot of a request. Does nothing if the request has ended."""
        if generation not in self._active:
            return
        slot = self._active.index(generation)
        last = self._active.pop()
        if last is not generation:
            self._cache.copy_slot(len(self._active), slot, last.length)
            self._active[slot] = last

    def clear(self) -> None:
        """Drop all requests."""
        self._active.clear()

    def _forward(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits of the last position, [B, V], in fp32."""
        output = self._model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _append_token(self, generation: Generation, logits: Tensor, greedy_token: int) -> Delta:
        """Select the next token of a request from `logits` [V], and return what it adds to the output."""
        params = generation.params
        token = sample_token(logits, params, generation.rng) if params.temperature > 0 else greedy_token
        generation.token = token
        generation.generated += 1
        logprobs = () if params.logprobs is None else (self._logprob(logits, token, params.logprobs),)
        ended = token in generation.stop_tokens
        # The cache holds all tokens but the newest
        full = generation.generated >= params.max_tokens or generation.length + 1 >= self.max_length
        piece = "" if ended else generation.detokenizer.feed(token)
        if ended or full:
            piece += generation.detokenizer.flush()
        text, stopped = generation.stop_matcher.feed(piece)
        if (ended or full) and not stopped:
            text += generation.stop_matcher.flush()
        reason: FinishReason | None = "stop" if ended or stopped else "length" if full else None
        return Delta(text, (token,), logprobs, reason)

    def _logprob(self, logits: Tensor, token: int, top: int) -> TokenLogprob:
        logprobs = torch.log_softmax(logits, dim=-1)
        values, tokens = logprobs.topk(min(top, len(logprobs)))
        best = tuple((self._token_text(int(other)), float(value)) for value, other in zip(values, tokens, strict=True))
        return TokenLogprob(self._token_text(token), float(logprobs[token]), best)

    def _token_text(self, token: int) -> str:
        text: str = self.tokenizer.decode([token])
        return text


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: those of the generation configuration, if any, and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {int(token) for token in ends | {tokenizer.eos_token_id} if token is not None}


def _check_attention(config: Any, max_length: int) -> None:
    """Raise `ServingError` if decoding in slots would not reproduce the model's attention."""
    if config._attn_implementation != "sdpa":
        raise ServingError(
            f"attention {config._attn_implementation!r} does not support one mask per row: load the model with "
            "attn_implementation='sdpa'"
        )
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if layers != {"full_attention"} or (window is not None and window < max_length):
        raise ServingError(
            f"{config.model_type} uses attention windows, which the server does not support: serve a model with full "
            "attention"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ServingError(
            f"serve.max_length is {max_length}, but the model has {positions} positions: lower serve.max_length"
        )
