"""`bam_ray.train_branch` trains a branch in this process, on the device that the recipe requests."""

from pathlib import Path

import pytest
import torch

import bam_ray
from bam_ray.errors import TrainingError
from tests.support.stage_run import TRAINING, small_recipe


@pytest.fixture(autouse=True)
def machine_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_fallback_without_gpus_applies_on_this_machine(tmp_path: Path) -> None:
    needs = {"gpus": 1, "fallback": [{"gpus": 0.5}, {"cpus": 1}]}
    recipe = small_recipe(tmp_path, branch={"domains": ["code"], "training": TRAINING, "needs": needs})
    folder = bam_ray.train_branch(recipe, "code")
    assert (folder / "model.safetensors").exists()


def test_a_gpu_that_this_machine_does_not_have_is_reported(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, branch={"domains": ["code"], "training": TRAINING, "needs": {"gpus": 1}})
    with pytest.raises(TrainingError, match="the task requests a GPU, but torch"):
        bam_ray.train_branch(recipe, "code")
