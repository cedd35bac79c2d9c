"""The tasks of a recipe: their parents, their settings, and the settings that determine their ids."""

import pytest

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.graph import find_task, subset, task_graph
from bam_ray.settings import Demand, Needs
from tests.support.control.sample_recipe import changed_tasks, sample_recipe

BRANCHES = {"branches/code", "branches/law", "branches/general"}
MIXED = {"upcycled/bam", "upcycled/btx", "mixtures/bam", "mixtures/btx", "reports/report"}


def test_every_task_follows_its_parents() -> None:
    tasks = task_graph(sample_recipe())
    assert [(task.kind, task.name) for task in tasks] == [
        ("corpora", "corpus"),
        ("seeds", "seed"),
        ("branches", "code"),
        ("branches", "law"),
        ("branches", "general"),
        ("upcycled", "bam"),
        ("upcycled", "btx"),
        ("mixtures", "bam"),
        ("mixtures", "btx"),
        ("reports", "report"),
    ]
    seen: set[str] = set()
    for task in tasks:
        assert set(task.parents) <= seen
        seen.add(task.id)
    assert len(seen) == len(tasks)


def test_tasks_have_the_steps_workers_and_attempts_of_the_recipe() -> None:
    tasks = task_graph(sample_recipe())
    assert find_task(tasks, ArtifactKind.SEEDS, "seed").total_steps == 4  # ceil(1000 / 256)
    assert find_task(tasks, ArtifactKind.BRANCHES, "law").total_steps == 2
    assert find_task(tasks, ArtifactKind.MIXTURES, "bam").total_steps == 3
    assert find_task(tasks, ArtifactKind.BRANCHES, "law").max_attempts == 7
    assert find_task(tasks, ArtifactKind.MIXTURES, "bam").max_attempts == 3
    assert find_task(tasks, ArtifactKind.MIXTURES, "bam").workers == 2
    assert find_task(task_graph(sample_recipe("mix.workers=4")), "mixtures", "bam").workers == 4


@pytest.mark.parametrize(
    "override",
    [
        "seed.training.micro_batch_sequences=1",
        "seed.training.zero_stage=3",
        "branch.training.checkpoint_every=3",
        "branch.training.micro_batch_sequences=2",
        "mix.training.micro_batch_sequences=8",  # two processes: 16 sequences at once, as by default
        "mix.training.recompute=true",
        "branch.training.keep_last=5",
        "mix.training.keep_every=10",
        "metrics.tensorboard=false",
        "mix.expert_parallel=4",
        "mix.workers=4",
        "branch.needs.cpus=2",
        "branch.overrides.law={needs: {gpus: 1, fallback: [{cpus: 4}]}}",
        "mix.needs.memory_gib=8",
        "branch.max_attempts=1",
        "evaluate.batch_sequences=2",
        "store.uri=/elsewhere",
        "name=other",
    ],
)
def test_settings_of_how_or_where_change_no_id(override: str) -> None:
    assert changed_tasks(override) == set()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sequence_length=128", {"corpora/corpus", "seeds/seed"} | BRANCHES | MIXED),
        ("seed.training.peak_lr=0.02", {"seeds/seed"} | BRANCHES | MIXED),
        ("seed.training.precision=bf16", {"seeds/seed"} | BRANCHES | MIXED),
        ("branch.training.peak_lr=0.02", BRANCHES | MIXED),
        ("branch.general_fraction=0.2", BRANCHES | MIXED),
        ("upcycle.mixtures.btx.norm_topk_prob=true", {"upcycled/btx", "mixtures/btx", "reports/report"}),
        ("mix.training.peak_lr=0.02", {"mixtures/bam", "mixtures/btx", "reports/report"}),
        ("mix.training.micro_batch_sequences=2", {"mixtures/bam", "mixtures/btx", "reports/report"}),
        ("mix.training.on_not_finite=skip", {"mixtures/bam", "mixtures/btx", "reports/report"}),
        ("mix.losses.load_balance=0.1", {"mixtures/bam", "mixtures/btx", "reports/report"}),
        ("evaluate.tokens_per_domain=1", {"reports/report"}),
    ],
)
def test_settings_of_the_content_change_the_ids_of_all_descendants(override: str, expected: set[str]) -> None:
    assert changed_tasks(override) == expected


def test_the_order_of_domains_is_part_of_a_mixture() -> None:
    assert changed_tasks("branch.domains=[code, general, law]") >= {"upcycled/bam", "mixtures/bam"}


def test_an_override_changes_the_needs_of_one_branch() -> None:
    tasks = task_graph(
        sample_recipe("branch.overrides.law={needs: {gpus: 1, fallback: [{cpus: 4}]}}", "branch.needs.cpus=2")
    )
    assert find_task(tasks, ArtifactKind.BRANCHES, "law").needs == Needs(gpus=1, fallback=(Demand(cpus=4),))
    assert find_task(tasks, ArtifactKind.BRANCHES, "code").needs == Needs(cpus=2)


def test_dense_tasks_share_a_model_and_mixtures_do_not() -> None:
    tasks = task_graph(sample_recipe())
    alone = {task.full_name: (task.model, task.step_tokens) for task in tasks if task.trains_alone}
    assert alone == dict.fromkeys(["seeds/seed", *BRANCHES], ("dense", 256))
    assert find_task(tasks, ArtifactKind.MIXTURES, "bam").model != find_task(tasks, ArtifactKind.MIXTURES, "btx").model


def test_subset_includes_the_ancestors_of_its_kinds() -> None:
    tasks = task_graph(sample_recipe())
    assert [task.kind for task in subset(tasks, ["seeds"])] == ["corpora", "seeds"]
    assert {task.kind for task in subset(tasks, ["upcycled"])} == {"corpora", "seeds", "branches", "upcycled"}
    assert subset(tasks, ["reports"]) == tasks


SOUP = "upcycle.mixtures.soup={method: soup}"


def test_a_soup_is_made_from_the_seed_and_all_branches() -> None:
    tasks = task_graph(sample_recipe(SOUP))
    soup = find_task(tasks, ArtifactKind.UPCYCLED, "soup")
    assert soup.parents == find_task(tasks, ArtifactKind.UPCYCLED, "bam").parents
    assert find_task(tasks, ArtifactKind.MIXTURES, "soup").parents[0] == soup.id


def test_a_soup_waits_for_all_branches_even_with_a_quorum() -> None:
    """A dense average cannot absorb a late branch."""
    tasks, without = (task_graph(sample_recipe(SOUP, *more)) for more in (["upcycle.when={at_least: 1}"], []))
    for kind in (ArtifactKind.UPCYCLED, ArtifactKind.MIXTURES):
        assert find_task(tasks, kind, "soup").quorum is None
        assert find_task(tasks, kind, "bam").quorum is not None
        assert find_task(tasks, kind, "soup").id == find_task(without, kind, "soup").id
    assert find_task(tasks, ArtifactKind.REPORTS, "report").quorum is not None
