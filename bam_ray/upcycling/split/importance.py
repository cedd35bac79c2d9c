"""The importance of each neuron of a dense model for each kind of text (LLaMA-MoE's sharing constructions).

    groups = cluster_sequences(model, rows, 8, seed=0)
    importance = neuron_importance(model, [f"model.layers.{i}.mlp.down_proj" for i in range(32)], groups)
    inner_partition(importance[0], 1376)

The models can be any dense causal language models of transformers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bam_ray.upcycling.split.balanced_kmeans import balanced_kmeans, require_divisible

BATCH_TOKENS = 2048
"""Number of tokens that run through the model at the same time."""


@torch.no_grad()
def cluster_sequences(model: PreTrainedModel, rows: Tensor, groups: int, seed: int) -> list[Tensor]:
    """Cluster sequences into `groups` groups of equal size: rows [S, L] -> [S/groups, L] each.

    Balanced k-means is applied to the mean of each sequence's last hidden states. Rows keep their order in a group.

    Raises:
        UpcycleError: `groups` does not divide S.
    """
    require_divisible(len(rows), groups, "sequences", "groups")
    with _evaluating(model):
        means = [
            model.base_model(part, use_cache=False).last_hidden_state.float().mean(1) for part in _batches(rows)
        ]  # [B, d] each
    labels = balanced_kmeans(torch.cat(means).cpu(), groups, seed)
    return [rows[labels == group] for group in range(groups)]


def neuron_importance(model: PreTrainedModel, down_projections: list[str], groups: list[Tensor]) -> Tensor:
    """Return |h · ∂L/∂h| of every FFN neuron as the mean over the tokens of a group: [layers, groups, f], double.

    h is the input of a layer's down projection. L is the sum of a sequence's next-token losses in nats, so the result
    does not depend on the batch size. Parameters get no gradients. The activations of `BATCH_TOKENS` tokens, or of one
    sequence if it is longer, are in memory.

    Args:
        model: The dense model.
        down_projections: The module names of the down projections in the order of the layers.
        groups: Rows of tokens, [S, L] each.
    """
    with _evaluating(model):
        means = []  # [layers, f] each
        for rows in groups:
            parts = (_importance_sums(model, down_projections, part) for part in _batches(rows))
            means.append(sum(parts, start=torch.zeros((), dtype=torch.double)) / rows.numel())
    return torch.stack(means, dim=1)


@torch.enable_grad()
def _importance_sums(model: PreTrainedModel, down_projections: list[str], rows: Tensor) -> Tensor:
    """Return the sum over all tokens of rows [B, L]: [layers, f], double."""
    sums: dict[str, Tensor] = {}

    def register(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        hidden = args[0].detach()

        def add(gradient: Tensor) -> None:  # sum at once: the gradients of all layers together are large
            sums[name] = (hidden.float() * gradient.float()).abs().flatten(0, -2).sum(0, dtype=torch.double).cpu()

        args[0].register_hook(add)

    with ExitStack() as hooks:
        for name in down_projections:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(register, name)))
        embedded = model.get_input_embeddings()(
            rows
        ).requires_grad_()  # parameters are frozen, so this needs the gradient
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    targets = rows[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
    torch.autograd.grad(loss, embedded)
    return torch.stack([sums[name] for name in down_projections])


def _batches(rows: Tensor) -> tuple[Tensor, ...]:
    """Return views of rows [S, L] with about `BATCH_TOKENS` tokens each."""
    parts: tuple[Tensor, ...] = rows.split(max(1, BATCH_TOKENS // rows.shape[1]))
    return parts


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Disable dropout and gradients of parameters inside the block, and restore the model afterwards."""
    training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)
