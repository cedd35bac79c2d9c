"""Training seeds: the same recipe with other random numbers."""

from bam_ray.settings.adapters import AdapterSettings
from bam_ray.settings.dense import BranchSettings, SeedSettings
from bam_ray.settings.mix import MixSettings
from bam_ray.settings.recipe import Recipe


def with_training_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return the recipe with `seed` as the random seed of all training and of all mixtures.

    It determines the initialization, the data order and the dropout of the seed, the branches, the controls, the
    adapters and the mixtures, and all random numbers of upcycling. The split of the data keeps its own seed, so all
    training seeds share the corpus and the held-out text.

    Args:
        recipe: The recipe. It is not changed.
        seed: The training seed, at least 0.
    """
    parts: dict[str, SeedSettings | BranchSettings | MixSettings | AdapterSettings] = {
        "seed": recipe.seed,
        "branch": recipe.branch,
        "mix": recipe.mix,
        **({"adapters": recipe.adapters} if recipe.adapters else {}),
    }
    changed: dict[str, object] = {
        name: part.model_copy(update={"training": part.training.model_copy(update={"seed": seed})})
        for name, part in parts.items()
        if part.training is not None  # a seed from a folder is not trained
    }
    mixtures = {name: each.model_copy(update={"seed": seed}) for name, each in recipe.upcycle.mixtures.items()}
    changed["upcycle"] = recipe.upcycle.model_copy(update={"mixtures": mixtures})
    return recipe.model_copy(update=changed)
