"""A task requests the memory that the planner estimates, and what cannot fit is refused with both numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import PlacementError
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.memory import WorkerShare, state_bytes, task_memory, training_memory, with_memory_requests
from bam_ray.planning.model_size import ModelSize, seed_size
from bam_ray.scheduling.nodes import NodeFacts, satisfiable_request
from bam_ray.settings import Recipe, TrainingSettings, parse_recipe
from bam_ray.units import GIB
from bam_ray.upcycling.routers.initialize import BATCH_TOKENS

RECIPE = """
name: night
store: {uri: 's3://bam/night'}
data:
  domains: {general: {source: x}, code: {source: x}, law: {source: x}, math: {source: x}}
  sequence_length: 1024
  tokenizer: {vocab_size: 49152}
seed:
  scratch: {hidden_size: 576, intermediate_size: 1536, layers: 30, heads: 9, kv_heads: 3}
  training: {tokens: 1000000, batch_tokens: 8192, peak_lr: 0.001}
branch:
  domains: [code, law, math]
  training: {tokens: 1000000, batch_tokens: 8192, peak_lr: 0.001}
upcycle: {mixtures: {bam: {method: bam}, btx: {method: btx, router: {init: ridge}}}}
mix: {workers: 2, training: {tokens: 1000000, batch_tokens: 8192, peak_lr: 0.001}}
"""
SIZE = ModelSize(512, 1536, 8, 512, 512, 8192, tied=True, vectors=2)
TRAINING = TrainingSettings(tokens=8192, peak_lr=1e-4, micro_batch_sequences=4)


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "test", list(overrides))


def requested(*overrides: str) -> dict[str, Task]:
    """Return the tasks of the recipe with their memory requests, by full name."""
    settings = recipe(*overrides)
    return {task.full_name: task for task in with_memory_requests(task_graph(settings), settings, seed_size(settings))}


def nodes(*gib: float) -> list[NodeFacts]:
    """Return nodes of two CPUs with these amounts of memory."""
    return [NodeFacts(f"{n}", f"{n}", "", {"CPU": 2, "memory": size * GIB}) for n, size in enumerate(gib)]


def host_bytes(task: str, *overrides: str) -> int:
    """Return the estimate for a worker of a task of the recipe."""
    settings = recipe(*overrides)
    found = next(each for each in task_graph(settings) if each.full_name == task)
    memory = task_memory(found, settings, seed_size(settings), False)
    assert memory is not None
    return memory.host_bytes


def test_every_task_requests_memory() -> None:
    tasks = requested()
    assert all(task.needs.memory_gib and task.needs.memory_gib > 0.4 for task in tasks.values())
    size = seed_size(recipe())
    assert size is not None
    branch = tasks["branches/law"].needs
    assert branch.memory_gib is not None
    assert branch.memory_gib * GIB > 28 * size.parameters, "weights, gradients, Adam, and the copy for checkpoints"
    assert branch.fallback[0].memory_gib is not None
    assert branch.memory_gib - branch.fallback[0].memory_gib == pytest.approx(
        1.15 * 12 * size.parameters / GIB, abs=0.2
    )


def test_the_recipe_decides_if_it_states_an_amount() -> None:
    tasks = requested("branch.needs.memory_gib=5", "mix.needs.memory_gib=0")
    assert (tasks["branches/law"].needs.memory_gib, tasks["branches/law"].needs.fallback) == (5, ())
    assert (tasks["mixtures/bam"].needs.memory_gib, tasks["mixtures/bam"].needs.fallback) == (0, ())


def test_every_fallback_requests_memory() -> None:
    fallback = "branch.needs={gpus: 1, labels: {kind: a}, fallback: [{cpus: 2}, {cpus: 3, memory_gib: 7}]}"
    needs = requested(fallback)["branches/law"].needs
    assert [(each.cpus, each.gpus) for each in (needs, *needs.fallback)] == [(1, 1), (1, 1), (2, 0), (2, 0), (3, 0)]
    assert needs.labels == needs.fallback[0].labels == {"kind": "a"}
    assert needs.fallback[-1].memory_gib == 7
    assert all(each.memory_gib for each in (needs, *needs.fallback))


def test_nothing_is_requested_if_the_size_is_unknown(tmp_path: Path) -> None:
    tasks = requested(f"seed={{folder: {tmp_path}}}")
    assert tasks["branches/law"].needs.memory_gib is None
    assert tasks["corpora/corpus"].needs.memory_gib


def test_requests_are_not_part_of_an_identity() -> None:
    assert [task.id for task in requested().values()] == [task.id for task in task_graph(recipe())]


def test_what_cannot_fit_is_refused_with_both_numbers() -> None:
    task = requested()["branches/law"]
    least = task.needs.fallback[0].memory_gib
    with pytest.raises(PlacementError) as caught:
        satisfiable_request(task, nodes(2, 1.5, 1))
    message = str(caught.value)
    assert f"{least:g} GiB of memory are needed, and the largest node has 2.0 GiB" in message
    assert "use a smaller micro_batch_sequences or recompute, change branch.needs" in message
    assert "\n" not in message


def test_the_numbers_of_a_group_are_those_of_its_workers() -> None:
    task = requested()["mixtures/bam"]
    with pytest.raises(
        PlacementError, match=r"2 × [\d.]+ GiB of memory are needed, and the largest nodes have 6.0 \+ 3"
    ):
        satisfiable_request(task, nodes(3, 6, 1))


def test_a_shortage_of_cpus_is_not_blamed_on_memory() -> None:
    with pytest.raises(PlacementError) as caught:
        satisfiable_request(requested("branch.needs.cpus=8")["branches/law"], nodes(100, 100))
    assert "of memory are needed" not in str(caught.value)


def test_a_node_without_room_for_the_copy_takes_the_fallback() -> None:
    task = requested()["branches/law"]
    assert task.needs.memory_gib is not None and task.needs.fallback[0].memory_gib is not None
    between = (task.needs.memory_gib + task.needs.fallback[0].memory_gib) / 2
    demand, message = satisfiable_request(task, nodes(between))
    assert demand.memory_gib == task.needs.fallback[0].memory_gib
    assert "using fallback 1" in message
    assert satisfiable_request(task, nodes(100))[0].memory_gib == task.needs.memory_gib


def test_expert_parallelism_divides_the_tables() -> None:
    of_table = 8192 * 512
    size = replace(SIZE, experts=4, ffn_active=2, tables=4)
    tables_only = replace(size, layers=0)
    whole, halves, quarters = (state_bytes(tables_only, TRAINING, WorkerShare(4, count, True)) for count in (1, 2, 4))
    one_table = 12 * of_table  # weight and gradient, and the bucket that gradients are reduced in
    assert (whole - halves, halves - quarters) == (2 * one_table, one_table)
    assert size.expert_parameters - tables_only.expert_parameters == replace(size, tables=1).expert_parameters
    logits_and_slices = [size.head_bytes(100_000, count) for count in (2, 4)]
    assert logits_and_slices[0] == 2 * logits_and_slices[1], "a slice of the vocabulary, for all processes' tokens"


def test_recompute_and_zero_stages_reduce_the_estimate() -> None:
    def memory(share: WorkerShare, **changes: object) -> int:
        return training_memory(SIZE, TRAINING.model_copy(update=changes), 256, share).host_bytes

    alone, two = WorkerShare(), WorkerShare(2, 1, True)
    assert memory(alone, recompute=True) < memory(alone)
    assert memory(two, zero_stage=2) < memory(two)
    large = replace(SIZE, hidden=4096, ffn=11008, layers=32, query=4096, key=4096)
    of_large = [
        training_memory(large, TRAINING.model_copy(update={"zero_stage": stage}), 256, WorkerShare(8, 1, True))
        for stage in (3, 2, 1)
    ]
    assert of_large == sorted(of_large, key=lambda each: each.host_bytes), "small models fit into stage 3's buffers"
    assert memory(WorkerShare(4, 1, True)) < memory(two), "ZeRO divides Adam's states by the processes"


def test_every_process_copies_its_part_of_a_checkpoint() -> None:
    mixture = recipe().upcycle.mixtures["bam"]
    size = SIZE.mixed(mixture, 4)
    one, four = (
        training_memory(size, TRAINING, 256, WorkerShare(4, expert_parallel, True)) for expert_parallel in (1, 4)
    )
    assert four.host_bytes < one.host_bytes
    for memory in (one, four):
        assert memory.host_bytes - memory.least_host_bytes == 12 * size.parameters // 4


def test_the_whole_state_fits_where_late_branches_are_added() -> None:
    late = "upcycle.when={at_least: 1}"
    overrides = ("mix.workers=8", "mix.expert_parallel=4", "mix.training.recompute=true")
    size = seed_size(recipe())
    assert size is not None
    whole = 12 * size.mixed(recipe().upcycle.mixtures["btx"], 4).parameters
    assert host_bytes("mixtures/btx", *overrides) < whole < host_bytes("mixtures/btx", late, *overrides)


def test_a_gpu_has_the_model_and_its_node_the_checkpoint() -> None:
    memory = training_memory(SIZE, TRAINING, 256, WorkerShare(on_gpu=True))
    assert memory.device_bytes is not None and memory.device_bytes > 16 * SIZE.parameters
    assert memory.host_bytes - memory.least_host_bytes == 8 * SIZE.parameters, "loading takes 4 of the 12"


def test_fitted_routers_hold_the_text() -> None:
    settings = recipe()
    tasks = {task.full_name: task for task in task_graph(settings)}
    size = seed_size(settings)
    random, ridge = (task_memory(tasks[f"upcycled/{name}"], settings, size, False) for name in ("bam", "btx"))
    assert random is not None and ridge is not None and ridge.host_bytes > random.host_bytes
    more = recipe("upcycle.mixtures.btx.router.sequences=1024")
    larger = task_memory(tasks["upcycled/btx"], more, size, False)
    rows = 4 * (1024 - settings.upcycle.mixtures["btx"].text_sequences)
    assert larger is not None and larger.host_bytes - ridge.host_bytes == rows * 2 * 4 * 1024 * 576


def test_a_mixture_without_the_seed_has_less_text_and_experts() -> None:
    alone = ("mix.expert_parallel=1", "upcycle.mixtures.btx.seed_expert=false")
    text, expert, router_row = 64 * 2 * 1024 * 576, 3 * 576 * 1536, 576  # of the seed; values of 4 bytes
    fewer = host_bytes("upcycled/btx") - host_bytes("upcycled/btx", *alone)
    assert fewer == 4 * (text + expert + router_row), "one layer is in memory while routers are fitted"
    fewer = host_bytes("mixtures/btx", "mix.expert_parallel=1") - host_bytes("mixtures/btx", *alone)
    assert fewer > 12 * 30 * expert


def test_every_process_holds_all_tables_and_counts() -> None:
    tables = "upcycle.mixtures.bam.embeddings=experts"
    prior = "upcycle.mixtures.bam.router={init: zero, prior: bigram}"
    more = host_bytes("mixtures/bam", tables) - host_bytes("mixtures/bam")
    three = 3 * 49152 * 576  # additional tables
    # Weights, gradients, and half of Adam's states and of the checkpoint's copy, as there are two processes
    assert more > (4 + 4 + (16 + 12) / 2) * three
    counts = 4 * (8 * 49152 + 4 * 2**20)
    more = host_bytes("mixtures/bam", prior) - host_bytes("mixtures/bam")
    assert more == counts * 3 // 2, "the model's, and half of them in the copy"


def test_upcycling_and_the_corpus_hold_the_counts_of_all_text() -> None:
    text = 8 * (49152 + 2**20)  # 8 MiB of pairs, and the tokens
    weights = 4 * 2 * 8 * 49152
    by_counts = host_bytes("upcycled/bam", "upcycle.mixtures.bam.embeddings=counts")
    assert by_counts - host_bytes("upcycled/bam") == 4 * text + weights
    another = host_bytes("corpora/corpus", "data.domains.physics={source: x}")
    assert another - host_bytes("corpora/corpus") == text
    discovered = [f"data.discover={{domains: {count}, sources: {{x: {{source: x}}}}}}" for count in (2, 200)]
    few, many = (host_bytes("corpora/corpus", each) for each in discovered)
    assert few - host_bytes("corpora/corpus") == 2**30 - 4 * text, "the clustering needs more than the counts"
    assert many - host_bytes("corpora/corpus") == 200 * text


def test_the_report_holds_the_largest_model() -> None:
    settings, size = recipe(), seed_size(recipe())
    assert size is not None
    report = next(task for task in task_graph(settings) if task.kind == ArtifactKind.REPORTS)
    memory = task_memory(report, settings, size, on_gpu=False)
    assert memory is not None
    assert memory.host_bytes > 4 * size.mixed(settings.upcycle.mixtures["bam"], 4).parameters


def test_repeated_constants_agree() -> None:
    from bam_ray.planning import memory

    assert memory.FIT_TOKENS == BATCH_TOKENS


def test_topics_request_the_memory_of_their_embedder() -> None:
    requests = {}
    for embedder in ("minilm", "seed"):
        planned = recipe(f"topics={{count: 8, embedder: {embedder}}}")
        size = seed_size(planned)
        (task,) = (task for task in with_memory_requests(task_graph(planned), planned, size) if task.kind == "topics")
        requests[embedder] = task.needs.memory_gib or 0.0
    assert 1.0 < requests["minilm"] < requests["seed"] - 0.4
