"""The decode engine: continuous batching of any causal language model that follows the conventions of transformers.

Requests join and leave between steps. A step generates one token for every request whose prompt is complete, in one
forward pass whatever the lengths, and computes chunks of the other prompts. The output of a request equals the output
that it would have alone.

    engine = DecodeEngine(model, tokenizer, slots=8, max_length=512)
    generation = engine.add(prompt, SamplingParams(max_tokens=16, temperature=0))
    while engine.active:
        for generation, output in engine.step():
            print(output.sampled, output.finish_reason)

Each request reserves memory for its prompt and its longest completion when it starts, so it can always finish.

The engine knows tokens only: `detokenizer.TextStream` makes text of them, and finds stop strings. The engine is not
thread-safe. `bam_ray.serving.scheduler` drives it from asyncio.
"""

import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bam_ray.errors import ServingError
from bam_ray.model.one_expert import EXCLUDED
from bam_ray.serving.blocks import Block, Blocks
from bam_ray.serving.cache import SlotCache, slot_attention
from bam_ray.serving.grammar import Grammars
from bam_ray.serving.lora import BASE_SLOT, LoraSlots, SlotAdapter
from bam_ray.serving.model_properties import check_attention, end_tokens
from bam_ray.serving.plan import PlanState, RunningRequest, StepPlan, WaitingRequest, plan_step
from bam_ray.serving.prefix_cache import PrefixCache
from bam_ray.serving.sampler import Sampled, TokenSampler, prompt_logprobs
from bam_ray.serving.sampling import SamplingParams, SamplingState, TokenLogprob
from bam_ray.serving.token_routing import RoutingLayout, RoutingReader, TokenRouting

_T = TypeVar("_T")
FinishReason = Literal["stop", "length"]
SHORTEST_BLOCK = 64
"""The least length of a block of memory, in tokens. Shorter requests take one of these."""
STATE_BLOCKS = 2
"""The number of such blocks after which the state of routers that read the prefix is stored for the prefix cache. A
forward pass of a prompt ends there, so smaller numbers make prompts slower and larger ones find shorter prefixes."""
PROMPT_TOKENS = {"cpu": 24, "cuda": 512}
"""The default number of tokens of prompts that a step computes beside requests that decode. With 24, a step takes
about 3 times the median step of 8 streams while a prompt of 2,000 tokens joins them (`benchmarks.prefix_cache`)."""
PROMPT_TOKENS_ALONE = 512
"""The same, if no request decodes."""


@dataclass(frozen=True)
class Output:
    """The output that a step adds to a request."""

    sampled: Sampled | None = None  # the new token
    routing: TokenRouting | None = None  # that of the new token, with `SamplingParams.routing`
    prompt: tuple[Sampled, ...] = ()  # the second and later tokens of the prompt, with `SamplingParams.prompt_logprobs`
    finish_reason: FinishReason | None = None  # set on the last output only
    error: Exception | None = None  # the error that has ended the request in place of a finish reason
    cached: int = 0  # the tokens of the prompt whose keys and values were copied; on one output of a prompt

    @property
    def is_last(self) -> bool:
        """True if no output of the request follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class Delta:
    """The output that one or more steps add to a request, as text."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None  # set on the last delta only
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the second and later tokens of the prompt; on the first delta
    routing: tuple[TokenRouting, ...] = ()  # of each token, with `SamplingParams.routing`
    cached: int = 0  # the tokens of the prompt that were found in the prefix cache

    def __add__(self, after: "Delta") -> "Delta":
        return Delta(
            self.text + after.text,
            self.tokens + after.tokens,
            self.logprobs + after.logprobs,
            after.finish_reason,
            self.prompt_logprobs + after.prompt_logprobs,
            self.routing + after.routing,
            self.cached + after.cached,
        )


class Generation:
    """One completion of a prompt of at least one token, and its decoding state once it has started.

    Attributes:
        id: A number that no other completion of the process has.
        copies: The other completions of the prompt (`SamplingParams.n`). They start with this one, and take a copy of
            its keys and values when the prompt is complete.
        adapter: The adapter that it uses; None: the base model.
        length: The number of tokens whose keys and values are stored, which are all but the newest one.
        cached: The number of tokens of the prompt whose keys and values were copied from other requests.
        sampling: The state of its sampling.
    """

    _ids = itertools.count()

    block: Block

    def __init__(
        self, prompt: list[int], params: SamplingParams, choice: int = 0, adapter: SlotAdapter | None = None
    ) -> None:
        self.id = next(self._ids)
        self.prompt, self.params, self.adapter = prompt, params, adapter
        self.copies = [] if choice else [Generation(prompt, params, other, adapter) for other in range(1, params.n)]
        self.sampling = SamplingState(params, prompt, choice)
        self.prompt_logprobs: list[Sampled] = []
        self.routing: TokenRouting | None = None  # that of the next token, if it is requested
        self.length = self.cached = 0
        self.token = prompt[-1]  # the newest token
        self.completion: list[int] = []

    @property
    def left(self) -> int:
        """The number of tokens of the prompt that are not computed yet."""
        return max(0, len(self.prompt) - self.length)

    @property
    def stored_tokens(self) -> list[int]:
        """The tokens whose keys and values are stored, if a sampled token tells that they are finite."""
        return [*self.prompt, *self.completion][: self.length] if self.completion else []

    @property
    def cache_key(self) -> Hashable:
        """All that its keys and values depend on besides tokens."""
        return self.adapter and self.adapter.key, self.params.expert_weights


class DecodeEngine:
    """An engine that decodes up to `slots` requests together, each with a prompt and completion of `max_length` tokens.

    The constructor computes the longest prompt and runs one step, which allocates the memory of all requests. A machine
    with too little memory therefore fails at start and not under load.

    Attributes:
        lora: The slots of the model's adapters; None: no request may use an adapter.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        slots: int,
        max_length: int,
        *,
        kv_tokens: int | None = None,
        tokens_per_step: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        """Create an engine and allocate its memory.

        Args:
            model: A causal language model on its device, with SDPA attention.
            tokenizer: The tokenizer of the model.
            slots: The maximum number of requests that are decoded together.
            max_length: The maximum number of tokens of a request, prompt and completion together.
            kv_tokens: The number of tokens whose keys and values fit the memory, rounded up to requests of
                `max_length`. None: `slots` requests of `max_length`. With fewer, more short requests than long ones can
                be decoded together.
            tokens_per_step: The number of tokens that a step computes: one for each request that decodes, and the rest
                for prompts. None: `slots` and `PROMPT_TOKENS` of the device, or `PROMPT_TOKENS_ALONE`.
            prefix_cache: Requests whose prompts begin alike share the computed keys and values (`PrefixCache`).

        Raises:
            ServingError: The engine cannot reproduce the model's attention.
        """
        check_attention(model.config, max_length)
        self.tokenizer = tokenizer
        self.slots = slots
        self.max_length = max_length
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        beside = PROMPT_TOKENS.get(model.device.type, PROMPT_TOKENS_ALONE)
        self._budget = tokens_per_step or slots + beside
        self._budget_alone = tokens_per_step or PROMPT_TOKENS_ALONE
        self.memory = Blocks(kv_tokens or slots * max_length, max_length, SHORTEST_BLOCK)
        self._empty = self.memory.counts
        self._model = model.eval()
        self.lora: LoraSlots | None = None
        self.routing_layout = RoutingLayout.of(model.config)
        self._routing = None if self.routing_layout is None else RoutingReader(model)
        self.has_router_prior = getattr(model.config, "router_prior", "none") != "none"
        self._device: torch.device = model.device
        # A tokenizer may have more tokens than the model
        self._end_tokens = {token for token in end_tokens(model, tokenizer) if token < self.vocab_size}
        self._special_tokens = {
            added.content: token
            for token, added in tokenizer.added_tokens_decoder.items()
            if added.special and token < self.vocab_size
        }
        self.grammars = Grammars(tokenizer, self.vocab_size, self._end_tokens)
        self._cache = SlotCache(slots, self.memory.size, STATE_BLOCKS * self.memory.unit if prefix_cache else 0)
        self.prefixes = PrefixCache(self.memory, self._cache)
        self._active: dict[int, Generation] = {}  # by id, in the order in which they started
        self._free_rows = [*reversed(range(slots))]
        self._sampler = TokenSampler(slots, self.vocab_size, self._device)
        for length in (max_length - 1, 1):
            self.test(length)
        self.prefixes.enabled = prefix_cache

    def test(self, length: int = 1) -> None:
        """Compute a prompt of `length` tokens and a token after it. Raises any error that the model raises."""
        generation = self.add([0] * length, SamplingParams(max_tokens=2, temperature=0))
        try:
            while generation.id in self._active:
                # Of this request alone: nobody would receive the output of the others
                state = PlanState([], [RunningRequest(generation.id, generation.left)], 0, self.memory.counts)
                for _, output in self.step(plan_step(state, self._budget_alone)):
                    if output.error is not None:
                        raise output.error
        finally:
            self.remove(generation)

    @property
    def active(self) -> int:
        """The number of requests that have started and not ended."""
        return len(self._active)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return len(self._free_rows)

    def has_started(self, id_: int) -> bool:
        """Return True if a request has started and not ended."""
        return id_ in self._active

    def check_size(self, prompt: int, params: SamplingParams) -> None:
        """Raise `ServingError` if the completions of a prompt of `prompt` tokens can never be decoded together."""
        reserved = min(prompt + params.max_tokens, self.max_length)
        if params.n > self.slots or self._empty.without(reserved, params.n) is None:
            raise ServingError(
                f"{params.n} completions of {reserved} tokens do not fit {self.slots} requests and the memory of "
                f"{self.memory.size} tokens: lower n"
            )

    def waiting_request(self, generation: Generation, tenant: str = "") -> WaitingRequest:
        """Return what a plan has to know of a request before it starts."""
        tokens = len(generation.prompt)
        reserved = min(tokens + generation.params.max_tokens, self.max_length)
        return WaitingRequest(generation.id, tenant, tokens, reserved, 1 + len(generation.copies))

    def plan(self, waiting: list[WaitingRequest], served: dict[str, float]) -> StepPlan:
        """Return the plan of the next step (`plan_step`)."""
        running = [RunningRequest(each.id, each.left) for each in self._active.values()]
        decodes = any(not request.left for request in running)
        budget = self._budget if decodes else self._budget_alone
        return plan_step(PlanState(waiting, running, self.free, self.memory.counts, served), budget)

    def add(self, prompt: list[int], params: SamplingParams, adapter: SlotAdapter | None = None) -> Generation:
        """Start a request with a prompt of 1 to `max_length` - 1 tokens. Its slots and its memory must be free."""
        generation = Generation(prompt, params, adapter=adapter)
        self.start(generation)
        return generation

    @torch.inference_mode()
    def start(self, generation: Generation) -> None:
        """Start a request that a plan starts."""
        assert self.free > len(generation.copies) and 0 < len(generation.prompt) < self.max_length
        # Special tokens are left out of the text, so a stop string that is one must be found among the tokens
        params = generation.params
        special = [self._special_tokens[stop] for stop in params.stop if stop in self._special_tokens]
        end_tokens = set() if params.ignore_eos else self._end_tokens
        stop_tokens = frozenset({*special, *end_tokens, *params.stop_token_ids})
        reserved = self.waiting_request(generation).reserved
        prefix = self.prefixes.begin(generation, self._active.values())  # before its memory is taken
        taken = []
        try:
            for each in (generation, *generation.copies):
                each.sampling.stop_tokens = stop_tokens
                each.sampling.matcher = None if params.grammar is None else self.grammars.matcher(params.grammar)
                each.block = self.prefixes.take(reserved)
                each.sampling.row = self._free_rows.pop()
                taken.append(each)
                self._sampler.start(each.sampling)
                if each is generation:
                    self.prefixes.copy(prefix, generation)
        except BaseException:
            for each in taken:
                self._release(each)
            raise
        self._active[generation.id] = generation

    @torch.inference_mode()
    def step(self, plan: StepPlan | None = None) -> list[tuple[Generation, Output]]:
        """Compute a plan, and free the slots of the requests that end.

        If the computation fails, each request is computed again alone, so that only those that cause an error end
        (`Output.error`).

        Lower bound of the memory traffic of a step: the weights that its tokens use once, the keys and values of all
        requests that decode, and 4 · V bytes of logits for each.

        Args:
            plan: The work of the step. None: one token of every request, and as much of the prompts as the budget of
                the step allows.
        """
        plan = plan or self.plan([], {})
        outputs: list[tuple[Generation, Output]] = []
        decoding = sorted((self._active[id_] for id_ in plan.decode), key=lambda each: (each.block.length, each.block))
        ready: list[tuple[list[Generation], Tensor]] = []  # with the logits of their next tokens [B, V]
        with slot_attention(self._model):
            if decoding:
                ready += self._attempt(decoding, self._decode, outputs)
            for chunk in plan.chunks:
                generation = self._active[chunk.id]
                self.prefixes.extend(generation, self._active.values())
                tokens = min(chunk.tokens, generation.left)
                computed = self._attempt([generation], partial(self._prefill, tokens=tokens), outputs)
                if computed and not generation.left:
                    ready += self._finish_prompt(generation, computed[0][1], outputs)
        if ready:
            outputs += self._sample([each for group, _ in ready for each in group], [logits for _, logits in ready])
        for generation, output in outputs:
            if output.error is not None:
                self._cache.zero(generation.block)  # masked keys are multiplied by 0, and 0 × NaN is NaN
                generation.length = 0
            if output.is_last:
                self.remove(generation)
        return outputs

    def _attempt(
        self,
        group: list[Generation],
        compute: Callable[[list[Generation]], _T],
        outputs: list[tuple[Generation, Output]],
    ) -> list[tuple[list[Generation], _T]]:
        """Return the results of the requests that can be computed, together or alone. Errors go to `outputs`."""
        try:
            return [(group, compute(group))]
        except Exception as error:
            if len(group) == 1:
                outputs.append((group[0], Output(error=error)))
                return []
        return [result for generation in group for result in self._attempt([generation], compute, outputs)]

    def _prefill(self, group: list[Generation], tokens: int) -> Tensor:
        """Compute the next `tokens` tokens of the prompt of one request, and return the logits after them, [1, V]."""
        (generation,) = group
        stop = generation.length + tokens
        while (end := self._cache.end_of_pass(generation.length)) < stop:
            self._forward_prompt(generation, end)
        return self._forward_prompt(generation, stop)

    def _forward_prompt(self, generation: Generation, stop: int) -> Tensor:
        """Compute the prompt of a request up to its token `stop`, and return the logits after it, [1, V]."""
        start = generation.length
        positions = torch.arange(start, stop, device=self._device)[None]
        self._cache.prefill(generation.block, generation.sampling.row, positions, start)
        input_ids = torch.tensor([generation.prompt[start:stop]], device=self._device)
        top = generation.params.prompt_logprobs
        logits = self._forward(input_ids, positions, 1 if top is None else 0, [generation])
        targets = generation.prompt[start + 1 : stop + 1]
        if top is not None and targets:
            generation.prompt_logprobs += prompt_logprobs(logits[0, : len(targets)].float(), targets, top)
        generation.length = stop
        return logits[:, -1].float()

    def _finish_prompt(
        self, generation: Generation, logits: Tensor, outputs: list[tuple[Generation, Output]]
    ) -> list[tuple[list[Generation], Tensor]]:
        """Begin all completions of a prompt whose last logits are `logits` [1, V], and return them with the logits."""
        group = [generation, *generation.copies]
        for copy in generation.copies:
            self._cache.copy(generation.block, copy.block, generation.length)
            self._cache.copy_row(generation.sampling.row, copy.sampling.row)
            copy.length, copy.routing = generation.length, generation.routing
            self._active[copy.id] = copy
        generation.copies = []
        if generation.prompt_logprobs:
            scores = tuple(generation.prompt_logprobs)
            outputs += [(each, Output(prompt=scores)) for each in group]
        if generation.cached:
            outputs.append((generation, Output(cached=generation.cached)))
        if generation.params.max_tokens == 0:
            outputs += [(each, Output(finish_reason="length")) for each in group]
            return []
        return [(group, logits.expand(len(group), -1))]

    def _decode(self, group: list[Generation]) -> Tensor:
        """Compute the newest token of each request, and return the logits after them, [B, V]."""
        lengths = [each.length for each in group]
        positions = torch.tensor(lengths, device=self._device)[:, None]
        self._cache.decode([each.block for each in group], [each.sampling.row for each in group], positions, lengths)
        input_ids = torch.tensor([[each.token] for each in group], device=self._device)
        logits = self._forward(input_ids, positions, 1, group)[:, -1].float()
        for generation in group:
            generation.length += 1
        return logits

    def _forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: int, group: list[Generation]) -> Tensor:
        """Return the logits of the last position [B, 1, V], or of all positions [B, C, V] if `logits_to_keep` is 0."""
        if self.lora is not None:
            self.lora.select([BASE_SLOT if each.adapter is None else each.adapter.slot for each in group])
        reader = self._routing if any(each.params.routing for each in group) else None
        output = self._model(
            input_ids=input_ids,
            position_ids=position_ids,
            cache=self._cache,
            slots=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **({"output_router_logits": True} if reader is not None else {}),
            **self._router_prior(group),
        )
        self._cache.commit()
        if reader is not None:
            for generation, routing in zip(group, reader(output, len(group)), strict=True):
                generation.routing = routing
        logits: Tensor = output.logits
        return logits

    def _router_prior(self, group: list[Generation]) -> dict[str, Tensor]:
        """Return the argument of the model that replaces the router prior of the requests that want it."""
        weights = [each.params.expert_weights for each in group]
        experts = next((len(each) for each in weights if each is not None), None)
        if experts is None:
            return {}
        rows = [[math.nan] * experts if each is None else each for each in weights]
        return {"router_prior": torch.tensor(rows, device=self._device).log().clamp_min(EXCLUDED)}  # NaN stays

    @torch.inference_mode()
    def remove(self, generation: Generation) -> None:
        """Free the slot and the memory of a request. Does nothing if the request has ended.

        The last of the blocks of the same length moves to the freed one, so that they stay neighbors.
        """
        if self._active.pop(generation.id, None) is None:
            return
        for each in (generation, *generation.copies):
            if each.length and not each.completion:  # no sampled token tells that its keys and values are finite
                self._cache.zero(each.block)
            self._exchange_with_last(each)
            self._release(each, each.stored_tokens)

    def clear(self) -> None:
        """Drop all requests."""
        for generation in self._active.values():
            for each in (generation, *generation.copies):
                self._release(each)
        self._active.clear()
        self.prefixes.clear()

    def _release(self, generation: Generation, tokens: list[int] | None = None) -> None:
        self._free_rows.append(generation.sampling.row)
        self.prefixes.release(generation.block, generation.cache_key, tokens)

    def _exchange_with_last(self, leaving: Generation) -> None:
        """Move the last block of the same length to the block of a request that leaves."""
        same = [each for each in self._active.values() if each.block.length == leaving.block.length]
        last = max(same, key=lambda each: each.block.start, default=leaving)
        if last.block.start > leaving.block.start:
            kept = len(leaving.stored_tokens) if self.prefixes.enabled else 0
            self._cache.exchange(last.block, leaving.block, (last.length, kept))
            last.block, leaving.block = leaving.block, last.block

    def _sample(self, group: list[Generation], parts: list[Tensor]) -> list[tuple[Generation, Output]]:
        """Select the next token of each request from its logits, `parts` of [B, V], and return what they add."""
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        outputs: list[tuple[Generation, Output]] = []

        def sample(some: list[Generation]) -> list[Sampled]:
            rows = logits if len(some) == len(group) else logits[[group.index(each) for each in some]]
            return self._sampler(rows, [each.sampling for each in some])

        for some, sampled in self._attempt(group, sample, outputs):
            outputs += [(each, self._append_token(each, token)) for each, token in zip(some, sampled, strict=True)]
        return outputs

    def _append_token(self, generation: Generation, sampled: Sampled) -> Output:
        """Add a token to a request, and return what it adds to the output."""
        if not sampled.is_finite:
            return Output(error=ServingError("the logits of the model are not finite"))
        state, generation.token = generation.sampling, sampled.token
        generation.completion.append(sampled.token)
        state.generated += 1
        full = state.generated >= generation.params.max_tokens or generation.length + 1 >= self.max_length
        ended = sampled.token in state.stop_tokens
        routing = generation.routing if generation.params.routing else None
        return Output(sampled, routing, finish_reason="stop" if ended else "length" if full else None)
