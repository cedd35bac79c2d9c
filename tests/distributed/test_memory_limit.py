"""The memory limit of a task bounds the micro batch and the checkpoint copies of the DeepSpeed engine."""

import pytest

from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.memory_limit import train_with_limits


@pytest.mark.slow
def test_the_memory_limit_bounds_micro_batch_and_checkpoint_copy() -> None:
    first, second = run_on_ranks(2, train_with_limits, (1, None))
    assert first == [(1, True), (4, False)]
    assert second == [(1, None), (4, None)]
