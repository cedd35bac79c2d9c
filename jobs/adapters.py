"""Train the adapters of a recipe, one for each topic, evaluate them and print their perplexities.

Topics are found first if they are missing.
"""

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import SettingsError
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job, show_adapters
from bam_ray.settings import Recipe


def kinds(recipe: Recipe) -> list[ArtifactKind]:
    """Return the kinds of artifacts to make; raises `SettingsError` if the recipe has no adapters."""
    if recipe.adapters is None:
        raise SettingsError("the recipe has no adapters: add the sections `topics` and `adapters`")
    return [ArtifactKind.EVALUATIONS]


if __name__ == "__main__":
    run_job(kinds, deepspeed_engine, show_adapters)
