"""Which neurons of a dense model matter to which kind of text (LLaMA-MoE's sharing constructions).

    groups = cluster_sequences(model, rows, 8, seed=0)
    importance = neuron_importance(model, [f"model.layers.{i}.mlp.down_proj" for i in range(32)], groups)
    inner_partition(importance[0], 1376)

The models are any of transformers' dense causal language models.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bam_ray.upcycling.split.balanced_kmeans import balanced_kmeans, require_divisible

BATCH_TOKENS = 2048  # through the model at a time


@torch.no_grad()
def cluster_sequences(model: PreTrainedModel, rows: Tensor, groups: int, seed: int) -> list[Tensor]:
    """Sequences that the model sees as alike, in `groups` groups of equal size: rows [S, L] -> [S/groups, L] each.

    Balanced k-means over the mean of each sequence's last hidden states. Within a group, rows keep their order.
    Raises `UpcycleError` where `groups` does not divide S.
    """
    require_divisible(len(rows), groups, "sequences", "groups")
    with _evaluating(model):
        means = [
            model.base_model(part, use_cache=False).last_hidden_state.float().mean(1) for part in _batches(rows)
        ]  # [B, d] each
    labels = balanced_kmeans(torch.cat(means).cpu(), groups, seed)
    return [rows[labels == group] for group in range(groups)]


def neuron_importance(model: PreTrainedModel, down_projections: list[str], groups: list[Tensor]) -> Tensor:
    """|h · ∂L/∂h| of every FFN neuron, mean over a group's tokens: [layers, groups, f], double.

    h is the input of a layer's down projection (`down_projections` names them in the order of the layers), L the sum of
    a sequence's next-token losses in nats, so that the result depends on no batch size. `groups`: token rows [S, L]
    each. Parameters get no gradients; the activations of `BATCH_TOKENS` tokens (of one sequence at least) are held.
    """
    with _evaluating(model):
        means = []  # [layers, f] each
        for rows in groups:
            parts = (_importance_sums(model, down_projections, part) for part in _batches(rows))
            means.append(sum(parts, start=torch.zeros((), dtype=torch.double)) / rows.numel())
    return torch.stack(means, dim=1)


@torch.enable_grad()
def _importance_sums(model: PreTrainedModel, down_projections: list[str], rows: Tensor) -> Tensor:
    """The sum over all tokens of rows [B, L]: [layers, f], double."""
    sums: dict[str, Tensor] = {}

    def watch(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        hidden = args[0].detach()

        def add(gradient: Tensor) -> None:  # and let it go: those of all layers together are large
            sums[name] = (hidden.float() * gradient.float()).abs().flatten(0, -2).sum(0, dtype=torch.double).cpu()

        args[0].register_hook(add)

    with ExitStack() as hooks:
        for name in down_projections:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(watch, name)))
        embedded = model.get_input_embeddings()(rows).requires_grad_()  # parameters being frozen, gradients start here
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    targets = rows[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
    torch.autograd.grad(loss, embedded)
    return torch.stack([sums[name] for name in down_projections])


def _batches(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows [S, L] in parts of about `BATCH_TOKENS`."""
    parts: tuple[Tensor, ...] = rows.split(max(1, BATCH_TOKENS // rows.shape[1]))
    return parts


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and without gradients of parameters; the model is left as it was."""
    training = model.training
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)
