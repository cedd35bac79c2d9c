"""The decode engine: continuous batching of any causal language model that follows transformers' conventions.

Requests join one at a time (their prompt is computed alone) and leave at any time; between, one forward pass a step
gives every request its next token, whatever their lengths: each row has its own position and its own mask. What a
request gets is what it would get alone.

    engine = DecodeEngine(model, tokenizer, slots=8, max_length=512)
    generation, first = engine.add(prompt, Sampling(max_tokens=16, temperature=0))
    while engine.active:
        for generation, delta in engine.step():
            print(delta.text, delta.finish_reason)

The engine is a plain class for one thread at a time; `serving.scheduler` puts asyncio around it.
"""

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bam_ray.errors import ServingError
from bam_ray.serving.cache import SlotCache
from bam_ray.serving.sampling import Sampling, TokenLogprob, draw
from bam_ray.serving.text import Detokenizer, StopStrings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """What one or more steps added to a request."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None  # set on the last

    def __add__(self, after: "Delta") -> "Delta":
        return Delta(
            self.text + after.text,
            self.tokens + after.tokens,
            self.logprobs + after.logprobs,
            after.finish_reason,
        )


class Generation:
    """A request being decoded."""

    def __init__(self, prompt: list[int], sampling: Sampling, tokenizer: Any) -> None:
        self.sampling = sampling
        self.stream = random.Random(sampling.seed)
        self.length = len(prompt)  # positions in the cache
        self.token = prompt[-1]  # the newest, not yet in the cache
        self.generated = 0
        self.detokenizer = Detokenizer(tokenizer)
        self.stops = StopStrings(sampling.stop)


class DecodeEngine:
    """`slots` requests decoded together, each of at most `max_length` tokens, prompt and completion.

    `model` is a causal LM on its device, `tokenizer` its tokenizer. Memory for all slots is taken here, by one step,
    so a machine that is too small fails now and not at the busiest hour.
    """

    def __init__(self, model: Any, tokenizer: Any, slots: int, max_length: int) -> None:
        _check_attention(model.config, max_length)
        self.tokenizer = tokenizer
        self.slots = slots
        self.max_length = max_length
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self._model = model.eval()
        self._device: torch.device = model.device
        self._ends = _end_tokens(model, tokenizer)
        self._cache = SlotCache(slots, max_length)
        self._rows: list[Generation] = []  # row i holds slot i
        self.add([0], Sampling(max_tokens=2, temperature=0))
        self.step()
        self.clear()

    @property
    def active(self) -> int:
        """Requests being decoded."""
        return len(self._rows)

    @property
    def free(self) -> int:
        """Requests that may join now."""
        return self.slots - len(self._rows)

    @torch.inference_mode()
    def add(self, prompt: list[int], sampling: Sampling) -> tuple[Generation, Delta]:
        """Compute a prompt (1 to `max_length` - 1 tokens) and its first token; the request joins unless it ended."""
        assert self.free and 0 < len(prompt) < self.max_length
        generation = Generation(prompt, sampling, self.tokenizer)
        self._cache.prefill(len(self._rows))
        input_ids = torch.tensor([prompt], device=self._device)
        logits = self._forward(input_ids, torch.arange(len(prompt), device=self._device)[None], None)
        delta = self._advance(generation, logits[0], int(logits[0].argmax()))
        if delta.finish_reason is None:
            self._rows.append(generation)
        return generation, delta

    @torch.inference_mode()
    def step(self) -> list[tuple[Generation, Delta]]:
        """One token for every request; those that ended have left."""
        if not self._rows:
            return []
        positions = torch.tensor([row.length for row in self._rows], device=self._device)
        length = max(row.length for row in self._rows) + 1
        self._cache.decode(positions, length)
        input_ids = torch.tensor([[row.token] for row in self._rows], device=self._device)
        # [B, 1, 1, length]: a row sees its own past and itself, not what an earlier request left behind
        mask = (torch.arange(length, device=self._device) <= positions[:, None])[:, None, None]
        logits = self._forward(input_ids, positions[:, None], mask)
        deltas = []
        likeliest = logits.argmax(-1).tolist()  # of all rows at once: one wait for the device, not B
        for generation, row, best in zip(self._rows, logits, likeliest, strict=True):
            generation.length += 1
            deltas.append((generation, self._advance(generation, row, best)))
        for generation, delta in deltas:
            if delta.finish_reason is not None:
                self.remove(generation)
        return deltas

    @torch.inference_mode()
    def remove(self, generation: Generation) -> None:
        """Free a request's slot; nothing happens where it has left."""
        if generation not in self._rows:
            return
        slot = self._rows.index(generation)
        last = self._rows.pop()
        if last is not generation:
            self._cache.move(len(self._rows), slot, last.length)
            self._rows[slot] = last

    def clear(self) -> None:
        """Drop all requests."""
        self._rows.clear()

    def _forward(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of the last position, [B, V], fp32."""
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

    def _advance(self, generation: Generation, logits: Tensor, likeliest: int) -> Delta:
        """Choose a request's next token from `logits` [V], and say what that adds to its text."""
        sampling = generation.sampling
        token = draw(logits, sampling, generation.stream) if sampling.temperature > 0 else likeliest
        generation.token = token
        generation.generated += 1
        logprobs = () if sampling.logprobs is None else (self._logprob(logits, token, sampling.logprobs),)
        ended = token in self._ends
        # All tokens but the newest are in the cache
        full = generation.generated >= sampling.max_tokens or generation.length + 1 >= self.max_length
        piece = "" if ended else generation.detokenizer.feed(token)
        if ended or full:
            piece += generation.detokenizer.flush()
        text, stopped = generation.stops.feed(piece)
        if (ended or full) and not stopped:
            text += generation.stops.flush()
        reason: FinishReason | None = "stop" if ended or stopped else "length" if full else None
        return Delta(text, (token,), logprobs, reason)

    def _logprob(self, logits: Tensor, token: int, top: int) -> TokenLogprob:
        logprobs = torch.log_softmax(logits, dim=-1)
        values, tokens = logprobs.topk(min(top, len(logprobs)))
        best = tuple((self._name(int(other)), float(value)) for value, other in zip(values, tokens, strict=True))
        return TokenLogprob(self._name(token), float(logprobs[token]), best)

    def _name(self, token: int) -> str:
        name: str = self.tokenizer.decode([token])
        return name


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text: the generation configuration's (one, several or none) and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {int(token) for token in ends | {tokenizer.eos_token_id} if token is not None}


def _check_attention(config: Any, max_length: int) -> None:
    """Raise `ServingError` where slots would not give the model's own attention."""
    if config._attn_implementation != "sdpa":
        raise ServingError(
            f"attention {config._attn_implementation!r} takes no mask per row: load the model with "
            "attn_implementation='sdpa'"
        )
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if layers != {"full_attention"} or (window is not None and window < max_length):
        raise ServingError(f"{config.model_type} attends through windows, which are not served: use full attention")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ServingError(
            f"serve.max_length is {max_length}, but the model has {positions} positions: lower serve.max_length"
        )
