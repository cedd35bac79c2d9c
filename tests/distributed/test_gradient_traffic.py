"""Each gradient travels only to the rank that updates the weight."""

import pytest

from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.gradient_traffic import sent_to_all_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [1, 2])
def test_no_gradient_is_sent_to_all_of_many_ranks(stage: int) -> None:
    for largest, parameters in run_on_ranks(3, sent_to_all_ranks, 3, stage):
        assert 0 < largest < 0.01 * parameters
