"""Before its first step, an engine has made everything that takes memory, and its groups have one timeout."""

from pathlib import Path
from typing import Any

import pytest

from bam_ray.training.devices import COLLECTIVE_TIMEOUT
from tests.support.distributed.engine_start import STAGES, everything
from tests.support.distributed.gloo_ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("states")
    return run_on_ranks(2, everything, folder)


def test_all_process_groups_have_one_timeout(two: list[dict[str, Any]]) -> None:
    for rank in two:
        timeouts = rank["groups"]["timeouts"]
        assert len(timeouts) >= 4, "the world, DeepSpeed's copy of it, and two of the experts"
        assert set(timeouts) == {COLLECTIVE_TIMEOUT.total_seconds()}


def test_the_groups_of_experts_are_connected_at_once(two: list[dict[str, Any]]) -> None:
    assert all(rank["groups"]["connected"] for rank in two)


def test_a_step_does_not_wait_for_the_device(two: list[dict[str, Any]]) -> None:
    assert [rank["synchronizations"] for rank in two] == [0, 0]


@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_measured_with_adams_states(stage: int, two: list[dict[str, Any]]) -> None:
    for rank in two:
        for measured, after in rank["states"][stage].values():
            assert measured == after > 0


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_names_settings_that_help(stage: int, two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = rank["errors"][stage]
        assert found["update"].startswith("out of memory in the update of the weights (")
        assert found["update"].endswith("use devices with more memory, or more workers with zero_stage 2 or 3")
        if stage == 1:
            assert "out of memory with a micro batch of one sequence" in found["auto"]
            continue
        assert found["auto"] == (
            "out of memory with 4 sequences at once on each of 2 processes: set recompute: true, use more processes or "
            "use devices with more memory"
        )
        assert found["4"].startswith(
            "out of memory with 4 sequences at once on each of 2 processes: set a smaller micro_batch_sequences, set "
        )
        assert found["1"].startswith(
            "out of memory with 1 sequence at once on each of 2 processes: set recompute: true, use more processes"
        )
