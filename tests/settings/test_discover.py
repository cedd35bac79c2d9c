"""Settings of discovered domains: their names are known from their number, so they are used like others."""

from typing import Any

import pytest

from bam_ray.errors import SettingsError
from bam_ray.pipeline.graph import task_graph
from bam_ray.settings import DataSettings, DiscoverSettings, Recipe, validated

TRAINING: dict[str, Any] = {"tokens": 1000, "peak_lr": 0.001}
PILE: dict[str, Any] = {"sources": {"pile": {"source": "pile.jsonl"}}}


def plain(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a recipe with some data."""
    return {
        "name": "small",
        "store": {"uri": "runs/small"},
        "data": data,
        "seed": {"scratch": {}, "training": TRAINING},
        "branch": {"training": TRAINING},
        "upcycle": {"mixtures": {"bam": {"method": "bam"}}},
        "mix": {"training": TRAINING, "expert_parallel": 1},
        **changes,
    }


def error_of(recipe: dict[str, Any]) -> str:
    with pytest.raises(SettingsError) as caught:
        validated(Recipe, recipe, "recipe")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_discovered_domain_has_a_branch() -> None:
    recipe = Recipe.model_validate(plain({"discover": {**PILE, "domains": 3}}))
    assert recipe.data.names == ("general", "domain-0", "domain-1", "domain-2")
    assert recipe.branch.domains == ["domain-0", "domain-1", "domain-2"]
    assert recipe.experts_of(recipe.upcycle.mixtures["bam"]) == 4
    tasks = [f"{task.kind}/{task.name}" for task in task_graph(recipe)]
    assert tasks[2:5] == ["branches/domain-0", "branches/domain-1", "branches/domain-2"]
    chosen = plain({"discover": {**PILE, "domains": 3}}, branch={"training": TRAINING, "domains": ["domain-2"]})
    assert Recipe.model_validate(chosen).branch.domains == ["domain-2"]
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_names_sort_by_their_number() -> None:
    assert DiscoverSettings.model_validate({**PILE, "domains": 10}).names[-1] == "domain-9"
    names = DiscoverSettings.model_validate({**PILE, "domains": 11}).names
    assert names[:2] == ("domain-00", "domain-01")
    assert names == tuple(sorted(names))


def test_discovered_domains_stand_beside_named_ones() -> None:
    named = {"web": {"source": "web.jsonl"}, "law": {"source": "law.jsonl"}}
    settings = DataSettings.model_validate({"domains": named, "general": "web", "discover": {**PILE, "domains": 2}})
    assert not settings.samples_general
    assert settings.names == ("web", "law", "domain-0", "domain-1")
    sampled = settings.model_copy(update={"general": "all"})
    assert sampled.samples_general
    assert sampled.names == ("all", "web", "law", "domain-0", "domain-1")


def test_without_labels_no_identity_changes() -> None:
    settings = DataSettings.model_validate({"domains": {"general": {"source": "web.jsonl"}}})
    assert "discover" not in settings.identity()
    found = [
        settings.model_copy(update={"discover": DiscoverSettings.model_validate({**PILE, "domains": count})})
        for count in (2, 3)
    ]
    assert found[0].identity() != found[1].identity()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "data: data.general is 'general', which is not in data.domains []"),
        ({"discover": {**PILE, "domains": 1}}, "data.discover.domains: Input should be greater than or equal to 2"),
        ({"discover": {"domains": 2, "sources": {}}}, "data.discover.sources: Dictionary should have at least 1 item"),
        (
            {"discover": {**PILE, "domains": 2}, "general": "domain-1"},
            "data.general is 'domain-1', a name of data.discover: use another name",
        ),
        (
            {"discover": {**PILE, "domains": 2}, "domains": {"domain-0": {"source": "x"}}},
            "data.domains has ['domain-0'], which are names of data.discover: rename them",
        ),
    ],
)
def test_wrong_data_is_refused(data: dict[str, Any], message: str) -> None:
    assert message in error_of(plain(data))


def test_branches_of_unknown_domains_are_refused() -> None:
    recipe = plain({"discover": {**PILE, "domains": 2}}, branch={"training": TRAINING, "domains": ["domain-2"]})
    assert "branch.domains names ['domain-2'], which are not in data.domains ['domain-0'" in error_of(recipe)
