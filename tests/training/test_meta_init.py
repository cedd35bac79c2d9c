"""A model that starts on the meta device is bitwise the result of `from_pretrained`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.training.meta_init import materialize, model_on_meta
from bam_ray.training.state import load_weights
from tests.support import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
}
GATES = {"noisy_gate": True, "selection_bias": True, "capacity_factor": 0.75, "router_aux_loss_coef": 0.05}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "kv_experts": {},
    "kv_shared": {"attention_experts": "kv_shared", "qk_norm": "per_head"},
    "averaged": {"attention_experts": "averaged", "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "biases everywhere, a dense layer": {
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "shared_expert_intermediate_size": 16,
        "dense_layers": [0],
        "pad_token_id": 0,
    },
    "sliding, scaled as llama3": {"sliding_window": 5, "rope_parameters": LLAMA3, "max_position_embeddings": 512},
    "scaled by yarn": {"rope_parameters": YARN, "max_position_embeddings": 256, "parallel_block": False},
    "scaled linearly": {"rope_parameters": LINEAR, "norm_type": "rmsnorm"},
    "partly rotated": {"rope_parameters": PARTIAL, "qk_norm": "full"},
    "gates that are kept": GATES,
}


def saved(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save a mixture, whose buffers are random too."""
    torch.manual_seed(0)
    model = BamForCausalLM(BamConfig(**{**SIZES, **config}))
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.normal_()
    model.generation_config = GenerationConfig(max_new_tokens=7)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, GATES], ids=["as it is", "with other gates"])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_result_of_from_pretrained(
    case: str, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    assert_equals_from_pretrained(saved(tmp_path / "saved", dtype, **CASES[case]), **changes)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_dense_models_equal_the_result_of_from_pretrained(family: str, tmp_path: Path) -> None:
    tiny.dense(family, 0).bfloat16().save_pretrained(tmp_path / "saved")
    assert_equals_from_pretrained(tmp_path / "saved")


def assert_equals_from_pretrained(folder: Path, **changes: Any) -> None:
    """Assert that the model of `folder` is the same whether or not it starts on the meta device."""
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)
    model = model_on_meta(folder, **changes)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}

    materialize(model)
    load_weights(folder, model)

    for kind in ("named_parameters", "named_buffers"):
        found, expected = (dict(getattr(each, kind)()) for each in (model, wanted))
        assert list(found) == list(expected)  # tied parameters appear once
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype == torch.float32
            assert torch.equal(found[name], tensor), name
    assert model.training == wanted.training
    for name, each in (("found", model), ("wanted", wanted)):
        each.save_pretrained(folder.with_name(name))
    for path in folder.with_name("wanted").iterdir():
        assert (folder.with_name("found") / path.name).read_bytes() == path.read_bytes(), path.name
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids).logits, wanted(ids).logits)


def test_parameters_keep_their_attributes(tmp_path: Path) -> None:
    model: Any = model_on_meta(saved(tmp_path))
    model.model.norm.weight.requires_grad_(False)
    model.model.norm.weight.group_name = "ep_size_2"
    materialize(model)
    assert not model.model.norm.weight.requires_grad
    assert model.model.norm.weight.group_name == "ep_size_2"
    assert model.lm_head.weight is model.model.embed_tokens.weight
