"""The maturity of a seed: the tokens that it is trained on for each of its parameters.

Branches of an immature seed each have to learn again what all text has in common, and see only their own part of it.
"""

from bam_ray.planning.model_size import ModelSize
from bam_ray.settings import Recipe

# Measured by this project: with 0.7 tokens per parameter, one dense model of all tokens had a lower perplexity than
# every mixture; with 71, mixtures equaled it or had a lower one. The order of magnitude in between is that of
# compute-optimal training, about 20 tokens per parameter (arXiv 2203.15556).
MATURE_TOKENS_PER_PARAMETER = 20


def maturity_warning(recipe: Recipe, seed: ModelSize | None) -> str:
    """Return one line if the seed is too immature to branch from, and an empty string otherwise.

    It is empty too if the tokens of the seed are unknown (a seed from a folder), or its size (`seed` is None).
    """
    training = recipe.seed.training
    if recipe.seed.scratch is None or training is None or seed is None or not recipe.branch.domains:
        return ""
    ratio = training.steps * training.batch_tokens / seed.parameters
    if ratio >= MATURE_TOKENS_PER_PARAMETER:
        return ""
    shown = f"{ratio:.2g}" if ratio < 10 else str(int(ratio))  # never rounded up to the limit
    return (
        f"warning: the seed sees {shown} tokens per parameter: below about {MATURE_TOKENS_PER_PARAMETER}, training one "
        "dense model on the same tokens will probably beat the mixture; train the seed for longer or make it smaller"
    )
