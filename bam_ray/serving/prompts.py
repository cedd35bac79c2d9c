"""Conversion of a request's text, tokens or messages to validated token ids."""

import logging

from jinja2.exceptions import TemplateError

from bam_ray.errors import encodable
from bam_ray.serving.engine import DecodeEngine
from bam_ray.serving.openai_types import ChatRequest, CompletionRequest, RequestError

_logger = logging.getLogger(__name__)

FALLBACK_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""The chat template for tokenizers without one. Base models have seen dialogs of this form."""
FALLBACK_STOPS = ("\nuser:",)  # the model would continue such a dialog with the user's next turn


def completion_prompts(engine: DecodeEngine, request: CompletionRequest) -> list[list[int]]:
    """Return the token ids of each prompt. Raises `RequestError` for a prompt that cannot be served."""
    prompts = [
        list(engine.tokenizer(encodable(prompt), verbose=False).input_ids) if isinstance(prompt, str) else prompt
        for prompt in request.prompts
    ]
    if not prompts:
        raise RequestError(400, "prompt is an empty list: pass at least one prompt", param="prompt")
    return [_validated(engine, prompt, request.max_tokens, "prompt") for prompt in prompts]


def chat_prompt(engine: DecodeEngine, request: ChatRequest) -> tuple[list[int], tuple[str, ...]]:
    """Return the token ids of a dialog and the stop strings that its template needs.

    Raises `RequestError` for a dialog that cannot be served.
    """
    tokenizer = engine.tokenizer
    own_template = getattr(tokenizer, "chat_template", None)
    messages = [
        {**(message.model_extra or {}), "role": message.role, "content": message.text} for message in request.messages
    ]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=own_template or FALLBACK_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the model's author, so it may fail in any way
        _logger.info("a chat template failed", exc_info=error)
        # A template's own message is meant for the client, and that of Python is not
        reason = str(error) if isinstance(error, TemplateError) else f"it fails with {type(error).__name__}"
        message = f"the model's chat template rejects these messages: {reason}"
        raise RequestError(400, message, param="messages") from None
    # The tokenizer's own template writes the special tokens itself
    prompt = list(tokenizer(encodable(text), add_special_tokens=own_template is None, verbose=False).input_ids)
    max_tokens = request.max_completion_tokens or request.max_tokens
    return _validated(engine, prompt, max_tokens, "messages"), () if own_template else FALLBACK_STOPS


def _validated(engine: DecodeEngine, prompt: list[int], max_tokens: int | None, param: str) -> list[int]:
    """Return the prompt, or the start token if the prompt is empty.

    Raises `RequestError` if the prompt cannot be continued.
    """
    if not prompt:
        if engine.tokenizer.bos_token_id is None:
            message = f"{param} is empty, and the model has no start token: pass at least one token"
            raise RequestError(400, message, param=param)
        prompt = [engine.tokenizer.bos_token_id]
    if not all(0 <= token < engine.vocab_size for token in prompt):
        message = f"{param} contains a token that is not in [0, {engine.vocab_size}): use this model's tokenizer"
        raise RequestError(400, message, param=param)
    if len(prompt) + (max_tokens or 1) > engine.max_length:
        raise RequestError(
            400,
            f"prompt and completion together may have at most {engine.max_length} tokens, but this prompt has "
            f"{len(prompt)} and requests {max_tokens or 'at least 1'} more: shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
            param=param,
        )
    return prompt
