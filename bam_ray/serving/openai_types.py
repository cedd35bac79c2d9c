"""The request types of the endpoint, and errors of requests: the supported part of OpenAI's completions and chat API.

No field of a request is ignored silently. Unsupported fields are accepted with values that have no effect, and unknown
fields are rejected. The other fields of a message are passed to the chat template.
"""

import reprlib
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from bam_ray.errors import Overloaded, ServingError, one_line, printable
from bam_ray.serving.grammar import choice_grammar, json_grammar, regex_grammar
from bam_ray.serving.sampling import SamplingParams

MAX_STOPS = 16  # OpenAI's limit is 4, and clients of local servers send more
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 1024
MAX_PARTS = 1024  # of a message
MAX_SHOWN = 80  # characters of a name in an error
MAX_CHOICE_TEXTS = 1024
MAX_REGEX_CHARACTERS = 10_000
MAX_CHOICES = 128  # OpenAI's limit of n
MAX_ENTRIES = 1024  # of logit_bias and domain
MAX_LOGPROBS = 20  # OpenAI's limit for chat; its limit of 5 for completions is lower

HARMLESS_FIELDS = {
    "user": "identifies the client's own user, for statistics of the provider",
    "safety_identifier": "the new name of user",
    "prompt_cache_key": "a hint for the provider's cache",
    "prompt_cache_retention": "a hint for the provider's cache",
    "metadata": "labels for the provider's dashboard",
    "store": "keep the response in the provider's dashboard",
    "service_tier": "the provider's price and priority",
}
"""OpenAI's fields that have no effect on the output, and their meaning. They are accepted with any value."""

SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "seed",
    "n",
    "frequency_penalty",
    "presence_penalty",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "routing",
)
"""The fields that have the same name and meaning in `SamplingParams`."""

UsageReport = Literal["none", "last", "all"]
"""The events of a stream that state the token usage: with `all`, each one states that of its completion so far."""
Prompt = str | list[str] | list[int] | list[list[int]] | None
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


class RequestError(ServingError):
    """A request that cannot be served. `status` is the HTTP status code of the response."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class RateLimited(RequestError):
    """A request that exceeds a limit of its API key.

    Attributes:
        kind: The unit of the limit.
        retry_after: The number of seconds after which the client should try again.
    """

    def __init__(self, message: str, kind: Literal["requests", "tokens"], retry_after: float) -> None:
        super().__init__(429, message, code="rate_limit_exceeded")
        self.kind, self.retry_after = kind, retry_after


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
            kind = error.kind if isinstance(error, RateLimited) else "invalid_request_error"
            param = error.param and printable(error.param)
            return cls(error=ErrorBody(message=message, type=kind, param=param, code=error.code))
        code = "server_overloaded" if isinstance(error, Overloaded) else "server_error"
        return cls(error=ErrorBody(message=message, type="server_error", code=code))


class StrictRequest(BaseModel):
    """A part of a request. JSON values are not converted: `"1"` and `true` are no numbers."""

    model_config = ConfigDict(extra="allow", strict=True)
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field -> the values that have no effect
    harmless: ClassVar[set[str]] = set()

    @model_validator(mode="after")
    def _reject_other_fields(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in self.unsupported and name not in self.harmless:
                shown = reprlib.repr(name)
                raise RequestError(400, f"unknown field {shown}: omit it", "unknown_parameter", name[:MAX_SHOWN])
            if name in self.unsupported and value not in self.unsupported[name]:
                shown = reprlib.repr(value)
                raise RequestError(400, f"{name}={shown} is not supported: omit it", "unsupported_value", name)
        return self


class JsonSchemaFormat(StrictRequest):
    """A JSON schema with a name, as OpenAI's clients send it."""

    harmless = {"description", "strict"}  # the output always follows the schema

    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(StrictRequest):
    """The form of the output: any text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_a_schema_if_needed(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = "json_schema is needed with the type json_schema, and only with it"
            raise RequestError(400, message, param="response_format.json_schema")
        return self


class StructuredOutputs(StrictRequest):
    """The form of the output: JSON that follows a schema, a regular expression, or one of several texts."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, Field(max_length=MAX_REGEX_CHARACTERS)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICE_TEXTS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if sum(form is not None for form in (self.json_, self.regex, self.choice)) != 1:
            message = "structured_outputs needs exactly one of json, regex and choice"
            raise RequestError(400, message, param="structured_outputs")
        return self

    @property
    def grammar(self) -> str:
        """The grammar of the output."""
        if self.json_ is not None:
            return json_grammar(self.json_)
        return regex_grammar(self.regex) if self.regex is not None else choice_grammar(self.choice or [])


def grammar_of(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> str | None:
    """Return the grammar of the output, or None if any text is allowed.

    Raises:
        RequestError: Both fields give a form, or the server lacks llguidance.
    """
    has_format = response_format is not None and response_format.type != "text"
    if has_format and structured is not None:
        message = "response_format and structured_outputs both give a form: omit one of them"
        raise RequestError(400, message, param="response_format")
    try:
        if response_format is not None and has_format:
            schema = response_format.json_schema
            return json_grammar({"type": "object"} if schema is None else schema.schema_)
        return None if structured is None else structured.grammar
    except ServingError as error:
        raise RequestError(400, str(error), "unsupported_value", "response_format") from None


class StreamOptions(StrictRequest):
    """The options of a stream."""

    harmless = {"include_obfuscation"}  # padding against observers of encrypted connections

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False  # a field of vLLM, which has an effect only with the other one


class GenerationRequest(StrictRequest):
    """The fields that completion and chat requests share."""

    unsupported = {"best_of": (None, 1), "skip_special_tokens": (None, True)}
    harmless = set(HARMLESS_FIELDS)

    model: str
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    # Fields of vLLM and SGLang
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: all tokens
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Fields of this server: weights over domains in place of the router prior, and the routing of each token
    domain: str | dict[str, Annotated[float, Field(ge=0.0)]] | None = None
    routing: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @field_validator("logit_bias", "domain", mode="before")
    @classmethod
    def _is_bounded(cls, values: Any, info: ValidationInfo) -> Any:
        """Check the number of entries first. Pydantic itself would collect an error for each wrong one."""
        if isinstance(values, dict) and len(values) > MAX_ENTRIES:
            message = f"{info.field_name} has {len(values)} entries, but may have {MAX_ENTRIES}: send less"
            raise RequestError(400, message, param=info.field_name)
        return values

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError(400, "stream_options needs stream=true: set it, or omit stream_options", param="stream")
        if len(self.stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stops):
            message = f"stop accepts up to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
            raise RequestError(400, message, param="stop")
        if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in self.logit_bias or ()):
            raise RequestError(400, "the keys of logit_bias are token ids: write them as digits", param="logit_bias")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_report(self) -> UsageReport:
        """The events of a stream that state the token usage."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return "none"
        return "all" if options.continuous_usage_stats else "last"

    def sampling_params(
        self, max_tokens: int, logprobs: int | None, more_stops: tuple[str, ...] = ()
    ) -> SamplingParams:
        """Return the sampling parameters. OpenAI's defaults for temperature and top_p are 1."""
        if (self.min_tokens or 0) > max_tokens:
            message = f"min_tokens is {self.min_tokens}, more than the {max_tokens} tokens at most: lower it"
            raise RequestError(400, message, param="min_tokens")
        grammar = grammar_of(self.response_format, self.structured_outputs)
        if grammar is not None and (self.min_tokens or self.ignore_eos):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise RequestError(400, f"{name} does not work with a form of the output: omit one of them", param=name)
        given = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        return SamplingParams(
            max_tokens=max_tokens,
            stop=self.stops + more_stops,
            logprobs=logprobs,
            top_k=max(0, self.top_k or 0),
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            grammar=grammar,
            **given,
        )


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    unsupported = {**GenerationRequest.unsupported, "suffix": (None, "")}

    prompt: Prompt = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None  # 0: only the prompt, for `echo`
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def sampling_params(
        self, max_tokens: int, logprobs: int | None, more_stops: tuple[str, ...] = ()
    ) -> SamplingParams:
        """Return the sampling parameters. With `echo`, the log probabilities of the prompt are computed, too."""
        params = super().sampling_params(max_tokens, logprobs, more_stops)
        return replace(params, prompt_logprobs=logprobs) if self.echo else params

    @field_validator("prompt", mode="plain", json_schema_input_type=Prompt)
    @classmethod
    def _is_text_or_tokens(cls, prompt: Any) -> Any:
        """Check the type of the prompt. Pydantic's own check would list each wrong element in every way."""
        if prompt is None or isinstance(prompt, str) or (isinstance(prompt, list) and _is_prompt_list(prompt)):
            return prompt
        message = "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
        raise RequestError(400, message, param="prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or token ids. Without one, a text is generated from its beginning."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt or ""]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]  # the check above excludes list[int]


def _is_prompt_list(prompt: list[Any]) -> bool:
    """Return True for a list of strings, of token ids, or of lists of token ids."""
    if all(isinstance(part, str) for part in prompt) or _are_tokens(prompt):
        return True
    return all(isinstance(part, list) and _are_tokens(part) for part in prompt)


def _are_tokens(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)  # a bool is an int, too


class TokenizeRequest(StrictRequest):
    """The body of POST /tokenize, as in vLLM."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class DetokenizeRequest(StrictRequest):
    """The body of POST /detokenize, as in vLLM."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class TextPart(StrictRequest):
    """A part of a message. Only text is supported."""

    harmless = {"cache_control", "prompt_cache_breakpoint"}  # hints for the provider's cache

    type: Literal["text"]
    text: str


class RequestMessage(BaseModel):
    """One turn of a chat request. A turn of the assistant that only called tools has no content."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None

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
        "tool_choice": (None, "none", "auto"),  # without tools, there is nothing to choose
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None, "none"),
        "verbosity": (None,),
        "web_search_options": (None,),
        # Fields of vLLM and SGLang
        "add_generation_prompt": (None, True),
        "continue_final_message": (None, False),
        "chat_template_kwargs": (None, {}),
    }

    messages: Annotated[list[RequestMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: TokenCount | None = None  # OpenAI's newer name of max_tokens
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def last_text(self) -> str:
        """The newest message of the user, or the newest of all if the user has none."""
        own = [message for message in self.messages if message.role == "user"]
        return (own or self.messages)[-1].text

    @model_validator(mode="after")
    def _top_logprobs_are_wanted(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs needs logprobs=true: set it, or omit top_logprobs"
            raise RequestError(400, message, param="top_logprobs")
        return self
