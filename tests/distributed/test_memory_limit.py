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
    assert first == [(1, True), (4, False)]
    assert second == [(1, None), (4, None)]


@pytest.mark.slow
def test_a_state_is_held_once_with_and_without_room(tmp_path: Path) -> None:
    states, others = run_on_ranks(2, write_states, tmp_path, (None, 1))
    assert others == [None, None]
    (live, copied, replicated), (live_without_room, copied_without_room, _) = states
    assert (live, live_without_room) == (False, True)
    assert copied == replicated > 0, "what is gathered is a copy already"
    assert copied_without_room == 0
    one, other = ({**read_weights(tmp_path / name), **read_optimizer(tmp_path / name)[0]} for name in ("0", "1"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
