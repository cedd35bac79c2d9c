"""Plans of adapters: bytes, memory and makespan, for tasks whose number does not depend on the number of topics."""

from pathlib import Path

import pytest

from bam_ray.planning.cluster_file import ClusterFile
from bam_ray.planning.model_size import seed_size
from bam_ray.planning.planner import make_plan
from bam_ray.settings import Recipe, parse_recipe

RECIPE = """
name: night
store: {uri: 's3://bam/night'}
data: {domains: {general: {source: x}, code: {source: x}}, sequence_length: 1024, tokenizer: {vocab_size: 32000}}
seed:
  scratch: {hidden_size: 512, intermediate_size: 1536, layers: 8, heads: 8, kv_heads: 4}
  training: {tokens: 10000000, batch_tokens: 131072, peak_lr: 0.001}
branch: {domains: [code], training: {tokens: 10000000, batch_tokens: 131072, peak_lr: 0.001}}
upcycle: {mixtures: {bam: {method: bam}}}
mix: {training: {tokens: 10000000, batch_tokens: 131072, peak_lr: 0.001}}
topics: {count: 1000}
adapters: {rank: 8, tasks: 20, training: {tokens: 1000000, batch_tokens: 8192, peak_lr: 0.001}}
"""
NODES = {"count": 24, "cpus": 1, "memory_gib": 32, "tokens_per_second": 100_000}


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "test", list(overrides))


def cluster(**changes: object) -> ClusterFile:
    return ClusterFile.model_validate({"name": "small", "nodes": {"node": {**NODES, **changes}}})


def test_a_plan_counts_all_topics(tmp_path: Path) -> None:
    rows = [row for row in make_plan(recipe()).rows if row.task.kind == "adapters"]
    assert len(rows) == 20
    steps = -(-1_000_000 // 8192)
    assert all(row.tokens == 50 * steps * 8192 for row in rows)
    size = seed_size(recipe())
    assert size is not None
    layer = 2 * (512 + 512) + 2 * (512 + 256) + 3 * (512 + 1536)  # q and o, k and v, the FFN
    assert size.lora_parameters(8) == 8 * 8 * layer
    assert all(row.final_bytes == 50 * 4 * size.lora_parameters(8) for row in rows)
    branch = next(row for row in make_plan(recipe()).rows if row.task.kind == "branches")
    memory, whole = rows[0].memory, branch.memory
    assert memory and whole and memory.host_bytes < whole.host_bytes, "frozen weights have no gradients"


def test_adapters_finish_near_the_bound() -> None:
    planned = make_plan(recipe(), cluster())
    assert planned.failure is None
    (stage,) = [stage for stage in planned.stages if stage.kind == "adapters"]
    assert stage.least_seconds == pytest.approx(1000 * 123 * 8192 / (20 * 150_000), rel=0.01)
    start_and_end = 60 + 20  # seconds, of a cluster file
    assert stage.seconds <= stage.least_seconds + start_and_end + 1


def test_a_lost_node_costs_a_start_and_a_topic() -> None:
    planned = make_plan(recipe(), cluster(preemptions_per_hour=1))
    assert planned.failure is None and planned.simulated is not None
    lost = planned.simulated.preemptions
    (stage,) = [stage for stage in planned.stages if stage.kind == "adapters"]
    assert lost and stage.seconds < 2 * stage.least_seconds


def test_topics_that_are_not_counted_take_an_assumed_time() -> None:
    planned = make_plan(recipe("topics.count=auto"), cluster())
    assert planned.failure is None
    rows = [row for row in planned.rows if row.task.kind == "adapters"]
    assert all(row.tokens == 0 and row.final_bytes is None and row.ends is not None for row in rows)


def test_controls_and_the_evaluation_are_planned() -> None:
    controls = recipe("adapters.controls=[random, all_text]")
    rows = {row.task.full_name: row for row in make_plan(controls).rows}
    part, whole = rows["adapters/part-00"], rows["adapters/control-all-text"]
    assert rows["adapters/control-random-19"].tokens == part.tokens
    assert whole.tokens == 20 * (part.tokens or 0)
    assert whole.final_bytes == (part.final_bytes or 0) // 50, "one adapter"
    assert rows["evaluations/adapters"].memory is not None
    failure = make_plan(controls, cluster()).failure
    assert failure is None
