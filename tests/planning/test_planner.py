"""Plans: model sizes computed without torch, and runs simulated without a cluster."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from bam_ray.errors import PlacementError, SettingsError
from bam_ray.planning.cluster_file import ClusterFile, load_cluster
from bam_ray.planning.memory import activation_bytes
from bam_ray.planning.model_size import ModelSize, seed_size
from bam_ray.planning.plan_table import render_plan
from bam_ray.planning.planner import Plan, make_plan
from bam_ray.settings import Recipe, load_recipe
from bam_ray.training.flops import training_flops
from tests.support import tiny
from tests.support.planning.night_recipe import recipe

ROOT = Path(__file__).parents[2]


def eight() -> ClusterFile:
    return load_cluster(ROOT / "recipes" / "clusters" / "eight-mixed-nodes.yaml")


def text(plan: Plan, width: int = 160) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(render_plan(plan, width))
    return capture.get()


def device_bytes(recipe: Recipe, name: str) -> int:
    """Return the planned memory of the GPU of a worker of the task `name`."""
    memory = next(row.memory for row in make_plan(recipe).rows if row.task.full_name == name)
    assert memory is not None and memory.device_bytes is not None
    return memory.device_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_a_scratch_seed_has_the_size_that_transformers_reports(tied: bool) -> None:
    from bam_ray.stages.dense import scratch_config

    class Corpus:
        vocab_size, end_of_text_id = 32000, 0

    planned = recipe(f"seed.scratch.tie_embeddings={tied}")
    settings = planned.seed.scratch
    assert settings is not None
    config = scratch_config(settings, Corpus())  # type: ignore[arg-type]
    size = seed_size(planned)
    assert size is not None
    assert size.parameters == AutoModelForCausalLM.from_config(config).num_parameters()
    assert size.training_flops(1024) == pytest.approx(training_flops(config, 1024, 1))


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_a_model_folder_has_the_size_of_its_configuration(tmp_path: Path, family: str) -> None:
    config = tiny.CONFIGS[family]
    config.save_pretrained(tmp_path)
    size = seed_size(recipe(f"seed={{folder: {tmp_path}}}"))
    assert size is not None
    assert size.parameters == pytest.approx(AutoModelForCausalLM.from_config(config).num_parameters(), rel=0.01)
    within_the_windows = 4
    assert size.training_flops(within_the_windows) == pytest.approx(training_flops(config, within_the_windows, 1))


def test_mixtures_have_the_sizes_of_the_paper() -> None:
    """Table 9, small seed: 587.2M; BTX has 700.5M, BAM 738.3M with shared and 776.0M with separate keys and values."""
    seed = ModelSize(1024, 2048, 6, 1024, 1024, 256_000, tied=False, vectors=1)
    settings = recipe("upcycle.mixtures.shared={method: bam, attention_experts: kv_shared}").upcycle.mixtures
    sizes = [seed, *(seed.mixed(settings[name], 4) for name in ("btx", "shared", "bam"))]
    assert [round(size.parameters / 1e6, 1) for size in sizes] == [587.2, 700.5, 738.3, 776.0]


def test_memory_is_left_out_if_the_size_is_unknown(tmp_path: Path) -> None:
    unknown = recipe(f"seed={{folder: {tmp_path}}}")
    plan = make_plan(unknown)
    assert all(row.final_bytes is None for row in plan.rows)
    assert {row.task.kind for row in plan.rows if row.memory} == {"corpora", "seeds"}, "those do not depend on the size"
    assert "not known before the run" in text(plan)
    with pytest.raises(SettingsError, match="give tokens_per_second"):
        make_plan(unknown, eight())


def test_memory_and_stored_bytes() -> None:
    rows = {row.task.full_name: row for row in make_plan(recipe()).rows}
    law, size = rows["branches/law"], seed_size(recipe())
    assert size is not None
    assert law.tokens == 7630 * 131072
    assert law.final_bytes == 4 * size.parameters
    assert law.written_bytes == (4 + 76 * 12 + 4) * size.parameters, (
        "the start, a checkpoint every 100 steps, and the branch"
    )
    assert law.peak_bytes == 3 * 12 * size.parameters, "the third checkpoint is written before the first is deleted"
    assert law.memory is not None and law.memory.device_bytes is not None
    assert law.memory.device_bytes > 16 * size.parameters
    assert law.memory.host_bytes > 12 * size.parameters, "the copy of a checkpoint"
    four, eight = (device_bytes(recipe(f"branch.training.micro_batch_sequences={n}"), "branches/law") for n in (4, 8))
    # A fitted micro batch counts as one sequence on a GPU
    assert eight - four == pytest.approx(4 * (four - law.memory.device_bytes) / 3) and eight > four


def test_the_counts_of_a_prior_are_stored_with_each_model() -> None:
    prior = recipe("upcycle.mixtures.bam.router={init: zero, prior: bigram}")
    plain, with_counts = (
        {row.task.full_name: row.final_bytes or 0 for row in make_plan(each).rows} for each in (recipe(), prior)
    )
    counts = 4 * (8 * 32000 + 4 * 2**20)
    for name in ("upcycled/bam", "mixtures/bam"):
        assert with_counts[name] - plain[name] == counts


def test_the_memory_of_logits_does_not_grow_with_the_micro_batch() -> None:
    def of_more(vocabulary: int) -> int:
        size = ModelSize(512, 1536, 8, 512, 256, vocabulary, tied=True, vectors=2)
        training = recipe().branch.training
        four, eight = (training.model_copy(update={"micro_batch_sequences": n}) for n in (4, 8))
        return activation_bytes(size, eight, 8 * 1024, 1) - activation_bytes(size, four, 4 * 1024, 1)

    assert of_more(256_000) == of_more(32_000) > 0


def test_memory_is_the_maximum_over_possible_expert_counts() -> None:
    def memory(*overrides: str) -> int:
        return device_bytes(recipe(*overrides), "mixtures/btx")

    assert memory("upcycle.when={at_least: 3}") == memory()
    odd = "upcycle.when={at_least: 2}"  # two processes cannot share three experts
    assert memory() < memory(odd) < memory("mix.expert_parallel=1")


@pytest.mark.parametrize(
    ("setting", "final", "peak"),
    [
        ("keep_last=1", 4, 2 * 12),
        ("keep_last=5", 4, 6 * 12),
        ("keep_last=100", 4, 4 + 76 * 12 + 4),  # more than training writes
        ("keep_every=1000", 4 + 7 * 12 + 4, 4 + 7 * 12 + 3 * 12),  # the start, and steps 1000 to 7000
        (
            "keep_every=150",
            4 + 25 * 12 + 4,
            4 + 25 * 12 + 2 * 12,
        ),  # every 300 steps, and one of the newest
    ],
)
def test_kept_checkpoints_are_counted(setting: str, final: int, peak: int) -> None:
    planned = recipe(f"branch.training.{setting}")
    law, size = make_plan(planned).rows[3], seed_size(planned)
    assert size is not None and law.task.full_name == "branches/law"
    assert (law.final_bytes, law.peak_bytes) == (final * size.parameters, peak * size.parameters)


def test_a_simulated_plan_shows_all_tasks_with_their_times() -> None:
    plan = make_plan(recipe(), eight())
    assert plan.simulated is not None and plan.simulated.outcome == "finished"
    ends = {row.task.full_name: row.ends for row in plan.rows}
    starts = {row.task.full_name: row.starts for row in plan.rows}
    assert all(end is not None for end in ends.values())
    assert max(end for end in ends.values() if end) == ends["reports/report"] == plan.simulated.seconds
    assert starts["branches/law"] >= ends["seeds/seed"]  # type: ignore[operator]
    for stage in plan.stages:
        assert stage.seconds >= stage.least_seconds
    shown = text(plan)
    for words in (
        "branches law",
        "mixtures bam",
        "spot-l4-0",
        "simulated on eight-mixed-nodes (8 nodes): finished after",
    ):
        assert words in " ".join(shown.split())


def test_controls_are_planned_like_branches() -> None:
    plan = make_plan(
        recipe("compare={dense: [1, 0.5], prior: [tables, vectors], diloco: {workers: 4}, needs: {gpus: 1}}"), eight()
    )
    rows = {row.task.full_name: row for row in plan.rows}
    branch, dense, half = (rows[name] for name in ("branches/code", "controls/dense", "controls/dense-0.5x"))
    assert dense.tokens == 3 * branch.tokens + rows["mixtures/bam"].tokens
    assert half.tokens == pytest.approx(dense.tokens / 2, abs=131072)
    assert dense.memory == branch.memory
    assert dense.final_bytes == branch.final_bytes
    assert dense.nodes and dense.ends is not None
    tables, vectors = (rows[f"controls/dense-prior-{form}"] for form in ("tables", "vectors"))
    assert tables.tokens == vectors.tokens == dense.tokens
    assert tables.final_bytes > vectors.final_bytes > dense.final_bytes
    diloco = rows["controls/dense-diloco"]
    assert (diloco.tokens, diloco.final_bytes) == (dense.tokens, dense.final_bytes)
    assert diloco.written_bytes > dense.written_bytes and diloco.task.workers == 4
    assert diloco.memory is not None and dense.memory is not None
    assert diloco.memory.device_bytes > dense.memory.device_bytes
    assert tables.memory is not None and vectors.memory is not None and dense.memory is not None
    assert tables.memory.host_bytes > vectors.memory.host_bytes > dense.memory.host_bytes
    assert "controls" in [stage.kind for stage in plan.stages]
    assert "controls: " in text(plan) and "dense-0.5x" in text(plan)


def test_a_comparison_counts_all_training_seeds() -> None:
    """Every training seed trains its own models; without `compare`, nothing is said about it."""
    plan = make_plan(recipe("compare={dense: [1, 0.5], seeds: [3, 4, 5, 6]}"))
    of_one = [row for row in plan.rows if row.task.kind != "corpora"]
    assert len(plan.compared) == 1 + 4 * len(of_one)
    assert sum(row.tokens for row in plan.compared) == 4 * sum(row.tokens for row in of_one)
    assert sum(row.final_bytes or 0 for row in plan.compared) == 4 * sum(row.final_bytes or 0 for row in of_one)
    shown = " ".join(text(plan).split())
    assert "bam compare makes these models with the training seeds 3, 4, 5, 6: " in shown
    assert "bam compare" not in text(make_plan(recipe()))


def test_eighty_columns_show_nodes_and_times_uncut() -> None:
    plan = make_plan(recipe(), eight())
    shown = text(plan, 80)
    assert "…" not in shown.partition("parameters per branch")[0].replace(", …", "")
    words = shown.replace(",", " ").split()
    assert all(name in words for row in plan.rows for name in row.nodes[:4])
    assert {"stage", "task", "nodes", "start", "end"} <= set(words)
    assert "1 CPU, 1 GPU" not in shown and "1 CPU, 1 GPU" in text(plan), "the resource requests are left out first"


def test_times_are_exact_next_to_a_stage_of_months() -> None:
    """Events of minutes are not rounded to the controller steps of a seed that trains for 67 days."""
    paper = load_recipe(
        ROOT / "recipes" / "paper-590m.yaml",
        ["branch.training.checkpoint_every=100", "mix.training.checkpoint_every=20", "mix.min_workers=2"],
    )
    plan = make_plan(paper, eight())
    assert plan.simulated is not None and plan.simulated.outcome == "finished" and plan.failure is None
    ends = {row.task.full_name: row.ends for row in plan.rows}
    assert ends["corpora/corpus"] == 90 + 600, "the start and the stage"
    days = {stage.kind: stage.seconds / 86400 for stage in plan.stages}
    assert 66 < days["seeds"] < 68
    assert 21 < days["branches"] < 22.5
    for stage in plan.stages:
        assert 1.0 <= stage.seconds / stage.least_seconds < 1.2


def test_the_lower_bound_counts_what_each_mixture_costs() -> None:
    paper = load_recipe(
        ROOT / "recipes" / "paper-590m.yaml", ["mix.needs={gpus: 1, labels: {bam/kind: mix}}", "mix.at_once=8"]
    )
    plan = make_plan(paper, load_cluster(ROOT / "recipes" / "clusters" / "aws.yaml"))
    mixtures = next(stage for stage in plan.stages if stage.kind == "mixtures")
    assert mixtures.seconds >= mixtures.least_seconds


def unstable_cluster(preemptions_per_hour: float, replacement_seconds: float) -> ClusterFile:
    """Return eight nodes of one kind that are preempted."""
    group = {"count": 8, "gpus": 1, "tflops": 50, "preemptions_per_hour": preemptions_per_hour}
    group["replacement_seconds"] = replacement_seconds
    return ClusterFile.model_validate({"name": "unstable", "nodes": {"spot": group}})


def test_a_failed_simulation_shows_its_error_and_no_ratios() -> None:
    plan = make_plan(recipe("branch.training.checkpoint_every=100000"), unstable_cluster(4.0, 900))
    assert plan.simulated is not None and plan.simulated.outcome == "failed"
    assert plan.failure is not None and "\n" not in plan.failure
    assert plan.failure.startswith("the simulated run fails after ") and "was preempted" in plan.failure
    assert [stage.kind for stage in plan.stages] == ["seeds"]
    assert all(row.ends is None for row in plan.rows if row.task.kind == "mixtures")
    assert "branches: " not in text(plan) and "failed after" in text(plan)


def test_a_simulation_that_never_finishes_is_stopped() -> None:
    plan = make_plan(recipe("seed.training.tokens=10_000_000_000"), unstable_cluster(1.0, 1e9))
    assert plan.simulated is not None and plan.simulated.outcome == "running"
    assert plan.failure is not None and "\n" not in plan.failure
    assert "has not finished after" in plan.failure and "10 times the shortest possible time" in plan.failure
    assert "not finished after" in text(plan)


def test_tasks_that_the_cluster_cannot_hold_are_reported() -> None:
    with pytest.raises(
        PlacementError,
        match=r"no node can satisfy branches/code \(1 CPU, 1 GPU, 999 GiB\); the cluster has 8 living nodes ",
    ):
        make_plan(recipe("branch.needs.memory_gib=999"), eight())
    plan = make_plan(recipe("branch.training.micro_batch_sequences=128"), eight())
    assert "a GPU of spot-l4 has 24 GiB, too little for branches/code" in text(plan)


@pytest.mark.parametrize("quorum", [[], ["upcycle.when={at_least: 2}"]], ids=["all", "quorum"])
def test_a_soup_is_planned_as_a_dense_model(tmp_path: Path, quorum: list[str]) -> None:
    demo = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    demo["upcycle"]["mixtures"]["soup"] = {"method": "soup"}
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump(demo))
    plan = make_plan(
        load_recipe(tmp_path / "soup.yaml", quorum), load_cluster(ROOT / "recipes" / "clusters" / "laptop.yaml")
    )
    rows = {row.task.full_name: row for row in plan.rows}
    upcycled, trained, branch = rows["upcycled/soup"], rows["mixtures/soup"], rows["branches/law"]
    assert plan.size is not None and plan.failure is None
    assert upcycled.final_bytes == trained.final_bytes == 4 * plan.size.parameters
    assert trained.memory is not None and branch.memory is not None
    assert trained.memory.host_bytes > branch.memory.host_bytes, "two processes also hold ZeRO's buffers"
    ends = [rows[f"branches/{domain}"].ends or math.inf for domain in ("code", "law", "medicine")]
    assert trained.starts is not None and max(ends) <= trained.starts
    assert "soup" in text(plan)


def test_a_run_on_two_hundred_nodes_is_planned() -> None:
    domains = {"general": {"source": "x"}, **{f"d{i}": {"source": "x"} for i in range(63)}}
    wide = recipe(
        f"data.domains={json.dumps(domains)}", f"branch.domains={json.dumps(sorted(domains))}", "mix.expert_parallel=1"
    )
    plan = make_plan(wide, load_cluster(ROOT / "recipes" / "clusters" / "spot-200.yaml"))
    assert plan.simulated is not None and plan.simulated.outcome == "finished"


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from bam_ray.planning.planner import make_plan;"
        "from bam_ray.planning.cluster_file import load_cluster;"
        "from bam_ray.settings import load_recipe;"
        "make_plan(load_recipe('recipes/demo.yaml'), load_cluster('recipes/clusters/laptop.yaml'));"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
