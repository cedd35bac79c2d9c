"""Resource requests that nodes can satisfy, and the messages about those that they cannot."""

import pytest

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import PlacementError
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.nodes import (
    ACCELERATOR,
    GIB,
    NODE_ID,
    NodeFacts,
    label_selector,
    satisfiable_request,
    selects,
    worker_capacity,
)
from bam_ray.settings import Demand, Needs


def node(id: str, cpus: float = 4, gpus: float = 0, gib: float = 32, **labels: str) -> NodeFacts:
    return NodeFacts(id, id, "", {"CPU": cpus, "GPU": gpus, "memory": gib * GIB}, {NODE_ID: id, **labels})


A100 = node("a", gpus=8, **{ACCELERATOR: "A100"})
L4 = node("l", gpus=1, **{ACCELERATOR: "L4"})
PLAIN = node("p")


def task(needs: Needs, workers: int = 1) -> Task:
    return Task(ArtifactKind.BRANCHES, "law", "law-1", (), needs, workers=workers)


@pytest.mark.parametrize(
    ("condition", "label", "matches"),
    [
        ("A100", "A100", True),
        ("A100", None, False),
        ("!A100", "L4", True),
        ("!A100", None, True),
        ("in(A100, H100)", "H100", True),
        ("in(A100,H100)", "L4", False),
        ("!in(A100,H100)", "H100", False),
    ],
)
def test_label_selectors(condition: str, label: str | None, matches: bool) -> None:
    assert selects({"kind": condition}, {"kind": label} if label else {}) is matches


def test_capacity_counts_the_scarcest_resource() -> None:
    nodes = [A100, L4, PLAIN]
    assert worker_capacity(Demand(cpus=1), nodes) == 12
    assert worker_capacity(Demand(cpus=1, gpus=1), nodes) == 5
    assert worker_capacity(Demand(cpus=0, gpus=1), nodes) == 9
    assert worker_capacity(Demand(cpus=1, memory_gib=20), nodes) == 3
    assert worker_capacity(Demand(cpus=1), nodes, limit=5) == 5
    assert worker_capacity(Demand(cpus=0), nodes, limit=7) == 7, "a request for nothing fits up to the limit"


def test_nodes_of_equal_speed_have_the_same_kind() -> None:
    assert A100.kind == "8 A100"
    assert PLAIN.kind == node("other").kind == "4 CPU"
    assert node("x", **{"bam/kind": "spot"}).kind == "4 CPU, bam/kind=spot"


def test_the_first_satisfiable_request_is_chosen_with_a_message() -> None:
    needs = Needs(gpus=1, labels={ACCELERATOR: "in(H100,A100)"}, fallback=(Demand(gpus=1), Demand(cpus=4)))
    assert satisfiable_request(task(needs), [PLAIN, L4, A100]) == (needs, "")
    demand, message = satisfiable_request(task(needs), [PLAIN, L4])
    assert demand == Demand(gpus=1)
    assert message == (
        "no node can satisfy 1 CPU, 1 GPU, labels ray.io/accelerator-type=in(H100,A100): using fallback 1, 1 CPU, 1 GPU"
    )
    assert satisfiable_request(task(needs), [PLAIN])[0] == Demand(cpus=4)


def test_an_unsatisfiable_request_is_reported_with_the_nodes() -> None:
    needs = Needs(gpus=1, memory_gib=999, fallback=(Demand(cpus=64),))
    with pytest.raises(PlacementError) as caught:
        satisfiable_request(task(needs), [PLAIN, PLAIN, L4])
    assert str(caught.value) == (
        "no node can satisfy branches/law (1 CPU, 1 GPU, 999 GiB or 64 CPU); "
        "the cluster has 3 living nodes (2 × 4 CPU; 1 × 1 L4): change branch.needs (or its override) or add nodes"
    )
    with pytest.raises(PlacementError, match=r"6 × \(1 CPU, 1 GPU\)"):
        satisfiable_request(task(Needs(gpus=1), workers=6), [A100, L4])


def test_nodes_are_avoided_only_if_the_others_are_enough() -> None:
    nodes = [PLAIN, node("q")]
    assert label_selector(task(Needs(labels={"x": "!y"})), frozenset({"p", "long gone"}), nodes) == {
        "x": "!y",
        NODE_ID: "!in(p)",
    }
    assert label_selector(task(Needs()), frozenset({"p", "q"}), nodes) == {}
    assert label_selector(task(Needs(), workers=8), frozenset({"p"}), nodes) == {}, "eight workers need both"
