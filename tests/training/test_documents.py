"""Documents that lie in one sequence are to every model as if each were alone."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.training.document_mask import keep_apart, positions
from tests.support import tiny

END = 1
DOCUMENTS = [[5, 6, 7, END], [END], [8, 9, END], [10, 11, 12, 13, 14, 15]]
PACKED = [token for document in DOCUMENTS for token in document]
MIXTURES: dict[str, dict[str, Any]] = {
    "kv_experts": {},
    "kv_shared": {"attention_experts": "kv_shared"},
    "averaged": {"attention_experts": "averaged"},
    "sliding": {**tiny.SLIDING, "nope_layers": [1]},
}


def model(name: str) -> PreTrainedModel:
    if name in tiny.CONFIGS:
        return tiny.dense(name, 0)
    torch.manual_seed(0)
    return BamForCausalLM(BamConfig(**{**tiny.SIZES, **MIXTURES[name]})).eval()


def test_positions_begin_anew_after_an_end_of_text() -> None:
    ids = torch.tensor([PACKED, [END, END, *range(2, 14)]])
    assert positions(ids, END).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 0, *range(12)]]


@pytest.mark.parametrize("name", [*tiny.CONFIGS, *MIXTURES])
@torch.no_grad()
def test_each_document_is_read_as_if_alone(name: str) -> None:
    reader = model(name)
    alone = torch.cat([reader(input_ids=torch.tensor([each]), use_cache=False).logits[0] for each in DOCUMENTS])
    ids = torch.tensor([PACKED, list(range(20, 34))])
    together = reader(input_ids=ids, use_cache=False).logits
    keep_apart(reader, END)
    apart = reader(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(apart[0], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apart[1], together[1], atol=1e-5, rtol=1e-5)  # holds one document
    assert not torch.allclose(apart[0], together[0], atol=1e-3)
