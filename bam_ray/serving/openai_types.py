"""What the endpoint reads and writes: the part of OpenAI's completions and chat interface that is served.

Fields that would change a text but are not served are refused, never ignored in silence; fields that change nothing
here (user, metadata, store) are let through.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bam_ray.errors import ServingError
from bam_ray.serving.engine import FinishReason
from bam_ray.serving.sampling import Sampling

MAX_STOPS = 4  # OpenAI's
MAX_LOGPROBS = 20  # OpenAI's for chat; 5 for completions is a subset


class RequestError(ServingError):
    """A request that cannot be met; `status` is HTTP's."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class ErrorBody(BaseModel):
    """Why a request failed."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorBody

    @staticmethod
    def of(error: ServingError) -> "ErrorResponse":
        """From the error itself: 4xx are the client's, the rest the server's."""
        if isinstance(error, RequestError) and error.status < 500:
            kind = "invalid_request_error"
            return ErrorResponse(error=ErrorBody(message=str(error), type=kind, param=error.param, code=error.code))
        return ErrorResponse(error=ErrorBody(message=str(error), type="server_error", code="server_error"))


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="allow")
    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {  # field: the values that change nothing
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
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _served(self) -> Self:
        for name, neutral in self.unserved.items():
            value = (self.model_extra or {}).get(name)
            if value not in neutral:
                raise RequestError(400, f"{name}={value!r} is not served: leave it out", "unsupported_value", name)
        if len(self.stops) > MAX_STOPS or "" in self.stops:
            raise RequestError(400, f"stop takes up to {MAX_STOPS} strings, none of them empty", param="stop")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, logprobs: int | None, more_stops: tuple[str, ...] = ()) -> Sampling:
        """How to continue; OpenAI's defaults are a temperature and a top_p of 1."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stops + more_stops,
            logprobs=logprobs,
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    unserved = {**_Request.unserved, "best_of": (None, 1), "echo": (None, False), "suffix": (None, "")}

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a completion: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    """A part of a message: text alone is served."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    unserved = {
        **_Request.unserved,
        "tools": (None, []),
        "functions": (None, []),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # OpenAI's newer name of max_tokens
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class Usage(BaseModel):
    """Tokens read and written; an end-of-text token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """OpenAI's parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]  # where each token begins in the completion, in characters


class CompletionChoice(BaseModel):
    """One prompt's completion, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The answer of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatTopLogprob(BaseModel):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None  # None: the token is a part of a character


class ChatTokenLogprob(ChatTopLogprob):
    """A token of the answer."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of the answer."""

    content: list[ChatTokenLogprob]


class ChatMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The answer and how it ended."""

    index: int = 0
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """A piece of the answer."""

    index: int = 0
    delta: dict[str, str]  # content; the first has the role too
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """An entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bam-ray"
    max_model_len: int  # prompt and completion, in tokens


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]
