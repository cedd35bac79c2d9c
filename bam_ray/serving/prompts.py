"""From a request's text, tokens or messages to checked token ids."""

from jinja2.exceptions import TemplateError

from bam_ray.serving.engine import DecodeEngine
from bam_ray.serving.openai_types import ChatRequest, CompletionRequest, RequestError

PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""For tokenizers without a chat template: base models have seen dialogues of this form."""
PLAIN_STOPS = ("\nuser:",)  # where such a dialogue would go on with the user's turn


def completion_prompts(engine: DecodeEngine, request: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt; raises `RequestError`."""
    prompts = [
        list(engine.tokenizer(prompt, verbose=False).input_ids) if isinstance(prompt, str) else prompt
        for prompt in request.prompts
    ]
    if not prompts:
        raise RequestError(400, "prompt is an empty list", param="prompt")
    return [_checked(engine, prompt, request.max_tokens, "prompt") for prompt in prompts]


def chat_prompt(engine: DecodeEngine, request: ChatRequest) -> tuple[list[int], tuple[str, ...]]:
    """Token ids of the dialogue, and stop strings that its template needs; raises `RequestError`."""
    tokenizer = engine.tokenizer
    own = getattr(tokenizer, "chat_template", None)
    messages = [
        {**(message.model_extra or {}), "role": message.role, "content": message.text} for message in request.messages
    ]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=own or PLAIN_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise RequestError(
            400, f"the model's chat template refuses these messages: {error}", param="messages"
        ) from None
    # A template of the model's own writes the special tokens itself
    prompt = list(tokenizer(text, add_special_tokens=own is None, verbose=False).input_ids)
    asked = request.max_completion_tokens or request.max_tokens
    return _checked(engine, prompt, asked, "messages"), () if own else PLAIN_STOPS


def _checked(engine: DecodeEngine, prompt: list[int], max_tokens: int | None, param: str) -> list[int]:
    """The prompt, or the start token where it is empty; raises `RequestError` where it cannot be continued."""
    if not prompt:
        if engine.tokenizer.bos_token_id is None:
            raise RequestError(400, f"{param} is empty, and the model has no start token", param=param)
        prompt = [engine.tokenizer.bos_token_id]
    if not all(0 <= token < engine.vocab_size for token in prompt):
        raise RequestError(400, f"{param} has a token that is not in [0, {engine.vocab_size})", param=param)
    if len(prompt) + (max_tokens or 1) > engine.max_length:
        raise RequestError(
            400,
            f"at most {engine.max_length} tokens are served, prompt and completion together: this prompt has "
            f"{len(prompt)} and asks for {max_tokens or 'at least 1'} more",
            code="context_length_exceeded",
            param=param,
        )
    return prompt
