"""Ranks go on from one checkpoint, whatever each of them can read."""

from typing import Any

import pytest

from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.unreadable_checkpoints import resume_and_roll_back

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(2, resume_and_roll_back, tmp_path_factory.mktemp("disagreeing"))


def test_they_resume_from_the_newest_that_all_can_read(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["resumed at"] == 2, "rank 0 cannot read step 6, rank 1 cannot read step 4"
        assert rank["resumed again at"] == 3


def test_what_one_could_not_read_is_noted_by_all_with_its_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"] == [
            "mixtures/x/steps/0001-00000006 does not match its manifest (for ranks [0] alone: look at their nodes)",
            "mixtures/x/steps/0001-00000004 does not match its manifest (for ranks [1] alone: look at their nodes)",
        ]
        assert rank["remembered"] == rank["refused"]


def test_they_go_back_to_the_newest_that_all_can_read(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert ("refused", "0003-00000004") in rank["told"]
        assert rank["told"][-1] == ("rolled_back", 3)
        assert rank["curve"] == rank["unbroken"]


def test_what_only_some_can_read_is_not_begun_over(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "can be read on all 2 processes" in rank["error"]
        assert "look at the nodes of ranks [0, 1]," in rank["error"]
