"""The nodes of the local cluster offer the memory of their machine once."""

from pathlib import Path

import pytest

from bam_ray.units import GIB
from cluster.machine import available_memory, memory_of_nodes
from cluster.ray_nodes import HEAD, NODES, RayNodes
from cluster.state import ClusterState

CPUS = {"large": 2, "small": 1, "spot": 1}


@pytest.fixture
def state(tmp_path: Path) -> ClusterState:
    return ClusterState(temporary=str(tmp_path), memory=24 * GIB)


def offered(command: list[str]) -> int:
    """Return the memory that the command of a node offers."""
    return next(int(part.partition("=")[2]) for part in command if part.startswith("--memory="))


def test_nodes_offer_no_more_than_there_is(state: ClusterState, tmp_path: Path) -> None:
    nodes = RayNodes(tmp_path)
    memory = {node.name: offered(nodes.launch_of(node, state, {})[0]) for node in NODES}
    assert sum(memory.values()) <= state.memory - 2 * GIB, "Ray, the S3 server and the driver need some"
    assert memory["large"] == pytest.approx(2 * memory["small"], rel=0.01)
    assert memory[HEAD.name] < GIB


def test_a_small_machine_offers_something() -> None:
    assert sum(memory_of_nodes(GIB, CPUS).values()) == GIB


def test_the_monitor_of_the_head_spares_the_driver(state: ClusterState, tmp_path: Path) -> None:
    nodes = RayNodes(tmp_path)
    environments = {node.name: nodes.launch_of(node, state, {"PATH": "/bin"})[1] for node in NODES}
    monitors = {name: environment.get("RAY_memory_monitor_refresh_ms") for name, environment in environments.items()}
    assert monitors == {"head": "0", "large": None, "small": None, "spot": None}


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    whole = available_memory(tmp_path)
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 4}\n")
    assert available_memory(tmp_path) == 3 * GIB // 4 < whole


def test_an_unlimited_container_has_the_memory_of_its_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    assert available_memory(tmp_path) > GIB // 4
