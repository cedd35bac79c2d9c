"""The seed with a prior over domains: it begins as the seed, and computes what a loop over tokens computes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.model.bigrams_bam import pair_bucket
from bam_ray.model.domain_vectors import DomainVectorsForCausalLM
from bam_ray.training.document_mask import mask_documents
from bam_ray.training.next_token import NextTokenLoss
from bam_ray.upcycling.domain_priors import seed_with_tables, seed_with_vectors
from tests.support import tiny
from tests.support.mixture_folders import BUCKETS, domain_counts

DOMAINS = ("code", "law", "medicine")
END = 1  # the end-of-text token
VOCAB = tiny.SIZES["vocab_size"]


def seed_with_prior(folder: Path, form: str, seed: PreTrainedModel) -> PreTrainedModel:
    reader = tiny.sources(folder, {"seed": seed})["seed"]
    counts = domain_counts(*DOMAINS)
    return (seed_with_tables(reader, counts) if form == "tables" else seed_with_vectors(folder / "seed", counts)).eval()


def randomize(model: PreTrainedModel) -> None:
    """Give everything that differs between domains random values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("experts.weight") or name in ("input", "output", "bias"):
                parameter.normal_()


def probabilities(document: list[int]) -> Tensor:
    """Return the probability of each domain after each token of a document, [L, N], from the counts of their text."""
    evidence, rows = torch.zeros(len(DOMAINS), dtype=torch.double), []
    for place, token in enumerate(document):
        if place:
            evidence = evidence + torch.tensor([log_p(name, document[place - 1], token) for name in DOMAINS])
        rows.append((0.25 * evidence).softmax(0))
    return torch.stack(rows).float()


def log_p(domain: str, before: int, token: int) -> float:
    counts = domain_counts(domain)[domain]
    share = (float(counts.tokens[token]) + 0.5) / (counts.total + 0.5 * VOCAB)
    after = float(counts.tokens[before])
    bucket = pair_bucket(torch.tensor(before), torch.tensor(token), VOCAB, BUCKETS)
    return math.log((min(float(counts.pairs[bucket]), after) + 20 * share) / (after + 20))


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("form", ["tables", "vectors"])
@torch.no_grad()
def test_the_model_begins_as_the_seed(tmp_path: Path, form: str, family: str) -> None:
    seed = tiny.dense(family, 0)
    model = seed_with_prior(tmp_path, form, seed)
    ids = tiny.tokens(2, 40)
    torch.testing.assert_close(model(input_ids=ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5)
    randomize(model)
    assert not torch.allclose(model(input_ids=ids).logits, seed(ids).logits, atol=0.1)


@pytest.mark.parametrize("form", ["tables", "vectors"])
@pytest.mark.parametrize("family", ["cohere", "llama"])
@torch.no_grad()
def test_the_model_computes_what_a_loop_computes(tmp_path: Path, form: str, family: str) -> None:
    seed = tiny.dense(family, 0)
    model = seed_with_prior(tmp_path, form, seed)
    randomize(model)
    first, second = tiny.tokens(1, 9, seed=2)[0].tolist(), tiny.tokens(1, 7, seed=3)[0].tolist()
    mask_documents(model, END)
    packed = model.base_model(input_ids=torch.tensor([[*first, END, *second]]), use_cache=False)
    logits = packed.logits if form == "vectors" else head_of(model, packed)
    found = logits[0].split([len(first) + 1, len(second)])
    for document, out in zip(([*first, END], second), found, strict=True):
        wanted = reference(model, seed, torch.tensor(document), probabilities(document))
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


def head_of(model: PreTrainedModel, out: Any) -> Tensor:
    logits: Tensor = model.lm_head(out.last_hidden_state, out.head_gates) * model.config.logit_scale
    return logits


def reference(model: PreTrainedModel, seed: PreTrainedModel, ids: Tensor, prior: Tensor) -> Tensor:
    """Return the logits [L, V] of one document, from the layers of the seed and the sums over domains written out."""
    scale = getattr(seed.config, "logit_scale", 1.0)
    embedding, head = seed.get_input_embeddings().weight, seed.get_output_embeddings().weight
    if isinstance(model, DomainVectorsForCausalLM):
        x = [
            embedding[token] + sum(p[i] * model.input[i] for i in range(3)) for token, p in zip(ids, prior, strict=True)
        ]
    else:
        tables = model.model.embed_tokens.experts.weight
        x = [sum(p[i] * tables[i, token] for i in range(3)) for token, p in zip(ids, prior, strict=True)]
    hidden = seed.base_model(inputs_embeds=torch.stack(x)[None], use_cache=False).last_hidden_state[0]
    rows = []
    for h, p in zip(hidden, prior, strict=True):
        if isinstance(model, DomainVectorsForCausalLM):
            shifted = h + sum(p[i] * model.output[i] for i in range(3))
            rows.append(scale * (head @ shifted) + sum(p[i] * model.bias[i] for i in range(3)))
        else:
            rows.append(scale * sum(p[i] * (model.lm_head.experts.weight[i] @ h) for i in range(3)))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["cohere", "llama"])
@torch.no_grad()
def test_vectors_survive_saving(tmp_path: Path, family: str) -> None:
    model = seed_with_prior(tmp_path, "vectors", tiny.dense(family, 0))
    randomize(model)
    model.save_pretrained(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(loaded, DomainVectorsForCausalLM)
    ids = tiny.tokens()
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("form", ["tables", "vectors"])
def test_every_parameter_has_a_gradient(tmp_path: Path, form: str) -> None:
    model = seed_with_prior(tmp_path, form, tiny.dense("cohere", 0)).train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable()
        model.zero_grad()
        NextTokenLoss(model)(tiny.tokens())[0].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain is not None and plain.abs().max() > 0, name
        torch.testing.assert_close(plain, gradients[1][name])
