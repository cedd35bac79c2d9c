"""The loss in chunks of tokens equals the loss of all logits at once, and so does every gradient."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from bam_ray.families import FAMILIES
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.planning.model_size import CHUNK_TOKENS
from bam_ray.training import next_token
from bam_ray.training.next_token import MIN_CHUNK_TOKENS, NextTokenLoss, has_plain_head
from tests.support import tiny

Loss = Callable[[Tensor], Tensor]
MIXTURES = {
    "bam": BamConfig(**tiny.SIZES, num_experts_per_tok=2, logit_scale=0.5),
    "bam, tied": BamConfig(**tiny.SIZES, tie_word_embeddings=True),
    "btx": BamConfig(**tiny.SIZES, attention_experts="averaged", tie_word_embeddings=False),
    "embedding experts": BamConfig(**tiny.SIZES, embeddings="experts", router_input="prefix", logit_scale=0.5),
    "embedding experts, untied": BamConfig(**tiny.SIZES, embeddings="experts", tie_word_embeddings=False),
}
IDS = tiny.tokens(3, 17)  # 48 predictions


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "MIN_CHUNK_TOKENS", 1)  # chunks of the hidden size: 32 tokens, then 16


def model_of(name: str) -> PreTrainedModel:
    if name in MIXTURES:
        torch.manual_seed(0)
        return BamForCausalLM(MIXTURES[name])
    return tiny.dense(name, 0).train()


def whole_logits(model: PreTrainedModel) -> Loss:
    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    return loss


def in_chunks(model: PreTrainedModel) -> Loss:
    return lambda ids: NextTokenLoss(model)(ids)[0]


def gradients(model: PreTrainedModel, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and the gradients of 0.3 times the loss."""
    model.zero_grad()
    value = loss(IDS)
    (value * 0.3).backward()
    named = model.named_parameters()
    return value.detach(), {name: each.grad.clone() for name, each in named if each.grad is not None}


def test_the_cases_cover_every_family() -> None:
    assert tiny.CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES])
def test_chunks_have_the_loss_and_gradients_of_all_logits(name: str) -> None:
    model = model_of(name)
    assert has_plain_head(model)
    expected, wanted = gradients(model, whole_logits(model))
    loss, found = gradients(model, in_chunks(model))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys()
    for each in wanted:
        torch.testing.assert_close(found[each], wanted[each], rtol=1e-5, atol=1e-5, msg=each)


@pytest.mark.parametrize("name", ["cohere", "gpt_neox", "bam", "embedding experts"])
def test_bf16_chunks_are_as_close_to_fp32_as_all_logits(name: str) -> None:
    model = model_of(name)
    exact_loss, exact = gradients(model, whole_logits(model))
    with torch.autocast("cpu", torch.bfloat16):
        whole_loss, whole = gradients(model, whole_logits(model))
        loss, chunks = gradients(model, in_chunks(model))

    def error(found: dict[str, Tensor]) -> float:
        return sum((found[each] - exact[each]).square().sum().item() for each in exact) ** 0.5

    assert error(chunks) <= 1.1 * error(whole)
    assert abs(loss - exact_loss) <= abs(whole_loss - exact_loss) + 1e-3
    assert all(each.dtype == torch.float for each in chunks.values())


@pytest.mark.parametrize("frozen", ["lm_head", "model."])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    model = model_of("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    _, wanted = gradients(model, whole_logits(model))
    _, found = gradients(model, in_chunks(model))
    assert found.keys() == wanted.keys() != set()
    for each in wanted:
        torch.testing.assert_close(found[each], wanted[each], rtol=1e-5, atol=1e-5, msg=each)


class LargestTensor(TorchDispatchMode):
    """A recorder of the size of the largest tensor that is created, without views."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, each.numel())
        return out


@pytest.mark.parametrize("graded", [True, False])
def test_no_tensor_is_larger_than_the_logits_of_one_chunk(graded: bool) -> None:
    tokens, hidden, vocabulary = 100, 8, 999
    model = BamForCausalLM(BamConfig(**{**tiny.SIZES, "hidden_size": hidden, "vocab_size": vocabulary}))
    head = NextTokenLoss(model).head
    x = torch.randn(tokens, hidden, requires_grad=True)
    with torch.set_grad_enabled(graded), LargestTensor() as seen:
        loss = head(x, torch.randint(0, vocabulary, (tokens,)))
        if graded:
            loss.backward()
    assert seen.numbers == hidden * vocabulary


@pytest.mark.parametrize("graded", [True, False])
def test_the_tables_of_all_experts_are_not_copied(graded: bool) -> None:
    tokens, hidden, vocabulary, experts = 5, 8, 999, 4
    sizes = {**tiny.SIZES, "hidden_size": hidden, "vocab_size": vocabulary, "num_experts": experts}
    model = BamForCausalLM(BamConfig(**sizes, embeddings="experts"))
    head = NextTokenLoss(model).head
    assert head is not None
    x = torch.randn(tokens, hidden, requires_grad=graded)
    head.weight.requires_grad_(False)
    with LargestTensor() as seen:
        loss = head(x, torch.randint(0, vocabulary, (tokens,)), torch.rand(tokens, experts))
        if graded:
            loss.backward()
        model.lm_head(torch.randn(2, tokens, hidden), torch.rand(2, tokens, experts))
    assert seen.numbers == 2 * tokens * vocabulary, "the logits of both sequences"


def test_an_unknown_head_computes_all_logits_at_once() -> None:
    sizes = {**tiny.SIZES, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    assert not has_plain_head(model)
    assert torch.equal(in_chunks(model)(IDS), whole_logits(model)(IDS))


def test_plans_assume_the_chunk_size_of_training() -> None:
    assert CHUNK_TOKENS == MIN_CHUNK_TOKENS, "plans import no torch, so they have their own constant"
