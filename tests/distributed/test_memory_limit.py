"""The memory limit of a task bounds the micro batch and the checkpoint copies of the DeepSpeed engine."""

from pathlib import Path

import pytest
import torch

from bam_ray.training.state import read_optimizer, read_weights
from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.memory_limit import train_with_limits, write_states


@pytest.mark.slow
def test_the_memory_limit_bounds_micro_batch_and_checkpoint_copy() -> None:
    first, second = run_on_ranks(2, train_with_limits, (1, None))
    assert first == second == [(1, True), (4, False)]


@pytest.mark.slow
def test_every_rank_copies_its_own_part_of_the_state(tmp_path: Path) -> None:
    ranks = run_on_ranks(2, write_states, tmp_path, (None, 1))
    one, other = ({**read_weights(tmp_path / name), **read_optimizer(tmp_path / name)[0]} for name in ("0", "1"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    whole = sum(tensor.nbytes for tensor in one.values())
    assert [live for (live, _), _ in ranks] == [False, False]
    assert sum(copied for (_, copied), _ in ranks) == whole, "a rank copied what another one saves"
    assert max(copied for (_, copied), _ in ranks) < 0.51 * whole
    assert [without_room for _, without_room in ranks] == [(True, 0)] * 2
