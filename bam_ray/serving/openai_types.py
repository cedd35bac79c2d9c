"""The request and response types of the endpoint: the supported part of OpenAI's completions and chat API.

Unsupported fields that would change the output are rejected, never ignored silently. Unknown fields that do not affect
the output (user, metadata, store) are accepted.
"""

import textwrap
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bam_ray.errors import ServingError, one_line, printable
from bam_ray.serving.engine import FinishReason
from bam_ray.serving.sampling import SamplingParams

MAX_STOPS = 16  # OpenAI's limit is 4, and clients of local servers send more
MAX_SHOWN_CHARACTERS = 80  # of a value in an error
MAX_LOGPROBS = 20  # OpenAI's limit for chat; its limit of 5 for completions is lower


class RequestError(ServingError):
    """A request that cannot be served. `status` is the HTTP status code of the response."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class ErrorBody(BaseModel):
    """The description of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorBody

    @classmethod
    def from_error(cls, error: ServingError) -> Self:
        """Convert an error. A `RequestError` below 500 is the client's error, any other is the server's."""
        message = one_line(error, all_lines=True)  # it may quote a part of the request that cannot be encoded
        if isinstance(error, RequestError) and error.status < 500:
            kind = "invalid_request_error"
            param = error.param and printable(error.param)
            return cls(error=ErrorBody(message=message, type=kind, param=param, code=error.code))
        return cls(error=ErrorBody(message=message, type="server_error", code="server_error"))


class StreamOptions(BaseModel):
    """The options of a stream."""

    include_usage: bool | None = False


class GenerationRequest(BaseModel):
    """The fields that completion and chat requests share."""

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {  # field -> the values that have no effect
        "n": (None, 1),
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "logit_bias": (None, {}),
    }

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _reject_unsupported(self) -> Self:
        for name, neutral in self.unsupported.items():
            value = (self.model_extra or {}).get(name)
            if value not in neutral:
                shown = textwrap.shorten(repr(value), MAX_SHOWN_CHARACTERS)
                raise RequestError(400, f"{name}={shown} is not supported: omit it", "unsupported_value", name)
        if len(self.stops) > MAX_STOPS or "" in self.stops:
            raise RequestError(400, f"stop accepts up to {MAX_STOPS} non-empty strings", param="stop")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with a chunk that states the token usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(
        self, max_tokens: int, logprobs: int | None, more_stops: tuple[str, ...] = ()
    ) -> SamplingParams:
        """Return the sampling parameters. OpenAI's defaults for temperature and top_p are 1."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stops + more_stops,
            logprobs=logprobs,
        )


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    unsupported = {**GenerationRequest.unsupported, "best_of": (None, 1), "echo": (None, False), "suffix": (None, "")}

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or token ids. Without one, a text is generated from its beginning."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt or ""]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]  # the check above excludes list[int]


class TextPart(BaseModel):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class RequestMessage(BaseModel):
    """One turn of a chat request. A turn of the assistant that only called tools has no content."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[TextPart] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"the content of a message of role {self.role!r} is missing")
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    unsupported = {
        **GenerationRequest.unsupported,
        "tools": (None, []),
        "functions": (None, []),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
    }

    messages: Annotated[list[RequestMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # OpenAI's newer name of max_tokens
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class Usage(BaseModel):
    """The number of prompt and completion tokens. An end-of-text token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerationResponse(BaseModel):
    """The fields that all responses and stream chunks share."""

    id: str
    object: str
    created: int
    model: str


class CompletionLogprobs(BaseModel):
    """Log probabilities as OpenAI's parallel lists, with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]  # the position of each token in the completion, in characters


class CompletionChoice(BaseModel):
    """The completion of one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(GenerationResponse):
    """The response of /v1/completions, and each chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatTopLogprob(BaseModel):
    """The log probability of one of the most likely tokens."""

    token: str
    logprob: float
    bytes: list[int] | None  # None if the token is a part of a character


class ChatTokenLogprob(ChatTopLogprob):
    """The log probability of a token of the response, with those of the most likely tokens."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """The log probabilities of a chat response."""

    content: list[ChatTokenLogprob]


class ChatResult(BaseModel):
    """The fields that a chat choice and a piece of it share. A chat response has exactly one choice."""

    index: int = 0
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ResponseMessage(BaseModel):
    """The message of a chat response."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(ChatResult):
    """A whole chat response."""

    message: ResponseMessage


class ChatCompletion(GenerationResponse):
    """The response of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(ChatResult):
    """A piece of a chat response."""

    delta: dict[str, str]  # the content; the first piece also states the role


class ChatChunk(GenerationResponse):
    """One event of a chat stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """An entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bam-ray"
    max_model_len: int  # prompt and completion together, in tokens


class ModelList(BaseModel):
    """The response of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
