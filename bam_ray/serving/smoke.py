"""The test of a model before it is served: it must continue a few texts."""

from bam_ray.errors import ServingError
from bam_ray.serving.engine import DecodeEngine
from bam_ray.serving.sampling import SamplingParams

TEXTS = ("The ", "Question: what is a language model?\nAnswer:", "def main(", "…")
TOKENS = 8  # of each continuation


def continue_texts(engine: DecodeEngine) -> None:
    """Continue each text greedily by `TOKENS` tokens.

    Raises:
        ServingError: The model fails, or its logits are not finite.
    """
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    for text in TEXTS:
        prompt = engine.tokenizer(text).input_ids[: engine.max_length - 1] or [0]
        generation = engine.add(prompt, params)
        try:
            while engine.active:
                for _, output in engine.step():
                    if output.error is not None:
                        raise ServingError(f"the model cannot continue {text!r}: {output.error}") from output.error
        finally:
            engine.remove(generation)
