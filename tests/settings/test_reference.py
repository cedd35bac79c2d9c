"""Every setting is described, and the settings outside of an artifact's identity are known by name."""

from collections.abc import Iterator
from typing import get_args

from bam_ray.settings import Identity, Recipe, Strict, TrainingSettings, load_recipe


def models(annotation: object) -> Iterator[type[Strict]]:
    """Yield the settings models that are nested in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)


def all_models(model: type[Strict]) -> Iterator[type[Strict]]:
    """Yield `model` and all settings models below it."""
    yield model
    for field in model.model_fields.values():
        for nested in models(field.annotation):
            yield from all_models(nested)


def test_every_setting_has_a_description() -> None:
    undescribed = [
        f"{model.__name__}.{name}"
        for model in set(all_models(Recipe))
        for name, field in model.model_fields.items()
        if not field.description or not field.description.endswith((".", ")"))
    ]
    assert not undescribed


def test_settings_outside_the_identity() -> None:
    compared = {"dense", "diloco", "max_attempts", "network_gbit_per_s", "nodes", "prior", "seeds"}
    excluded = {
        f"{model.__name__}.{name}"
        for model in all_models(Recipe)
        for name, field in model.model_fields.items()
        if Identity.EXCLUDED in field.metadata
    }
    training = {"checkpoint_every", "keep_every", "keep_last", "micro_batch_sequences", "recompute", "zero_stage"}
    dense = {"min_workers", "needs", "workers"}
    assert excluded == {
        *(f"TrainingSettings.{name}" for name in training),
        *(f"SeedSettings.{name}" for name in dense),
        *(f"BranchSettings.{name}" for name in dense | {"domains", "max_attempts", "overrides"}),
        *(f"CompareSettings.{name}" for name in dense | compared),
        *(f"MixSettings.{name}" for name in dense | {"at_once", "expert_parallel", "max_failures", "without_branches"}),
        *(f"EvaluateSettings.{name}" for name in ("batch_sequences", "lm_eval_tasks", "needs")),
        "TopicsSettings.needs",
        "UpcycleSettings.needs",
        "AdapterSettings.controls",  # tasks of their own
        "AdapterSettings.held_out_tokens",  # of the evaluation
        "AdapterSettings.max_attempts",
        "AdapterSettings.needs",
    }


def test_identity_leaves_out_nested_settings() -> None:
    recipe = load_recipe("recipes/demo.yaml")
    seed = recipe.seed.identity()
    assert set(seed) == {"scratch", "folder", "training", "blend"}
    assert "recompute" not in seed["training"]
    assert seed["training"]["tokens"] == 6_000_000
    faster = TrainingSettings(tokens=1, peak_lr=1.0, recompute=True, zero_stage=3)
    assert faster.identity() == TrainingSettings(tokens=1, peak_lr=1.0).identity()
    assert faster.identity() != TrainingSettings(tokens=2, peak_lr=1.0).identity()


def test_the_schema_describes_settings() -> None:
    schema = Recipe.model_json_schema()
    assert schema["$defs"]["TrainingSettings"]["properties"]["tokens"]["description"].startswith("Number of tokens")
