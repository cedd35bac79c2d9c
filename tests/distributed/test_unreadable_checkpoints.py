"""All ranks resume from the same checkpoint, even if some of them cannot read some checkpoints."""

from typing import Any

import pytest

from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.unreadable_checkpoints import resume_and_roll_back

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(2, resume_and_roll_back, tmp_path_factory.mktemp("disagreeing"))


def test_ranks_resume_from_the_newest_checkpoint_readable_by_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["resumed at"] == 2, "rank 0 cannot read step 6, rank 1 cannot read step 4"
        assert rank["resumed again at"] == 3


def test_all_ranks_record_which_rank_could_not_read_a_checkpoint(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"] == [
            "mixtures/x/steps/0001.0001-00000006 does not match its manifest (only on ranks [0]: check their nodes)",
            "mixtures/x/steps/0001.0001-00000004 does not match its manifest (only on ranks [1]: check their nodes)",
        ]
        assert rank["remembered"] == rank["refused"]


def test_rollback_uses_the_newest_checkpoint_readable_by_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert ("refused", "0003.0001-00000004") in rank["events"]
        assert rank["events"][-1] == ("rolled_back", 3)
        assert rank["curve"] == rank["unbroken"]


def test_training_does_not_restart_if_only_some_ranks_can_read(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "can be read on all 2 processes" in rank["error"]
        assert "the nodes of ranks [0, 1]," in rank["error"]
