"""The tasks of a recipe: their parents, their settings, and the settings that determine their ids."""

import pytest

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.graph import find_task, subset, task_graph
from bam_ray.settings import Demand, Needs, load_recipe
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


CONTROLS = "compare={dense: [0.25, 1, 2]}"


def test_controls_follow_the_seed_and_precede_the_report() -> None:
    tasks, without = task_graph(sample_recipe(CONTROLS)), task_graph(sample_recipe())
    seed, corpus = find_task(tasks, ArtifactKind.SEEDS, "seed"), find_task(tasks, ArtifactKind.CORPORA, "corpus")
    controls = [task for task in tasks if task.kind == ArtifactKind.CONTROLS]
    assert [task.name for task in controls] == ["dense-0.25x", "dense", "dense-2x"]
    assert all(task.parents == (seed.id, corpus.id) and task.gives_way for task in controls)
    others = [task for task in tasks if task not in controls]
    assert others[:-1] == without[:-1]
    assert set(others[-1].parents) - set(without[-1].parents) == {task.id for task in controls}
    assert subset(tasks, ["mixtures"]) == subset(without, ["mixtures"])
    assert subset(tasks, ["controls"]) == [corpus, seed, *controls]


def test_controls_train_on_the_tokens_of_branches_and_mixing() -> None:
    tasks = task_graph(sample_recipe(CONTROLS))
    total = 3 * 2 * 256 + 3 * 1024  # three branches of two batches, and three batches of mixing
    steps = {name: find_task(tasks, ArtifactKind.CONTROLS, name).total_steps for name in ("dense", "dense-0.25x")}
    assert steps == {"dense": -(-total // 1024), "dense-0.25x": 2}  # ceil(1152 / 1024)
    assert find_task(tasks, ArtifactKind.CONTROLS, "dense-2x").step_tokens == 1024
    assert find_task(tasks, ArtifactKind.CONTROLS, "dense-2x").model == "dense"


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("compare.peak_lr=0.005", True),
        ("mix.training.weight_decay=0.2", True),
        ("mix.blend={code: 1.0, law: 2.0}", True),
        ("branch.training.tokens=1024", True),
        ("seed.training.seed=1", True),
        ("mix.losses.load_balance=0.1", False),
        ("branch.training.peak_lr=0.02", False),
        ("compare.needs.gpus=1", False),
        ("compare.workers=2", False),
        ("compare.max_attempts=1", False),
        ("compare.dense=[1, 3]", False),
        ("mix.training.recompute=true", False),
    ],
)
def test_the_id_of_a_control_depends_on_what_it_learns(override: str, changes: bool) -> None:
    before, after = (
        find_task(task_graph(sample_recipe("compare={dense: [1]}", *more)), ArtifactKind.CONTROLS, "dense")
        for more in ([], [override])
    )
    assert (before.id != after.id) == changes


def test_a_control_with_a_prior_has_its_own_identity() -> None:
    before = task_graph(sample_recipe("compare={dense: [1]}"))
    after = task_graph(sample_recipe("compare={dense: [1], prior: [tables, vectors]}"))
    dense, *with_prior = (task for task in after if task.kind == ArtifactKind.CONTROLS)
    assert dense == find_task(before, ArtifactKind.CONTROLS, "dense"), "no other id changes"
    assert [task.name for task in with_prior] == ["dense-prior-tables", "dense-prior-vectors"]
    assert len({task.id.rpartition("-")[2] for task in (dense, *with_prior)}) == 3
    assert {task.total_steps for task in with_prior} == {dense.total_steps}
    assert len({task.model for task in (dense, *with_prior)}) == 3, "they train at different speeds"
    assert [task for task in after if task not in (dense, *with_prior)][:-1] == [
        task for task in before if task != dense
    ][:-1]


@pytest.mark.parametrize(
    ("override", "changes"), [("branch.training.tokens=1024", True), ("compare.prior=[tables]", False)]
)
def test_the_prior_of_another_control_changes_no_id(override: str, changes: bool) -> None:
    before, after = (
        find_task(
            task_graph(sample_recipe("compare={prior: [tables, vectors]}", *more)), "controls", "dense-prior-tables"
        )
        for more in ([], [override])
    )
    assert (before.id != after.id) == changes


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("compare.diloco.workers=4", True),
        ("compare.diloco.every=50", True),
        ("compare.diloco.outer_lr=1.0", True),
        ("compare.diloco.outer_momentum=0.5", True),
        ("compare.workers=4", False),
        ("compare.prior=[tables]", False),
    ],
)
def test_the_id_of_diloco_depends_on_its_own_settings(override: str, changes: bool) -> None:
    before, after = (
        find_task(
            task_graph(sample_recipe("compare={diloco: {workers: 2}, workers: 4, min_workers: 1}", *more)),
            ArtifactKind.CONTROLS,
            "dense-diloco",
        )
        for more in ([], [override])
    )
    assert (before.id != after.id) == changes
    assert (before.workers, before.fewer_workers) == (2, ()), "it never loses a copy"


def test_diloco_changes_no_other_id() -> None:
    before, after = (
        task_graph(sample_recipe(f"compare={{{more}}}")) for more in ("dense: [1]", "diloco: {workers: 4}")
    )
    new = {task.full_name for task in after if task not in before}
    assert new == {"controls/dense-diloco", "reports/report"}


def test_mixtures_of_the_seed_alone_can_train_on_all_tokens() -> None:
    sparse = "upcycle.mixtures.sparse={method: sparse, num_experts: 4}"
    before = task_graph(sample_recipe(sparse))
    after = task_graph(sample_recipe(sparse, "mix.without_branches=all_tokens"))
    changed = {task.full_name for task, other in zip(before, after, strict=True) if task != other}
    assert changed == {"mixtures/sparse", "reports/report"}
    total = 3 * 2 * 256 + 3 * 1024  # three branches of two batches, and three batches of mixing
    assert find_task(after, ArtifactKind.MIXTURES, "sparse").total_steps == -(-total // 1024)
    assert find_task(before, ArtifactKind.MIXTURES, "sparse").total_steps == 3


def test_a_larger_comparison_uses_the_models_of_a_smaller_one() -> None:
    small, large = (load_recipe(f"recipes/compare-{name}.yaml") for name in ("small", "all"))
    assert small.store == large.store
    made, wanted = ({task.id for task in task_graph(each)[:-1]} for each in (small, large))
    assert made < wanted


def test_controls_have_their_own_resources_and_workers() -> None:
    tasks = task_graph(sample_recipe("compare={workers: 4, min_workers: 1, needs: {cpus: 3}, max_attempts: 2}"))
    control = find_task(tasks, ArtifactKind.CONTROLS, "dense")
    assert (control.needs, control.workers, control.fewer_workers) == (Needs(cpus=3), 4, (2, 1))
    assert control.max_attempts == 2 and control.is_group


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


@pytest.mark.parametrize(("embedder", "parents"), [("tfidf", {"corpora"}), ("seed", {"corpora", "seeds"})])
def test_topics_add_one_task_and_change_no_other(embedder: str, parents: set[str]) -> None:
    before = task_graph(sample_recipe())
    after = task_graph(sample_recipe(f"topics={{count: 8, embedder: {embedder}}}"))
    (topics,) = (task for task in after if task not in before)
    assert topics.full_name == "topics/topics"
    assert {task.kind for task in after if task.id in topics.parents} == parents
    assert [task for task in after if task != topics] == before


@pytest.mark.parametrize(("override", "changes"), [("topics.count=auto", True), ("topics.needs={cpus: 4}", False)])
def test_the_id_of_topics_depends_on_what_is_found(override: str, changes: bool) -> None:
    before, after = (
        find_task(task_graph(sample_recipe("topics={count: 8}", *more)), ArtifactKind.TOPICS, "topics")
        for more in ((), (override,))
    )
    assert (before.id != after.id) == changes
