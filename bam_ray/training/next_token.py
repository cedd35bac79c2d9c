"""The next-token NLL of a causal LM, computed without the logits of the whole micro batch.

With a large vocabulary the logits of a micro batch and their gradient would be the largest tensors of training. Here
they exist only for one chunk of tokens at a time. The gradients of a chunk are computed together with its NLL, so that
its logits are computed once (as in Liger's fused linear cross-entropy, arXiv 2410.10989).

Shapes: T tokens, d hidden, V vocabulary, N embedding experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from bam_ray.families import FAMILIES
from bam_ray.model import BamForCausalLM, RouterOutput
from bam_ray.model.embeddings_bam import BamHead, weighted_states

MIN_CHUNK_TOKENS = 256  # smaller chunks are slower


def has_plain_head(model: PreTrainedModel) -> bool:
    """Return True if the logits are one matrix times the last hidden states, and times `logit_scale` if there is one.

    This holds for mixtures and for all families that they are made of. It is not known for other models.
    """
    return isinstance(model, BamForCausalLM) or model.config.model_type in FAMILIES


class NextTokenLoss(nn.Module):
    """The function that is minimized: it maps token ids to the NLL of `model`.

    Its only parameters are those that the model has at construction. For a model without a plain head
    (`has_plain_head`) all logits are computed at once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head = ChunkedHead(model) if has_plain_head(model) else None

    def forward(self, input_ids: Tensor) -> tuple[Tensor, tuple[RouterOutput, ...]]:
        """Compute the NLL of `input_ids` [B, L].

        Returns the mean NLL of the last L - 1 tokens of each row, and for mixtures the `RouterOutput` of each layer.
        """
        targets = input_ids[:, 1:].flatten()
        if self.head is None:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets), ()
        out = self.model.base_model(input_ids=input_ids, use_cache=False)
        nll = self.head(head_states(out)[:, :-1].flatten(0, 1), targets)
        return nll, getattr(out, "router_outputs", ())

    def token_nll(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Return the NLL of each predicted token of `input_ids` [B, L], and the output of the model without its head.

        The NLLs are fp32 [B, L - 1]. For a model without a plain head, the output is that of the whole model.
        """
        if self.head is None:
            out = self.model(input_ids=input_ids, use_cache=False)
            nll = [F.cross_entropy(row.float(), ids[1:], reduction="none") for row, ids in _rows(out.logits, input_ids)]
        else:
            out = self.model.base_model(input_ids=input_ids, use_cache=False)
            nll = [self.head.token_nll(row, ids[1:]) for row, ids in _rows(head_states(out), input_ids)]
        return torch.stack(nll), out


class ChunkedHead(nn.Module):
    """The head of a model together with the loss.

    It holds the head's weight itself, because ZeRO-3 gathers the parameters of a module when that module is called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        self.weight = head.experts.weight if isinstance(head, BamHead) else head.weight  # [V, d] or [N, V, d]
        self.scale = getattr(model.config, "logit_scale", 1.0)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean NLL of `targets` [T] for the hidden states [T, d], or [T, N·d] with embedding experts."""
        weight = self.weight
        if not torch.is_grad_enabled():  # an autograd function cannot see this itself
            hidden, weight = hidden.detach(), weight.detach()
        nll: Tensor = SummedNLL.apply(hidden * self.scale, weight, targets)  # type: ignore[no-untyped-call]
        return nll / len(targets)

    @torch.no_grad()
    def token_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the NLL of each of the `targets` [T] in fp32, without gradients. `hidden` is that of `forward`."""
        size, device = chunk_tokens(hidden), hidden.device.type
        dtype = product_dtype(self.weight)
        with torch.autocast(device, enabled=False):
            tables = tables_of(self.weight.to(dtype))
            chunks = zip(hidden.split(size), targets.split(size), strict=True)
            return torch.cat(
                [
                    F.cross_entropy(summed_logits(x.to(dtype), tables) * self.scale, ids, reduction="none")
                    for x, ids in chunks
                ]
            )


def head_states(out: Any) -> Tensor:
    """Return the hidden states that the head's tables multiply, from the output of a model without its head.

    They are [B, L, d], or [B, L, N·d] with embedding experts: the last hidden states, weighted for each expert.
    """
    gates = getattr(out, "head_gates", None)
    states: Tensor = out.last_hidden_state
    return states if gates is None else weighted_states(states, gates)


class SummedNLL(torch.autograd.Function):
    """The sum Σ -log softmax(hidden · weightᵀ)[target] in fp32, for hidden [T, d], weight [V, d] and targets [T].

    With N tables, hidden is [T, N·d] and weight [N, V, d], and the logits are the sum of the N products. Matrix
    products use the precision of autocast if it is enabled. The softmax and the sums over tables and chunks are fp32.
    The logits of a chunk are about as large as the weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Compute the sum, and the gradients for a loss gradient of 1."""
        device, dtype = hidden.device.type, product_dtype(weight)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float) if of_weight else None
        total = hidden.new_zeros((), dtype=torch.float)
        size = chunk_tokens(hidden)
        with torch.autocast(device, enabled=False):
            tables = tables_of(weight.to(dtype))
            width = weight.shape[-1]
            for start in range(0, len(hidden), size):
                x, target = hidden[start : start + size].to(dtype), targets[start : start + size, None]
                log_p = summed_logits(x, tables).log_softmax(-1)
                total -= log_p.gather(1, target).sum()
                if not (of_hidden or of_weight):
                    continue
                grad = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0)).to(dtype)
                if grad_hidden is not None:
                    parts = grad_hidden[start : start + size].split(width, -1)
                    for part, table in zip(parts, tables, strict=True):
                        part.copy_(grad @ table)
                if grad_weight is not None:
                    for into, part in zip(tables_of(grad_weight), x.split(width, -1), strict=True):
                        _add_product(into, grad.t(), part)
                del log_p, grad  # frees them before the next chunk allocates its own
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale the gradients that `forward` computed."""
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:  # in place, because it is as large as the weight
            grad_weight = grad_weight.mul_(grad).to(ctx.dtype)
        return grad_hidden, grad_weight, None


def chunk_tokens(hidden: Tensor) -> int:
    """Return the number of the tokens of `hidden` [T, d] whose logits are computed at once."""
    return max(MIN_CHUNK_TOKENS, hidden.shape[1])


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the products with `weight`: that of autocast if it is enabled."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def tables_of(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the tables [V, d] of the weight of a head, which is [V, d] or [N, V, d]."""
    return weight.unbind(0) if weight.ndim == 3 else (weight,)


def summed_logits(x: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Return the sum over N tables [V, d] of their products with x [T, N·d]: [T, V] in fp32."""
    parts = x.split(tables[0].shape[1], -1)
    logits: Tensor = (parts[0] @ tables[0].t()).float()
    # One product over all tables would need a copy of them as [V, N·d]
    for part, table in zip(parts[1:], tables[1:], strict=True):
        _add_product(logits, part, table.t())
    return logits


def _rows(out: Tensor, input_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the sequences of a batch: the outputs [L - 1, ...] that predict a token, and the token ids [L]."""
    return zip(out[:, :-1], input_ids, strict=True)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product a [m, k] · b [k, n] to `into` [m, n], which is fp32."""
    if a.dtype is into.dtype:
        into.addmm_(a, b)
    else:
        into += a @ b
