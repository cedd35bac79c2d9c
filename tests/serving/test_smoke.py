"""The test of a model before it is served."""

from typing import Any

import pytest
import torch

from bam_ray.errors import ServingError
from bam_ray.serving import DecodeEngine
from bam_ray.serving.smoke import continue_texts


@pytest.mark.parametrize("family", ["llama", "bam"])
def test_a_model_that_works_passes(family: str, models_by_family: Any, tokenizer: Any) -> None:
    for slots, length in ((1, 64), (3, 4)):  # the second engine is too short for the texts
        engine = DecodeEngine(models_by_family[family], tokenizer, slots, length)
        continue_texts(engine)
        assert (engine.active, engine.free) == (0, slots)


def test_a_token_with_broken_weights_is_found(models_by_family: Any, tokenizer: Any) -> None:
    engine = DecodeEngine(models_by_family["llama"], tokenizer, slots=2, max_length=64)
    embedding = models_by_family["llama"].get_input_embeddings().weight
    token = tokenizer("The ").input_ids[-1]
    kept = embedding[token].clone()
    with torch.no_grad():
        embedding[token] = float("nan")
        try:
            with pytest.raises(ServingError, match=r"the model cannot continue .The .: the logits .* are not finite"):
                continue_texts(engine)
        finally:
            embedding[token] = kept
    assert (engine.active, engine.free) == (0, 2)
    continue_texts(engine)
