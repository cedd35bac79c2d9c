"""The next-token NLL of a causal LM, its logits never whole.

With a large vocabulary the logits of a micro batch, and their gradient, would be the largest tensors of training. Here
they exist for a chunk of tokens at a time, and a chunk's gradients are made with its NLL, so that its logits are
computed once (as in Liger's fused linear cross-entropy, arXiv 2410.10989).

Shapes: T tokens, d hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from bam_ray.families import FAMILIES
from bam_ray.model import RouterOutput
from bam_ray.training.objective import as_mixture

FEWEST = 256  # tokens of a chunk: fewer are slower


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are one matrix times the last hidden states, and `logit_scale` where there is one.

    So it is for mixtures and all families that they are made of; of others we don't know.
    """
    return as_mixture(model) is not None or model.config.model_type in FAMILIES


class NextTokenLoss(nn.Module):
    """`model` as the function that is minimised: token ids to their NLL. It has no parameters but the model's, as
    they are when it is made.

    Models without a plain head (`has_plain_head`) are computed with whole logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head = ChunkedHead(model) if has_plain_head(model) else None

    def forward(self, input_ids: Tensor) -> tuple[Tensor, tuple[RouterOutput, ...]]:
        """[B, L] -> mean NLL of the last L - 1 tokens of each row; of mixtures the `RouterOutput` of each layer."""
        targets = input_ids[:, 1:].flatten()
        if self.head is None:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets), ()
        out = self.model.base_model(input_ids=input_ids, use_cache=False)
        nll = self.head(out.last_hidden_state[:, :-1].flatten(0, 1), targets)
        return nll, getattr(out, "router_outputs", ())


class ChunkedHead(nn.Module):
    """The head of a model and the loss in one. It holds the head's weight itself: ZeRO-3 gathers what a module holds
    when that module is called."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.weight = model.get_output_embeddings().weight
        self.scale = getattr(model.config, "logit_scale", 1.0)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[T, d], [T] -> mean NLL."""
        weight = self.weight
        if not torch.is_grad_enabled():  # autograd functions are not told
            hidden, weight = hidden.detach(), weight.detach()
        nll: Tensor = SummedNLL.apply(hidden * self.scale, weight, targets)  # type: ignore[no-untyped-call]
        return nll / len(targets)


class SummedNLL(torch.autograd.Function):
    """hidden [T, d], weight [V, d], targets [T] -> Σ -log softmax(hidden · weightᵀ)[target], in fp32.

    Matrix products are of autocast's precision where it is on, the softmax and sums over chunks fp32. A chunk's logits
    are about as large as the weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float) if of_weight else None
        total = hidden.new_zeros((), dtype=torch.float)
        size = max(FEWEST, hidden.shape[1])
        with torch.autocast(device, enabled=False):
            cast = weight.to(dtype)
            for start in range(0, len(hidden), size):
                x, target = hidden[start : start + size].to(dtype), targets[start : start + size, None]
                log_p = (x @ cast.t()).float().log_softmax(-1)
                total -= log_p.gather(1, target).sum()
                if not (of_hidden or of_weight):
                    continue
                grad = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0)).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + size] = grad @ cast
                if grad_weight is not None:
                    _add_product(grad_weight, grad.t(), x)
                del log_p, grad  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:  # in place: it is as large as the weight
            grad_weight = grad_weight.mul_(grad).to(ctx.dtype)
        return grad_hidden, grad_weight, None


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into [m, n] fp32 += a [m, k] · b [k, n]."""
    if a.dtype is into.dtype:
        into.addmm_(a, b)
    else:
        into += a @ b
