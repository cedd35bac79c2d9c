"""Each rank reads its own shard of a mixture and never holds all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.training.state import read_weights
from bam_ray.units import MIB
from tests.support.distributed.cases import Case
from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.start import (
    STARTS,
    peak_bytes_of_start,
    start_whole_and_partial,
    start_with_other_models,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every mixture to start from, in bf16."""
    folder = tmp_path_factory.mktemp("mixtures")
    for name, case in STARTS.items():
        case.model().bfloat16().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(2, start_whole_and_partial, folder, folder)


@pytest.mark.parametrize("name", STARTS)
def test_reading_a_shard_equals_reading_the_whole(name: str, both: list[dict[str, Any]], folder: Path) -> None:
    for rank in both:
        wanted, found = rank[name]
        assert list(found["held"]) == list(wanted["held"])
        for key, (group, tensor) in wanted["held"].items():
            assert found["held"][key][0] == group, key
            assert torch.equal(found["held"][key][1], tensor), key
        assert found["results"] == wanted["results"]
    wanted, found = (read_weights(folder / f"{name}, {whole}") for whole in (True, False))
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


def test_all_ranks_refuse_the_folder_of_another_model(folder: Path) -> None:
    first, second = run_on_ranks(2, start_with_other_models, folder / "kv_experts")
    layer = f"{folder / 'kv_experts'}: model.layers.0"
    assert first == second
    assert first == [
        f"{layer}.mlp.experts.gate_up_proj is [4, 48, 32]: this is the checkpoint of another model",
        f"{layer}.self_attn.attention_experts.q_bias is missing: this is the checkpoint of another model",
    ]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """Return a mixture in bf16, its size in fp32 and the size of its largest parameter, in bytes.

    The same parent folder has a small mixture `tiny`.
    """
    folder = tmp_path_factory.mktemp("sizes")
    for name, width in (("tiny", 32), ("large", 512)):
        sizes = {"hidden_size": width, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 64}
        model = BamForCausalLM(BamConfig(**sizes, num_experts=8))
        bytes_of = [parameter.nbytes for parameter in model.parameters()]
        model.bfloat16().save_pretrained(folder / name)
    return folder / "large", sum(bytes_of), max(bytes_of)


@pytest.mark.parametrize(
    "case", [Case(2), Case(1, zero_stage=3)], ids=["experts sharded", "all weights partitioned by ZeRO-3"]
)
def test_no_rank_holds_the_whole_mixture(case: Case, large: tuple[Path, int, int]) -> None:
    """A rank holds its shard, at most two more parameters and a constant, both at step 0 and at a checkpoint."""
    folder, whole, largest = large
    limit = whole // 2 + 2 * largest + 16 * MIB
    assert whole > 400 * MIB and limit < 0.75 * whole
    for checkpoint in (None, folder / "checkpoint"):
        peaks = run_on_ranks(2, peak_bytes_of_start, case, folder.with_name("tiny"), folder, checkpoint)
        assert max(peaks) < limit, peaks
