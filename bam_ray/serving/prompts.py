"""Conversion of a request's text, tokens or messages to validated token ids."""

import asyncio
import logging
import math
import reprlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from jinja2.exceptions import TemplateError

from bam_ray.errors import Overloaded, ServingError, encodable
from bam_ray.serving.engine import DecodeEngine
from bam_ray.serving.openai_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
)
from bam_ray.serving.responses import Echo
from bam_ray.serving.sampling import SamplingParams
from bam_ray.serving.token_text import TokenTexts, text_offsets
from bam_ray.serving.turns import Turns

_logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Result = TypeVar("Result")

MAX_WAITING = 256  # requests that wait to be tokenized

FALLBACK_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""The chat template for tokenizers without one. Base models have seen dialogs of this form."""
FALLBACK_STOPS = ("\nuser:",)  # the model would continue such a dialog with the user's next turn


class PromptReader:
    """A reader of the prompts of requests.

    Templates and tokenizers run on one thread, so that the event loop stays free. It goes round the tenants, and serves
    the requests of each in their order.
    """

    def __init__(self, engine: DecodeEngine, max_prompts: int, max_tokens: int) -> None:
        """Create a reader.

        Args:
            engine: The engine that the prompts are for.
            max_prompts: The maximum number of prompts in a request.
            max_tokens: The maximum number of tokens of all prompts of a request.
        """
        self._engine = engine
        self._max_prompts, self._max_tokens = max_prompts, max_tokens
        # No text of more characters fits, because a token has at least as many as it stands for
        self._max_characters = engine.max_length * max(map(len, engine.tokenizer.get_vocab()))
        self._token_texts = TokenTexts(engine.tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        self._turns = Turns(MAX_WAITING, "to be tokenized")

    async def completion_prompts(self, request: CompletionRequest, tenant: str) -> list[list[int]]:
        """Return the token ids of each prompt.

        Raises:
            RequestError: A prompt cannot be served.
            Overloaded: Too many requests wait to be tokenized.
        """
        check_prompts(request, self._max_prompts)
        for prompt in request.prompts:
            self._check_size(prompt, "prompt")
        prompts = await self._on_thread(tenant, self._tokenize_all, request)
        tokens = sum(map(len, prompts))
        if tokens > self._max_tokens:
            message = f"the prompts have {tokens} tokens, but those of a request may have {self._max_tokens}: send less"
            raise RequestError(400, message, param="prompt")
        return prompts

    async def echoes(self, request: CompletionRequest, prompts: list[list[int]], tenant: str) -> list[Echo]:
        """Return the prompt of each completion, or nothing if the request has no `echo`. `prompts` are its prompts.

        Raises:
            Overloaded: Too many requests wait to be tokenized.
        """
        return await self._on_thread(tenant, partial(self._read_echoes, prompts), request) if request.echo else []

    async def chat_prompt(self, request: ChatRequest, tenant: str) -> tuple[list[int], tuple[str, ...]]:
        """Return the token ids of a dialog and the stop strings that its template needs.

        Raises:
            RequestError: The dialog cannot be served.
            Overloaded: Too many requests wait to be tokenized.
        """
        return await self._on_thread(tenant, self._read_chat, request)

    async def complete(
        self, params: SamplingParams, domain: str | dict[str, float] | None, tenant: str
    ) -> SamplingParams:
        """Compile the grammar of the output, if there is one, and return the parameters with the weights of experts.

        Raises:
            RequestError: The grammar or the domain is wrong.
            Overloaded: Too many requests wait to be tokenized.
        """
        if params.grammar is not None:
            try:
                await self._on_thread(tenant, self._engine.grammars.matcher, params.grammar)
            except Overloaded:
                raise
            except ServingError as error:
                raise RequestError(400, str(error), param="response_format") from None
        return replace(params, expert_weights=_expert_weights(self._engine, domain))

    async def tokens(self, request: TokenizeRequest, tenant: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            RequestError: The text is longer than any prompt that can be served.
            Overloaded: Too many requests wait to be tokenized.
        """
        self._check_size(request.prompt, "prompt")
        return await self._on_thread(tenant, lambda each: self._tokenize(each.prompt, each.add_special_tokens), request)

    async def text(self, request: DetokenizeRequest, tenant: str) -> str:
        """Return the text of tokens.

        Raises:
            RequestError: There are more tokens than in any prompt that can be served, or one is unknown.
            Overloaded: Too many requests wait to be tokenized.
        """
        self._check_size(request.tokens, "tokens")
        _check_tokens(self._engine, request.tokens, "tokens")
        return await self._on_thread(tenant, lambda each: self._decode(each.tokens), request)

    async def first_text(self, request: CompletionRequest, prompts: list[list[int]], tenant: str) -> str:
        """Return the text of the first prompt without special tokens. `prompts` are those of the request.

        Raises:
            Overloaded: Too many requests wait to be tokenized.
        """
        first = request.prompts[0]
        if isinstance(first, str):
            return first
        return await self._on_thread(tenant, partial(self._decode, skip_special_tokens=True), prompts[0])

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _on_thread(self, tenant: str, function: Callable[[Request], Result], request: Request) -> Result:
        async with self._turns.turn(tenant):
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, request)

    def _tokenize_all(self, request: CompletionRequest) -> list[list[int]]:
        """Return the token ids of each prompt. Stops at the first one that cannot be served."""
        return [
            _validated(
                self._engine,
                self._tokenize(prompt, special=True) if isinstance(prompt, str) else prompt,
                request.max_tokens,
                "prompt",
            )
            for prompt in request.prompts
        ]

    def _read_echoes(self, prompts: list[list[int]], request: CompletionRequest) -> list[Echo]:
        scored = request.logprobs is not None
        echoes = [self._echo(given, prompt, scored) for given, prompt in zip(request.prompts, prompts, strict=True)]
        return [echo for echo in echoes for _ in range(request.n or 1)]

    def _echo(self, given: str | list[int], prompt: list[int], scored: bool) -> Echo:
        decoded = self._decode(prompt)
        text = encodable(given) if isinstance(given, str) else decoded
        if not scored:
            return Echo(text, None)
        # A text lacks the special tokens that the tokenizer adds to it
        hidden = set(self._engine.tokenizer.all_special_ids) if text != decoded else ()
        shown = (b"" if token in hidden else self._token_texts[token] for token in prompt)
        return Echo(text, self._token_texts[prompt[0]], text_offsets(shown, text))

    def _read_chat(self, request: ChatRequest) -> tuple[list[int], tuple[str, ...]]:
        own_template = getattr(self._engine.tokenizer, "chat_template", None)
        text = self._apply_template(own_template or FALLBACK_TEMPLATE, request)
        self._check_size(text, "messages")
        # The tokenizer's own template writes the special tokens itself
        prompt = self._tokenize(text, special=own_template is None)
        max_tokens = request.max_completion_tokens or request.max_tokens
        return _validated(self._engine, prompt, max_tokens, "messages"), () if own_template else FALLBACK_STOPS

    def _apply_template(self, template: str, request: ChatRequest) -> str:
        messages = [
            {**(message.model_extra or {}), "role": message.role, "content": message.text}
            for message in request.messages
        ]
        try:
            return str(
                self._engine.tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template is a program of the model's author, so it may fail in any way
            _logger.info("a chat template failed", exc_info=error)
            # A template's own message is meant for the client, and that of Python is not
            reason = str(error) if isinstance(error, TemplateError) else f"it fails with {type(error).__name__}"
            message = f"the model's chat template rejects these messages: {reason}"
            raise RequestError(400, message, param="messages") from None

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return list(self._engine.tokenizer(encodable(text), add_special_tokens=special, verbose=False).input_ids)

    def _decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        decode = self._engine.tokenizer.decode
        return str(decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    def _check_size(self, prompt: str | list[int], param: str) -> None:
        """Raise `RequestError` for a prompt that cannot fit, before it is tokenized."""
        unit, limit = (
            ("characters", self._max_characters) if isinstance(prompt, str) else ("tokens", self._engine.max_length)
        )
        if len(prompt) > limit:
            message = (
                f"a prompt has {len(prompt)} {unit}, but {self._engine.max_length} tokens are the most: shorten it"
            )
            raise RequestError(400, message, code="context_length_exceeded", param=param)


def check_prompts(request: CompletionRequest, max_prompts: int) -> None:
    """Raise `RequestError` for a request without a prompt, or with more than `max_prompts`."""
    if not request.prompts:
        raise RequestError(400, "prompt is an empty list: pass at least one prompt", param="prompt")
    if len(request.prompts) > max_prompts:
        message = f"prompt has {len(request.prompts)} prompts, but a request may have {max_prompts}: send less"
        raise RequestError(400, message, param="prompt")


def _validated(engine: DecodeEngine, prompt: list[int], max_tokens: int | None, param: str) -> list[int]:
    """Return the prompt, or the start token if the prompt is empty.

    Raises `RequestError` if the prompt cannot be continued.
    """
    if not prompt:
        if engine.tokenizer.bos_token_id is None:
            message = f"{param} is empty, and the model has no start token: pass at least one token"
            raise RequestError(400, message, param=param)
        prompt = [engine.tokenizer.bos_token_id]
    _check_tokens(engine, prompt, param)
    if len(prompt) + (max_tokens or 1) > engine.max_length:
        raise RequestError(
            400,
            f"prompt and completion together may have at most {engine.max_length} tokens, but this prompt has "
            f"{len(prompt)} and requests {max_tokens or 'at least 1'} more: shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
            param=param,
        )
    return prompt


def _check_tokens(engine: DecodeEngine, tokens: list[int], param: str) -> None:
    """Raise `RequestError` if a token is not in the vocabulary."""
    if not all(0 <= token < engine.vocab_size for token in tokens):
        message = f"{param} contains a token that is not in [0, {engine.vocab_size}): use this model's tokenizer"
        raise RequestError(400, message, param=param)


def _expert_weights(engine: DecodeEngine, domain: str | dict[str, float] | None) -> tuple[float, ...] | None:
    """Return the weight of each expert for a domain or weights over domains, or None if the request names none."""
    if domain is None:
        return None
    layout = engine.routing_layout
    if layout is None or not engine.has_router_prior:
        raise RequestError(400, "domain needs a mixture whose routers have a prior: omit it", param="domain")
    weights = {domain: 1.0} if isinstance(domain, str) else domain
    unknown = next((name for name in weights if name not in layout.experts), None)
    if unknown is not None:
        message = f"domain {reprlib.repr(unknown)} is no expert of this model: use {', '.join(layout.experts)}"
        raise RequestError(400, message, param="domain")
    total = sum(weights.values())
    if not 0 < total < math.inf:
        raise RequestError(400, "the weights of domain must have a sum above 0", param="domain")
    return tuple(weights.get(name, 0.0) / total for name in layout.experts)
