"""Which demands nodes can meet, and what is said of those that they cannot."""

import pytest

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import PlacementError
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.nodes import ACCELERATOR, GIB, NODE_ID, NodeFacts, demand_met, room, selector_of, selects
from bam_ray.settings import Demand, Needs


def node(id: str, cpus: float = 4, gpus: float = 0, gib: float = 32, **labels: str) -> NodeFacts:
    return NodeFacts(id, id, "", {"CPU": cpus, "GPU": gpus, "memory": gib * GIB}, {NODE_ID: id, **labels})


A100 = node("a", gpus=8, **{ACCELERATOR: "A100"})
L4 = node("l", gpus=1, **{ACCELERATOR: "L4"})
PLAIN = node("p")


def task(needs: Needs, workers: int = 1) -> Task:
    return Task(ArtifactKind.BRANCHES, "law", "law-1", (), needs, workers=workers)


@pytest.mark.parametrize(
    ("condition", "there", "met"),
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
def test_label_selectors(condition: str, there: str | None, met: bool) -> None:
    assert selects({"kind": condition}, {"kind": there} if there else {}) is met


def test_room_counts_the_scarcest_resource() -> None:
    nodes = [A100, L4, PLAIN]
    assert room(Demand(cpus=1), nodes) == 12
    assert room(Demand(cpus=1, gpus=1), nodes) == 5
    assert room(Demand(cpus=0, gpus=1), nodes) == 9
    assert room(Demand(cpus=1, memory_gib=20), nodes) == 3
    assert room(Demand(cpus=1), nodes, most=5) == 5
    assert room(Demand(cpus=0), nodes, most=7) == 7, "who wants nothing fits anywhere, as often as asked"


def test_a_kind_is_what_makes_speed_and_not_which_node_it_is() -> None:
    assert A100.kind == "8 A100"
    assert PLAIN.kind == node("other").kind == "4 CPU"
    assert node("x", **{"bam/kind": "spot"}).kind == "4 CPU, bam/kind=spot"


def test_the_first_demand_that_can_be_met_is_taken_and_a_fallback_is_said() -> None:
    needs = Needs(gpus=2, labels={ACCELERATOR: "in(H100,A100)"}, fallback=(Demand(gpus=1), Demand(cpus=4)))
    assert demand_met(task(needs), [PLAIN, L4, A100]) == (needs, "")
    demand, said = demand_met(task(needs), [PLAIN, L4])
    assert demand == Demand(gpus=1)
    assert said == (
        "no node can give 1 CPU, 2 GPU, labels ray.io/accelerator-type=in(H100,A100): took fallback 1, 1 CPU, 1 GPU"
    )
    assert demand_met(task(needs), [PLAIN])[0] == Demand(cpus=4)


def test_a_demand_that_nothing_meets_names_itself_and_what_there_is() -> None:
    needs = Needs(gpus=16, fallback=(Demand(cpus=64),))
    with pytest.raises(PlacementError) as caught:
        demand_met(task(needs), [PLAIN, PLAIN, L4])
    assert str(caught.value) == (
        "branches/law needs 1 CPU, 16 GPU or 64 CPU, which the 3 living nodes can never give (2 × 4 CPU; 1 × 1 L4): "
        "mend branch.needs (or its override) or add nodes"
    )
    with pytest.raises(PlacementError, match=r"6 × \(1 CPU, 1 GPU\)"):
        demand_met(task(Needs(gpus=1), workers=6), [A100, L4])


def test_avoided_nodes_are_left_out_where_others_will_do() -> None:
    nodes = [PLAIN, node("q")]
    assert selector_of(task(Needs(labels={"x": "!y"})), frozenset({"p", "long gone"}), nodes) == {
        "x": "!y",
        NODE_ID: "!in(p)",
    }
    assert selector_of(task(Needs()), frozenset({"p", "q"}), nodes) == {}
    assert selector_of(task(Needs(), workers=8), frozenset({"p"}), nodes) == {}, "eight workers need both"
