"""The paper's table as results, and tiny mixtures."""

from collections.abc import Callable

import pytest
import torch

from bam_ray.evaluation.results import Results
from bam_ray.model import BamConfig, BamForCausalLM
from tests.support.paper_table import PAPER, model_score
from tests.support.tiny import SIZES


@pytest.fixture(scope="session")
def paper() -> Results:
    """The results of the paper's table."""
    return Results.of("paper", [model_score(name, row) for name, row in PAPER.items()])


@pytest.fixture
def mixture() -> Callable[..., BamForCausalLM]:
    """Makes tiny random mixtures: `mixture(num_experts_per_tok=2)`."""

    def make(**settings: object) -> BamForCausalLM:
        torch.manual_seed(0)
        return BamForCausalLM(BamConfig(**{**SIZES, "num_experts": 4, **settings})).eval()

    return make
