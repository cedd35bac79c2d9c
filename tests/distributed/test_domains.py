"""What is counted by domain is of the global batch, however many processes count."""

import pytest
import torch

from bam_ray.training.engine import TorchEngine
from tests.support.distributed.cases import SHARE, shares
from tests.support.distributed.domains import CASES, DOMAINS, statistics_of_rank, step_statistics
from tests.support.distributed.gloo_ranks import run_on_ranks


@pytest.mark.slow
def test_two_ranks_count_by_domain_what_one_process_counts() -> None:
    first, second = run_on_ranks(2, statistics_of_rank)
    for name, case in CASES.items():
        alone = TorchEngine(case.model(), case.settings(2 * SHARE), case.mixing)
        wanted = step_statistics(alone, shares(2, 0).flatten(0, 1), DOMAINS)
        for part, tensor in wanted.items():
            assert torch.equal(first[name][part], second[name][part]), "ranks disagree"
            torch.testing.assert_close(first[name][part], tensor, rtol=1e-5, atol=1e-6, msg=f"{name}: {part}")
        by_domain = first[name]["choices"].sum(-1)
        torch.testing.assert_close(by_domain, torch.tensor([4.0, 1.0, 3.0]).div(8).expand_as(by_domain))
