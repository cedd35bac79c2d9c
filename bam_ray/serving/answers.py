"""From deltas to OpenAI's answers: one writer for completions, one for chat, each for streams and for whole answers."""

import time
import uuid
from typing import Protocol

from pydantic import BaseModel

from bam_ray.serving.engine import Delta
from bam_ray.serving.openai_types import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChatTopLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from bam_ray.serving.sampling import TokenLogprob
from bam_ray.serving.text import INCOMPLETE


class Writer(Protocol):
    """Writes one answer."""

    def chunk(self, index: int, delta: Delta) -> BaseModel:
        """A piece of a stream."""
        ...

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The last piece of a stream that reports usage."""
        ...

    def whole(self, deltas: list[Delta], usage: Usage) -> BaseModel:
        """The answer at once; one delta a prompt."""
        ...


class CompletionWriter:
    """A `Writer` of /v1/completions."""

    def __init__(self, model: str) -> None:
        self._id, self._created, self._model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._offsets: dict[int, int] = {}  # characters written of each prompt's completion

    def chunk(self, index: int, delta: Delta) -> Completion:
        return self._completion([self._choice(index, delta)], None)

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, deltas: list[Delta], usage: Usage) -> Completion:
        return self._completion([self._choice(index, delta) for index, delta in enumerate(deltas)], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, index: int, delta: Delta) -> CompletionChoice:
        return CompletionChoice(
            index=index, text=delta.text, logprobs=self._logprobs(index, delta), finish_reason=delta.finish_reason
        )

    def _logprobs(self, index: int, delta: Delta) -> CompletionLogprobs | None:
        if not delta.logprobs:
            return None
        offsets = []
        for entry in delta.logprobs:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(entry.token)
        return CompletionLogprobs(
            tokens=[entry.token for entry in delta.logprobs],
            token_logprobs=[entry.logprob for entry in delta.logprobs],
            top_logprobs=[dict(entry.top) for entry in delta.logprobs],
            text_offset=offsets,
        )


class ChatWriter:
    """A `Writer` of /v1/chat/completions."""

    def __init__(self, model: str) -> None:
        self._id, self._created, self._model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._begun = False

    def chunk(self, index: int, delta: Delta) -> ChatChunk:
        content = {"content": delta.text} if self._begun else {"role": "assistant", "content": delta.text}
        self._begun = True
        choice = ChatChunkChoice(
            index=index, delta=content, logprobs=_chat_logprobs(delta), finish_reason=delta.finish_reason
        )
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=[choice])

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage)

    def whole(self, deltas: list[Delta], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=delta.text),
                logprobs=_chat_logprobs(delta),
                finish_reason=delta.finish_reason,
            )
            for index, delta in enumerate(deltas)
        ]
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


def _chat_logprobs(delta: Delta) -> ChatLogprobs | None:
    return ChatLogprobs(content=[_chat_token(entry) for entry in delta.logprobs]) if delta.logprobs else None


def _chat_token(entry: TokenLogprob) -> ChatTokenLogprob:
    top = [ChatTopLogprob(token=token, logprob=logprob, bytes=_bytes(token)) for token, logprob in entry.top]
    return ChatTokenLogprob(token=entry.token, logprob=entry.logprob, bytes=_bytes(entry.token), top_logprobs=top)


def _bytes(token: str) -> list[int] | None:
    return None if INCOMPLETE in token else list(token.encode())
