"""Loading of model folders whose weights are not those of the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bam_ray.errors import CheckpointError
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.loading import load_folder
from tests.support.tiny import SIZES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BamForCausalLM(BamConfig(**SIZES, num_experts=3)).save_pretrained(tmp_path)
    return tmp_path


def change_names(folder: Path, old: str, new: str) -> None:
    """Replace a part of the names of all tensors."""
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_whole_folders_are_loaded(folder: Path) -> None:
    model, again = (load_folder(folder, torch.float32) for _ in range(2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_folders_with_other_names_are_refused(folder: Path) -> None:
    change_names(folder, "self_attn.attention_experts.", "self_attn.experts.")
    with pytest.raises(
        CheckpointError, match=r"lacks model\.layers\.0\.self_attn\.attention_experts\.k_proj \(8 weights"
    ):
        load_folder(folder, torch.float32)
