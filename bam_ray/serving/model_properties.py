"""The properties of a model that decide how it is decoded."""

from typing import Any

from bam_ray.errors import ServingError


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: those of the generation configuration, if any, and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {int(token) for token in ends | {tokenizer.eos_token_id} if token is not None}


def check_attention(config: Any, max_length: int) -> None:
    """Raise `ServingError` if decoding in slots would not reproduce the model's attention."""
    if config._attn_implementation != "sdpa":
        raise ServingError(
            f"attention {config._attn_implementation!r} does not support one mask per row: load the model with "
            "attn_implementation='sdpa'"
        )
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if layers != {"full_attention"} or (window is not None and window < max_length):
        raise ServingError(
            f"{config.model_type} uses attention windows, which the server does not support: serve a model with full "
            "attention"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ServingError(
            f"serve.max_length is {max_length}, but the model has {positions} positions: lower serve.max_length"
        )
