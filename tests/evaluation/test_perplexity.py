import math

import numpy as np
import pytest
import torch

from bam_ray.errors import CheckpointError, DataError
from bam_ray.evaluation.perplexity import perplexity, score
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.parameters import count_parameters
from tests.support.tiny import dense, tokens

ROWS = tokens(batch=7, length=12).numpy().astype(np.uint16)


def test_perplexity_is_exp_of_the_mean_nll_of_the_last_tokens() -> None:
    model = dense("cohere", seed=1)
    with torch.no_grad():
        log_probabilities = model(torch.from_numpy(ROWS.astype(np.int64))).logits.double().log_softmax(-1)
    picked = [
        [-log_probabilities[row, position, int(ROWS[row, position + 1])].item() for position in range(11)]
        for row in range(7)
    ]
    result = perplexity(model, ROWS, batch_sequences=3)
    assert result.perplexity == pytest.approx(math.exp(np.mean(picked)), rel=1e-5)
    assert result.sequence_nll == pytest.approx(np.mean(picked, axis=1), rel=1e-5)
    assert result.tokens == 7 * 11
    low, high = result.interval
    assert low < result.perplexity < high


@pytest.mark.parametrize("family", ["cohere", "llama"])
def test_the_batch_size_does_not_matter(family: str) -> None:
    model = dense(family, seed=2)
    one, all_at_once = perplexity(model, ROWS, 1), perplexity(model, ROWS, 7)
    assert one.sequence_nll == pytest.approx(all_at_once.sequence_nll, rel=1e-5)


def test_the_auxiliary_losses_are_no_part_of_it() -> None:
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
    assert model.training, "the model is given back as it was"


def test_nothing_to_predict_and_broken_weights_are_said() -> None:
    model = dense("cohere", seed=1)
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(model, ROWS[:, :1], 4)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        perplexity(model, ROWS, 4)


def test_it_can_be_ended_between_batches() -> None:
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
def test_parameters_of_the_papers_mixtures(settings: dict[str, str], total: float, active: float) -> None:
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
    assert counted == pytest.approx([total, active], abs=0.06)  # the paper's active parameters leave routers out
