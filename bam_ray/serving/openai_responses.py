"""The response types of the endpoint: those of OpenAI's completions and chat API, and of its other paths."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel

from bam_ray.serving.engine import FinishReason
from bam_ray.serving.served_adapters import AdapterUse
from bam_ray.serving.token_routing import RoutingLayout, TokenRouting


class Detokenized(BaseModel):
    """The response of /detokenize."""

    prompt: str


class Tokenized(BaseModel):
    """The response of /tokenize."""

    count: int
    max_model_len: int  # prompt and completion together, in tokens
    tokens: list[int]
    token_strs: list[str] | None = None  # the tokens as they are in the vocabulary, with `return_token_strs`


class PromptTokensDetails(BaseModel):
    """The parts of the number of prompt tokens."""

    cached_tokens: int  # found in the prefix cache


class TokenizerDescription(BaseModel):
    """The response of /tokenizer_info, with the names of a tokenizer_config.json, as in vLLM."""

    tokenizer_class: str
    model_max_length: int  # prompt and completion together, in tokens
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_template: str | dict[str, str] | None


class Usage(BaseModel):
    """The number of prompt and completion tokens. An end-of-text token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Self:
        """Return the usage of a number of prompt and completion tokens, and of cached tokens of the prompt."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class GenerationResponse(BaseModel):
    """The fields that all responses and stream chunks share."""

    id: str
    object: str
    created: int
    model: str
    adapter: AdapterUse | None = None  # of a server with adapters; in a stream, of the first chunk


class CompletionLogprobs(BaseModel):
    """Log probabilities as OpenAI's parallel lists, with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]  # None: the first token of a prompt, which nothing precedes
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # the place of each token in the text, or of the character that it continues, in characters


class CompletionChoice(BaseModel):
    """The completion of one prompt, or a piece of it."""

    index: int
    text: str
    routing: tuple[TokenRouting, ...] | None = None  # of each token, if it was requested
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
    bytes: list[int]  # of the token in UTF-8, also if it is a part of a character


class ChatTokenLogprob(ChatTopLogprob):
    """The log probability of a token of the response, with those of the most likely tokens."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """The log probabilities of a chat response."""

    content: list[ChatTokenLogprob]


class ChatResult(BaseModel):
    """The fields that a chat choice and a piece of it share."""

    index: int = 0
    routing: tuple[TokenRouting, ...] | None = None  # of each token, if it was requested
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

    delta: dict[str, str]  # the first piece has the role, the last one nothing, and the others content


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
    root: str  # the model that an adapter changes; the model itself if it is no adapter
    parent: str | None = None  # the model that was fine-tuned to this one
    max_model_len: int  # prompt and completion together, in tokens
    routing: RoutingLayout | None = None  # the experts of a mixture
    artifacts: Sequence[str] = ()  # `kind/id` of the models in the blob store that are served


class ModelList(BaseModel):
    """The response of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
