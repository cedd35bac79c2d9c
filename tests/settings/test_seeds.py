"""Training seeds change the random numbers of everything but the data."""

import pytest

from bam_ray.pipeline.graph import task_graph
from bam_ray.settings import Recipe, load_recipe, with_training_seed

COMPARED = ["compare={dense: [0.5, 1]}", "data.seed=5"]


def ids(recipe: Recipe) -> dict[tuple[str, str], str]:
    return {(task.kind, task.name): task.id for task in task_graph(recipe)}


def test_a_training_seed_changes_everything_but_the_corpus() -> None:
    recipe = load_recipe("recipes/demo.yaml", COMPARED)
    seeded = with_training_seed(recipe, 3)
    assert seeded.seed.training is not None
    trained = [seeded.seed.training, seeded.branch.training, seeded.mix.training, *seeded.controls.values()]
    assert {training.seed for training in trained} == {3}
    assert {mixture.seed for mixture in seeded.upcycle.mixtures.values()} == {3}
    assert seeded.data == recipe.data
    before, after = ids(recipe), ids(seeded)
    assert {key for key in before if before[key] == after[key]} == {("corpora", "corpus")}
    assert Recipe.model_validate(seeded.model_dump()) == seeded
    assert with_training_seed(seeded, 0) == recipe, "the recipe is that of its own seed"


def test_a_training_seed_changes_adapters_but_not_topics() -> None:
    adapters = "adapters={training: {tokens: 4096, batch_tokens: 4096, peak_lr: 0.001}}"
    recipe = load_recipe("recipes/demo.yaml", ["topics={count: 4}", adapters])
    seeded = with_training_seed(recipe, 3)
    assert seeded.adapters is not None and seeded.adapters.training.seed == 3
    before, after = ids(recipe), ids(seeded)
    assert {key for key in before if before[key] == after[key]} == {("corpora", "corpus"), ("topics", "topics")}


def test_a_seed_from_a_folder_stays_as_it_is() -> None:
    recipe = load_recipe("recipes/demo.yaml", ["seed={folder: models/base}"])
    seeded = with_training_seed(recipe, 2)
    assert seeded.seed == recipe.seed
    before, after = ids(recipe), ids(seeded)
    assert {kind for (kind, name), id in before.items() if after[kind, name] == id} == {"corpora", "seeds"}


@pytest.mark.parametrize("override", ["compare.seeds=[7, 8]", "compare.seeds=[4]"])
def test_the_list_of_training_seeds_changes_no_identity(override: str) -> None:
    assert ids(load_recipe("recipes/demo.yaml", [*COMPARED, override])) == ids(
        load_recipe("recipes/demo.yaml", COMPARED)
    )
