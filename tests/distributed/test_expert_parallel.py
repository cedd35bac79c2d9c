"""Expert-parallel training on 2 and 4 gloo processes gives the results of one process."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bam_ray.training.state import read_optimizer, read_weights
from bam_ray.training.torch_engine import TorchEngine
from tests.support.distributed.cases import (
    BF16,
    COHERE,
    FOUR,
    FOUR_BF16,
    LENGTH,
    LR,
    OTHER_STAGES,
    RESUMED,
    SHARE,
    STEPS,
    TWO,
    Case,
    shares,
    step_losses,
)
from tests.support.distributed.expert_parallel import (
    HEADS,
    ffn_gradients,
    head_gradients,
    routed_tokens,
    train_on_four,
    train_on_two,
)
from tests.support.distributed.gloo_ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(2, train_on_two, folder)


@pytest.fixture(scope="module")
def four(two: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(4, train_on_four, folder)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights, Adam's states and the number of updates in a folder."""
    states, step = read_optimizer(folder)
    return {**read_weights(folder), **states, "step": torch.tensor(step)}


def assert_same_training(saved: Path, reference: Path) -> None:
    """Assert that two states differ by rounding only.

    Adam's first update is lr · sign(gradient). If a gradient is zero except for rounding, its sign is random, so a few
    weights may differ by up to 2 · lr.
    """
    one, other = state(saved), state(reference)
    assert one.keys() == other.keys()
    assert one.pop("step") == other.pop("step")
    weights = {name for name in one if "exp_avg" not in name}
    differences = torch.cat([(one[name] - other[name]).abs().flatten() for name in weights])
    assert (differences > 1e-5).float().mean() < 1e-3
    assert differences.max() <= 2 * LR
    for name in one.keys() - weights:
        largest = other[name].abs().max().item()
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4 * largest, msg=name)


def assert_same_gradients(saved: Path, reference: Path) -> None:
    """Assert that the first gradients of two states are equal.

    After one step, Adam's states are the clipped gradient and its square, each multiplied by a constant.
    """
    one, other = read_optimizer(saved)[0], read_optimizer(reference)[0]
    assert one.keys() == other.keys()
    for name, wanted in other.items():
        tolerance = 3e-5 if name.endswith("_sq") else 1e-5
        torch.testing.assert_close(one[name], wanted, rtol=0, atol=tolerance * wanted.abs().max().item(), msg=name)


def in_order_of_micro_batches(batch: torch.Tensor, micro: int) -> torch.Tensor:
    """Put the sequences that ranks compute at the same time together: [ranks, SHARE, LENGTH] -> [sequences, LENGTH]."""
    return torch.cat([part.flatten(0, 1) for part in batch.split(micro, dim=1)])


def train_on_one_process(case: Case, world_size: int, folder: Path) -> list[dict[str, float]]:
    """Train a case with `TorchEngine` on the batches of `world_size` ranks, and return the step results.

    The state is saved to `folder` at the end, and to `folder`/first after one step.
    """
    engine = TorchEngine(case.spec(case.micro * world_size))
    batches = [in_order_of_micro_batches(shares(world_size, step), case.micro) for step in range(STEPS)]
    results = [step_losses(engine.step(batches[0], LR))]
    (folder / "first").mkdir()
    engine.state().write(folder / "first")
    results += [step_losses(engine.step(batch, LR)) for batch in batches[1:]]
    engine.state().write(folder)
    return results


def assert_equals_one_process(
    case: Case, results: list[list[dict[str, float]]], expected: list[dict[str, float]], tolerance: float
) -> None:
    assert all(other == results[0] for other in results[1:]), "ranks disagree"
    for step, wanted in zip(results[0], expected, strict=True):
        assert wanted["grad_norm"] > case.settings(1).clip_norm  # so that gradients are clipped
        assert step == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_equal_one(name: str, two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    assert_equals_one_process(
        TWO[name], [rank[name] for rank in two], train_on_one_process(TWO[name], 2, tmp_path), 1e-5
    )
    assert_same_gradients(folder / f"{name}, first", tmp_path / "first")
    assert_same_training(folder / name, tmp_path)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one(name: str, four: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    assert_equals_one_process(
        FOUR[name], [rank[name] for rank in four], train_on_one_process(FOUR[name], 4, tmp_path), 1e-5
    )
    assert_same_gradients(folder / f"{name}, first", tmp_path / "first")
    assert_same_training(folder / name, tmp_path)


def test_noisy_gates_give_the_same_results_at_any_expert_parallel(two: list[dict[str, Any]], folder: Path) -> None:
    """Each rank draws its own noise, so a single process would have different noise."""
    for rank in two:
        for step, wanted in zip(rank["noisy on 2"], rank["noisy on 1"], strict=True):
            assert step == pytest.approx(wanted, rel=1e-5)
    assert_same_training(folder / "noisy on 2", folder / "noisy on 1")


def test_bf16_is_close_and_saved_in_fp32(two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    assert_equals_one_process(BF16, [rank["bf16"] for rank in two], train_on_one_process(BF16, 2, tmp_path), 1e-2)
    assert two[0]["bf16"] != two[0]["kv_experts"]
    assert {tensor.dtype for name, tensor in state(folder / "bf16").items() if name != "step"} == {torch.float32}


@pytest.mark.parametrize("name", FOUR_BF16)
def test_bf16_is_close_on_four(name: str, four: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    case = FOUR_BF16[name]
    assert_equals_one_process(case, [rank[name] for rank in four], train_on_one_process(case, 4, tmp_path), 1e-2)
    assert {tensor.dtype for key, tensor in state(folder / name).items() if key != "step"} == {torch.float32}


def test_resuming_at_the_same_size_is_exact(two: list[dict[str, Any]], folder: Path) -> None:
    for rank in two:
        assert rank["resumed"]["resumed"] == rank["resumed"]["unbroken"]
    torch.testing.assert_close(state(folder / "whole, resumed"), state(folder / "whole"), rtol=0, atol=0)


def test_resuming_is_exact_with_frozen_experts(two: list[dict[str, Any]], folder: Path) -> None:
    for rank in two:
        assert rank["resumed, partly frozen"]["resumed"] == rank["resumed, partly frozen"]["unbroken"]
    before, after = state(folder / "half, frozen"), state(folder / "whole, frozen")
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == ("experts." in name), name
        assert not ("experts." in name and "exp_avg" in name), name


@pytest.mark.parametrize("size", [1, 4])
def test_resuming_on_another_number_of_ranks(
    size: int, two: list[dict[str, Any]], four: list[dict[str, Any]], folder: Path
) -> None:
    again = state(folder / f"half again on {size}")
    torch.testing.assert_close(again, state(folder / "half"), rtol=0, atol=0)
    for step, wanted in zip(four[0][f"resumed on {size}"], two[0]["resumed"]["unbroken"], strict=True):
        # The balance loss is that of a micro-batch over all ranks: twice the ranks with half the sequences each.
        assert step == pytest.approx(wanted, rel=1e-5)
    assert_same_training(folder / f"resumed on {size}", folder / "whole")


@pytest.mark.parametrize("name", OTHER_STAGES)
def test_resuming_at_other_zero_stages(
    name: str, two: list[dict[str, Any]], four: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    wanted = two[0][f"{name} resumed"]
    assert wanted["resumed"] == wanted["unbroken"]
    saved = folder / f"{name} resumed"
    torch.testing.assert_close(state(saved / "whole, resumed"), state(saved / "whole"), rtol=0, atol=0)
    half = state(saved / "half")
    torch.testing.assert_close(state(saved / "half again"), half, rtol=0, atol=0)
    torch.testing.assert_close(state(saved / "half at another stage"), half, rtol=0, atol=0)
    for resumed in ("resumed", "at another stage"):
        for step, unbroken in zip(four[0][f"{name} {resumed}"], wanted["unbroken"], strict=True):
            assert step == pytest.approx(unbroken, rel=1e-5)
    engine = TorchEngine(OTHER_STAGES[name].spec(2 * SHARE))
    engine.load(saved / "half")
    engine.state().write(tmp_path)
    torch.testing.assert_close(state(tmp_path), half, rtol=0, atol=0)


@pytest.mark.parametrize("saved", ["half", *(f"{name} resumed/half" for name in OTHER_STAGES)])
def test_every_rank_saves_an_equal_part(saved: str, two: list[dict[str, Any]], folder: Path) -> None:
    """The file of a part has its elements and a header; headers are a considerable part of these small models."""
    for kind in ("model", "optimizer"):
        parts = sorted((folder / saved).glob(f"{kind}.*"))
        assert [path.name for path in parts] == [f"{kind}.part-000{rank}-of-0002.safetensors" for rank in (1, 2)]
        elements = [sum(tensor.numel() for tensor in load_file(path).values()) for path in parts]
        assert max(elements) < 1.01 * min(elements)


@pytest.mark.parametrize("name", OTHER_STAGES)
def test_non_finite_steps_change_nothing_at_other_zero_stages(
    name: str, two: list[dict[str, Any]], folder: Path
) -> None:
    first, second = (rank[f"{name} spoiled"] for rank in two)
    assert first == second
    assert "the loss (nan) is not finite" in first[0]
    assert "the gradient (inf)" in first[1]
    assert re.fullmatch(r"the gradient's norm \(.*\) is above 0.001", first[2])
    for when in ("before", "after"):
        saved = folder / f"{name} spoiled"
        torch.testing.assert_close(state(saved / when), state(saved / f"{when}, undisturbed"), rtol=0, atol=0)


def test_resuming_on_one_process(two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    engine = TorchEngine(RESUMED.spec(2 * SHARE))
    engine.load(folder / "half")
    for step, wanted in enumerate(two[0]["resumed"]["unbroken"], start=STEPS):
        result = engine.step(shares(2, step).view(-1, LENGTH), LR)
        assert step_losses(result) == pytest.approx(wanted, rel=1e-5)
        assert result.exchange_seconds is None
    engine.state().write(tmp_path)
    assert_same_training(tmp_path, folder / "whole")
    held_out = engine.evaluate(shares(2, 99).view(-1, LENGTH))
    for rank in two:
        assert rank["resumed"]["held out"] == pytest.approx(held_out, rel=1e-5)
        assert rank["resumed"]["mean"] == 0.5
        assert rank["resumed"]["exchange"] > 0


def test_all_ranks_raise_the_same_error_and_change_nothing(
    two: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    first, second = (rank["refused"] for rank in two)
    assert first == second
    assert f"({SHARE}, {LENGTH}), ({SHARE - 1}, {LENGTH})" in first["uneven"]
    assert "the loss (nan) is not finite" in first["loss"]
    assert "the gradient (inf)" in first["gradient"]
    assert re.fullmatch(r"the gradient's norm \(.*\) is above 0.001", first["spike"])
    assert re.fullmatch(r"the loss \(.*\) is above 0.001", first["high loss"])
    assert "does not divide the 4 experts and the 2 processes: use one of [1, 2]" in first["group"]
    assert "use zero_stage 1 or 2, or expert_parallel 1" in first["stage"]
    assert first["any"] == "[True, False]"
    before = state(folder / "before")
    for case in ("after a loss", "after a gradient", "after a spike", "after a high loss"):
        torch.testing.assert_close(state(folder / case), before, rtol=0, atol=0)
    engine = TorchEngine(RESUMED.spec(2 * SHARE))
    engine.step(shares(2, 0).view(-1, LENGTH), LR)
    engine.state().write(tmp_path)
    assert_same_training(folder / "after all", tmp_path)


def test_nan_loss_on_one_rank_rolls_back_all_ranks(two: list[dict[str, Any]]) -> None:
    for rank in two:
        unbroken, spoiled = rank["spoiled"]
        assert len(unbroken) == 6
        assert spoiled == unbroken


def test_all_ranks_halve_their_micro_batches_together(two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    case = Case(1, dense=COHERE)
    found = [rank["short of memory"] for rank in two]
    assert [rank["micro batches"] for rank in found] == [[2, 1, 1]] * 2
    assert_equals_one_process(case, [rank["results"] for rank in found], train_on_one_process(case, 2, tmp_path), 1e-5)
    assert_same_training(folder / "short of memory", tmp_path)
    assert all("out of memory with a micro batch of one sequence" in rank["refused"] for rank in found)


def test_mixture_out_of_memory_keeps_its_micro_batch_and_fails(two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = rank["mixture short of memory"]
        assert found["refused"].startswith(
            "out of memory with 4 sequences at once on each of 2 processes: set recompute: true, use more processes"
        )
        assert 0 < found["waited"] < found["step"], "waiting during an evaluation does not count for the next step"


def test_ranks_can_have_different_numbers_of_tokens(two: list[dict[str, Any]]) -> None:
    whole = [torch.cat(parts) for parts in zip(*(routed_tokens(rank) for rank in range(2)), strict=True)]
    wanted = ffn_gradients(Case(1).model(), *whole)
    for name, tensor in wanted.items():  # the tokens and the experts of rank 0, followed by those of rank 1
        torch.testing.assert_close(torch.cat([rank["dispatched"][name] for rank in two]), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [2, 4])
def test_divided_tables_have_the_logits_and_gradients_of_whole_ones(
    size: int, name: str, two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    ranks = [rank["heads"][name] for rank in {2: two, 4: four}[size]]
    model = Case(1, config=HEADS[name]).model()
    wanted = head_gradients(model, shares(size, 0).flatten(0, 1))
    assert len(ranks) == size and {*ranks[0]} == {*wanted}
    for key, tensor in wanted.items():
        parts = [rank[key] for rank in ranks]
        found = torch.cat(parts) if key == "logits" or "experts." in key else torch.stack(parts).sum(0)
        atol = 1e-5 * tensor.abs().max().item()
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=atol, msg=key)
    tables = [rank["loss.model.embed_tokens.experts.weight"] for rank in ranks]
    assert {len(each) for each in tables} == {4 // size}
