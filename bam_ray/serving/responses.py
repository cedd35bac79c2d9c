"""Response builders: convert deltas to OpenAI's responses, whole or as stream chunks, for completions and for chat."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel

from bam_ray.serving.engine import Delta
from bam_ray.serving.openai_responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ResponseMessage,
    Usage,
)
from bam_ray.serving.sampling import TokenLogprob
from bam_ray.serving.served_adapters import AdapterUse
from bam_ray.serving.token_text import readable


class ResponseBuilder(Protocol):
    """A builder of the response to one request.

    Attributes:
        model: The name of the model.
        adapter: The adapter that the request uses, until a response or a chunk has stated it.
    """

    model: str
    adapter: AdapterUse | None

    def chunks(self, index: int, delta: Delta) -> Iterator[BaseModel]:
        """Yield the chunks of a stream for what a completion adds to the output. `index` is that of the completion.

        The last chunk of each completion has the finish reason and no content.
        """
        ...

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """Return the last chunk of a stream that reports usage."""
        ...

    def response(self, deltas: list[Delta], usage: Usage) -> BaseModel:
        """Return the whole response. `deltas` has one delta per completion."""
        ...


@dataclass(frozen=True)
class Echo:
    """A prompt that a completion repeats before its own text."""

    text: str
    first_token: bytes | None  # its first token, in UTF-8; None: log probabilities are not requested
    offsets: Sequence[int] = ()  # of its tokens, in characters; only with log probabilities


class _NamedResponses:
    """The fields that all responses and chunks of one request share."""

    def __init__(self, prefix: str, model: str) -> None:
        self.model, self.adapter = model, None
        self._id, self._created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())

    model: str
    adapter: AdapterUse | None

    def _fields(self) -> dict[str, Any]:
        adapter, self.adapter = self.adapter, None
        return {"id": self._id, "created": self._created, "model": self.model, "adapter": adapter}


class CompletionBuilder(_NamedResponses):
    """A builder of the response to a request to /v1/completions."""

    def __init__(self, model: str, echoes: Sequence[Echo] = ()) -> None:
        """Create a builder for one request.

        Args:
            model: The name of the model.
            echoes: The prompt of each completion, if completions repeat their prompts.
        """
        super().__init__("cmpl", model)
        self._echoes = dict(enumerate(echoes))  # those that have not been sent
        self._prompt_lengths = {index: len(echo.text) for index, echo in enumerate(echoes)}  # in characters

    def chunks(self, index: int, delta: Delta) -> Iterator[Completion]:
        """Yield the chunks of a stream: the text, and the finish reason with an empty text."""
        if index in self._echoes:
            yield self._completion([self._choice(index, replace(delta, finish_reason=None))], None)
            delta = Delta(finish_reason=delta.finish_reason)
        for part in _parts(delta):
            yield self._completion([self._choice(index, part)], None)

    def usage_chunk(self, usage: Usage) -> Completion:
        """Return the last chunk of a stream that reports usage."""
        return self._completion([], usage)

    def response(self, deltas: list[Delta], usage: Usage) -> Completion:
        """Return the whole response."""
        return self._completion([self._choice(index, delta) for index, delta in enumerate(deltas)], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(**self._fields(), choices=choices, usage=usage)

    def _choice(self, index: int, delta: Delta) -> CompletionChoice:
        echo = self._echoes.pop(index, None)
        return CompletionChoice(
            index=index,
            text=delta.text if echo is None else echo.text + delta.text,
            logprobs=self._logprobs(index, delta, echo),
            routing=delta.routing or None,
            finish_reason=delta.finish_reason,
        )

    def _logprobs(self, index: int, delta: Delta, echo: Echo | None) -> CompletionLogprobs | None:
        entries = delta.logprobs if echo is None else (*delta.prompt_logprobs, *delta.logprobs)
        first = [] if echo is None or echo.first_token is None else [echo.first_token]
        if not first and not entries:
            return None
        start = self._prompt_lengths.get(index, 0)
        return CompletionLogprobs(
            tokens=[_completion_token(token) for token in (*first, *(entry.token for entry in entries))],
            token_logprobs=[*(None for _ in first), *(entry.logprob for entry in entries)],
            top_logprobs=[*(None for _ in first), *map(_top_logprobs, entries)],
            text_offset=[*(echo.offsets if echo else ()), *(start + entry.offset for entry in delta.logprobs)],
        )


class ChatBuilder(_NamedResponses):
    """A builder of the response to a request to /v1/chat/completions."""

    def __init__(self, model: str) -> None:
        super().__init__("chatcmpl", model)
        self._begun: set[int] = set()  # indices of the choices whose role was sent

    def chunks(self, index: int, delta: Delta) -> Iterator[ChatChunk]:
        """Yield the chunks of a stream: the role, the content, and the finish reason with an empty delta."""
        if index not in self._begun:
            self._begun.add(index)
            yield self._chunk(ChatChunkChoice(index=index, delta={"role": "assistant", "content": ""}))
        for part in _parts(delta):
            content = {} if part.finish_reason is not None else {"content": part.text}
            yield self._chunk(
                ChatChunkChoice(
                    index=index,
                    delta=content,
                    logprobs=_chat_logprobs(part),
                    routing=part.routing or None,
                    finish_reason=part.finish_reason,
                )
            )

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """Return the last chunk of a stream that reports usage."""
        return ChatChunk(**self._fields(), choices=[], usage=usage)

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(**self._fields(), choices=[choice])

    def response(self, deltas: list[Delta], usage: Usage) -> ChatCompletion:
        """Return the whole response."""
        choices = [
            ChatChoice(
                index=index,
                message=ResponseMessage(content=delta.text),
                logprobs=_chat_logprobs(delta),
                routing=delta.routing or None,
                finish_reason=delta.finish_reason,
            )
            for index, delta in enumerate(deltas)
        ]
        return ChatCompletion(**self._fields(), choices=choices, usage=usage)


def _parts(delta: Delta) -> Iterator[Delta]:
    """Yield the content of a delta and its finish reason as two deltas, without empty ones.

    A delta has no text if a character is incomplete or a stop string may have started.
    """
    if delta.text or delta.logprobs or delta.routing:
        yield replace(delta, finish_reason=None)
    if delta.finish_reason is not None:
        yield Delta(finish_reason=delta.finish_reason)


def _chat_logprobs(delta: Delta) -> ChatLogprobs | None:
    return ChatLogprobs(content=[_chat_token(entry) for entry in delta.logprobs]) if delta.logprobs else None


def _chat_token(entry: TokenLogprob) -> ChatTokenLogprob:
    top = [ChatTopLogprob(**_chat_fields(each)) for each in entry.top]
    return ChatTokenLogprob(**_chat_fields(entry), top_logprobs=top)


def _chat_fields(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": readable(entry.token), "logprob": entry.logprob, "bytes": list(entry.token)}


def _completion_token(token: bytes) -> str:
    return readable(token, "bytes:")


def _top_logprobs(entry: TokenLogprob) -> dict[str, float]:
    """Return the most likely tokens and the token itself. Of several with the same text, the most likely one counts."""
    found: dict[str, float] = {}
    for each in (*entry.top, entry):
        found.setdefault(_completion_token(each.token), each.logprob)
    return found
