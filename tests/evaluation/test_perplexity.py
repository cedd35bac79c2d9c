import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bam_ray.errors import CheckpointError, DataError, TrainingError
from bam_ray.evaluation.perplexity import perplexity, score
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.parameters import count_parameters
from tests.support.tiny import SIZES, dense, tokens

ROWS = tokens(batch=7, length=12).numpy().astype(np.uint16)


def test_perplexity_is_the_exponential_of_the_mean_nll() -> None:
    model = dense("cohere", seed=1)
    with torch.no_grad():
        log_probabilities = model(torch.from_numpy(ROWS.astype(np.int64))).logits.double().log_softmax(-1)
    picked = [
        [-log_probabilities[row, position, int(ROWS[row, position + 1])].item() for position in range(11)]
        for row in range(7)
    ]
    result, _, token_nll = score(model, ROWS, batch_sequences=3)
    assert token_nll.dtype == np.float32
    assert token_nll == pytest.approx(np.array(picked), rel=1e-4)
    assert result.sequence_nll == pytest.approx(token_nll.mean(axis=1, dtype=np.float64).tolist(), rel=1e-14)
    assert result.perplexity == pytest.approx(math.exp(np.mean(picked)), rel=1e-5)
    assert result.sequence_nll == pytest.approx(np.mean(picked, axis=1), rel=1e-5)
    assert result.tokens == 7 * 11
    low, high = result.interval
    assert low < result.perplexity < high


@pytest.mark.parametrize("family", ["cohere", "llama"])
def test_the_batch_size_has_no_effect(family: str) -> None:
    model = dense(family, seed=2)
    one, all_at_once = perplexity(model, ROWS, 1), perplexity(model, ROWS, 7)
    assert one.sequence_nll == pytest.approx(all_at_once.sequence_nll, rel=1e-5)


@pytest.mark.parametrize("family", ["cohere", "llama"])
def test_the_chunks_give_the_nll_of_whole_logits(family: str) -> None:
    model = dense(family, seed=2)
    rows = tokens(batch=3, length=600).numpy()  # three chunks
    with torch.no_grad():
        logits = model(torch.from_numpy(rows)).logits.float()
    whole = [F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, torch.from_numpy(rows), strict=True)]
    assert perplexity(model, rows, 3).sequence_nll == pytest.approx([nll.item() for nll in whole], rel=1e-6)


def test_logits_of_a_batch_are_never_whole() -> None:
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor))])
            return out

    vocabulary = 5000
    config = {**SIZES, "vocab_size": vocabulary, "num_hidden_layers": 1}
    with Largest():
        perplexity(BamForCausalLM(BamConfig(**config)), tokens(batch=4, length=600).numpy(), 4)
    assert largest <= 256 * vocabulary, "the logits of one chunk"


def test_a_batch_that_runs_out_of_memory_is_halved() -> None:
    model, sizes, calls = dense("cohere", seed=1), [], []

    def forward(module: object, inputs: object, named: dict[str, Any]) -> None:
        sizes.append(len(named["input_ids"]))
        if sizes[-1] > 2:
            raise torch.AcceleratorError("CUDA error: out of memory")

    model.base_model.register_forward_pre_hook(forward, with_kwargs=True)
    found = score(model, ROWS, 7, lambda: calls.append(1)).score
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert len(calls) == 7
    assert found == perplexity(model, ROWS, 1)
    model.base_model.register_forward_pre_hook(run_out)
    with pytest.raises(TrainingError, match="out of memory with a micro batch of one sequence"):
        score(model, ROWS, 2)


def run_out(module: object, inputs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_routing_counts_a_halved_batch_once() -> None:
    torch.manual_seed(0)
    model = BamForCausalLM(BamConfig(**SIZES))
    wanted = score(model, ROWS, 2).routing
    first = [True]

    def fail_once(module: object, inputs: object) -> None:
        if first[0]:
            first[0] = False
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.norm.register_forward_pre_hook(fail_once)
    found = score(model, ROWS, 4).routing
    assert found == wanted


def test_auxiliary_losses_are_excluded() -> None:
    torch.manual_seed(0)
    config = BamConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, router_aux_loss_coef=9.0
    )
    model = BamForCausalLM(config).train()
    ids = torch.from_numpy(ROWS.astype(np.int64))
    with torch.no_grad():
        out = model(ids, labels=ids)
    result = perplexity(model, ROWS, 7)
    assert result.nll == pytest.approx(out.nll.item(), rel=1e-5)
    assert out.loss.item() > result.nll + 1
    assert model.training, "the training mode is restored"


def test_missing_tokens_and_damaged_weights_are_errors() -> None:
    model = dense("cohere", seed=1)
    with pytest.raises(DataError, match="no token to predict"):
        perplexity(model, ROWS[:, :1], 4)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        perplexity(model, ROWS, 4)


def test_evaluation_can_be_stopped_between_batches() -> None:
    batches = []

    def stop_after_two() -> None:
        batches.append(1)
        if len(batches) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        score(dense("cohere", seed=1), ROWS, 2, stop_after_two)
    assert len(batches) == 2


@pytest.mark.parametrize(
    ("settings", "total", "active"),
    [
        ({"attention_experts": "averaged"}, 700.5, 587.2),
        ({"attention_experts": "kv_shared"}, 738.3, 625.0),
        ({"attention_experts": "kv_experts"}, 776.0, 662.7),
    ],
)
def test_parameter_counts_equal_those_of_the_paper(settings: dict[str, str], total: float, active: float) -> None:
    with torch.device("meta"):
        model = BamForCausalLM(
            BamConfig(
                vocab_size=256_000,
                hidden_size=1024,
                intermediate_size=2048,
                num_hidden_layers=6,
                num_attention_heads=8,
                tie_word_embeddings=False,
                **settings,
            )
        )
    counted = [count / 1e6 for count in count_parameters(model)]
    assert counted == pytest.approx([total, active], abs=0.06)  # the paper does not count routers as active parameters
