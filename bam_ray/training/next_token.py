"""The next-token NLL of a causal LM, computed without the logits of the whole micro batch.

With a large vocabulary the logits of a micro batch and their gradient would be the largest tensors of training. Here
they exist only for one chunk of tokens at a time. The gradients of a chunk are computed together with its NLL, so that
its logits are computed once (as in Liger's fused linear cross-entropy, arXiv 2410.10989).

Shapes: T tokens, d hidden, V vocabulary, N embedding experts. If the tables of the experts are divided among E ranks,
each computes the logits of all ranks' tokens in its slice V' of the vocabulary (`model.table_exchange_bam`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from bam_ray.families import FAMILIES
from bam_ray.model import BamForCausalLM, RouterOutput
from bam_ray.model.embeddings_bam import BamHead, weighted_states
from bam_ray.model.table_exchange_bam import LocalTableExchange, TableExchange

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
        hidden, gates = head_inputs(out)
        gates = None if gates is None else gates[:, :-1].flatten(0, 1)
        nll = self.head(hidden[:, :-1].flatten(0, 1), targets, gates)
        return nll, getattr(out, "router_outputs", ())

    def token_nll(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Return the NLL of each predicted token of `input_ids` [B, L], and the output of the model without its head.

        The NLLs are fp32 [B, L - 1]. For a model without a plain head, the output is that of the whole model.
        """
        if self.head is None:
            out = self.model(input_ids=input_ids, use_cache=False)
            nll = [
                F.cross_entropy(row.float(), ids[1:], reduction="none")
                for row, ids in zip(out.logits[:, :-1], input_ids, strict=True)
            ]
        else:
            out = self.model.base_model(input_ids=input_ids, use_cache=False)
            hidden, gates = head_inputs(out)
            nll = [
                self.head.token_nll(hidden[row, :-1], ids[1:], None if gates is None else gates[row, :-1])
                for row, ids in enumerate(input_ids)
            ]
        return torch.stack(nll), out


class ChunkedHead(nn.Module):
    """The head of a model together with the loss.

    It holds the head's weight itself, because ZeRO-3 gathers the parameters of a module when that module is called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        has_tables = isinstance(head, BamHead)
        self.weight = head.experts.weight if has_tables else head.weight  # [V, d], or [N, V, d] with tables
        self.exchange: TableExchange = head.exchange if has_tables else LocalTableExchange()
        self.scale = getattr(model.config, "logit_scale", 1.0)

    def forward(self, hidden: Tensor, targets: Tensor, gates: Tensor | None = None) -> Tensor:
        """Return the mean NLL of `targets` [T] for the hidden states [T, d] and the gates [T, N] of the tables."""
        weight = self.exchange.slice_vocabulary(self.weight)
        if not torch.is_grad_enabled():  # an autograd function cannot see this itself
            hidden, weight = hidden.detach(), weight.detach()
            gates = None if gates is None else gates.detach()
        states = hidden * self.scale
        nll: Tensor = SummedNLL.apply(states, gates, weight, targets, self.exchange)  # type: ignore[no-untyped-call]
        return nll / len(targets)

    @torch.no_grad()
    def token_nll(self, hidden: Tensor, targets: Tensor, gates: Tensor | None = None) -> Tensor:
        """Return the NLL of each of the `targets` [T] in fp32, without gradients. See `forward`."""
        weight = self.exchange.slice_vocabulary(self.weight)
        head = SlicedHead(weight.to(product_dtype(weight)), self.exchange)
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = head.chunks(hidden * self.scale, gates, targets)
            return torch.cat([-head.target_log_p(head.log_p(chunk), chunk) for chunk in chunks])


def head_inputs(out: Any) -> tuple[Tensor, Tensor | None]:
    """Return the last hidden states [B, L, d], and the gates [B, L, N] of the head if it has embedding experts.

    `out` is the output of a model without its head.
    """
    return out.last_hidden_state, getattr(out, "head_gates", None)


class LossChunk(NamedTuple):
    """The C tokens whose logits are computed at once: the same number of tokens of each rank."""

    own: slice  # the tokens of this rank, among all that it has
    x: Tensor  # [C, d]
    gates: Tensor | None  # [C, N]
    targets: Tensor  # [C], relative to the first token of this rank's slice of the vocabulary


class SlicedHead:
    """The slice of the vocabulary for which this rank computes logits: all of it, if all tables are on this rank.

    Args:
        weight: The slice of the head's weight, [V', d] or [N, V', d].
        exchange: The route of tokens to the slices.
    """

    def __init__(self, weight: Tensor, exchange: TableExchange) -> None:
        self.tables = tables_of(weight)
        self.exchange = exchange

    def chunks(self, hidden: Tensor, gates: Tensor | None, targets: Tensor) -> Iterator[LossChunk]:
        """Yield `hidden` [T, d], `gates` [T, N] and `targets` [T] in chunks.

        The logits of a chunk are about as large as the slice of the weight.
        """
        exchange = self.exchange
        size = max(MIN_CHUNK_TOKENS, len(self.tables) * hidden.shape[1]) // exchange.size
        for start in range(0, len(hidden), size):
            own = slice(start, start + size)
            weights = None if gates is None else exchange.gather(gates[own])
            target = exchange.gather(targets[own]) - exchange.first_token
            yield LossChunk(own, exchange.gather(hidden[own]), weights, target)

    def log_p(self, chunk: LossChunk) -> Tensor:
        """Return the log-probabilities of the slice in fp32: [C, V']."""
        return self.exchange.log_softmax(summed_logits(self._states(chunk), self.tables))

    def target_log_p(self, log_p: Tensor, chunk: LossChunk) -> Tensor:
        """Return the log-probabilities of the targets of this rank's tokens: [C, V'] -> [C / E]."""
        index, is_here = self._targets(log_p, chunk)
        return self.exchange.sum(log_p.gather(1, index).where(is_here, 0.0).squeeze(1))

    def grad_logits(self, log_p: Tensor, chunk: LossChunk) -> Tensor:
        """Return the gradient of the summed NLL in the dtype of the tables: [C, V']. Overwrites `log_p`."""
        index, is_here = self._targets(log_p, chunk)
        return log_p.exp_().scatter_add_(1, index, -is_here.to(log_p.dtype)).to(self.tables[0].dtype)

    def grad_inputs(self, grad: Tensor, chunk: LossChunk) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of x [C / E, d] and gates [C / E, N] of this rank's tokens, for that of the logits."""
        x, gates = chunk.x, chunk.gates
        products = [(grad @ table).to(x.dtype) for table in self.tables]  # N of [C, d]
        if gates is None:
            return self.exchange.sum(products[0]), None
        grad_gates = torch.stack([(x * product).sum(-1) for product in products], dim=-1)
        grad_x = torch.zeros_like(x)
        for gate, product in zip(gates.unbind(-1), products, strict=True):
            grad_x.addcmul_(gate.to(x.dtype).unsqueeze(-1), product)
        return self.exchange.sum(grad_x), self.exchange.sum(grad_gates)

    def add_grad_tables(self, into: Tensor, grad: Tensor, chunk: LossChunk) -> None:
        """Add the gradient of the tables, for that of the logits, to `into`, which is fp32."""
        for table, part in zip(tables_of(into), self._states(chunk), strict=True):
            _add_product(table, grad.t(), part)

    def _states(self, chunk: LossChunk) -> Sequence[Tensor]:
        """Return the hidden states that each table multiplies: N of [C, d]."""
        states = chunk.x if chunk.gates is None else weighted_states(chunk.x, chunk.gates)
        parts: Sequence[Tensor] = states.to(self.tables[0].dtype).split(chunk.x.shape[1], -1)
        return parts

    def _targets(self, log_p: Tensor, chunk: LossChunk) -> tuple[Tensor, Tensor]:
        """Return the index of each target in the slice, and True if it is there: [C, 1] both."""
        width = log_p.shape[1]
        targets = chunk.targets.unsqueeze(1)
        return targets.clamp(0, width - 1), (targets >= 0) & (targets < width)


class SummedNLL(torch.autograd.Function):
    """The sum Σ -log softmax(hidden · weightᵀ)[target] in fp32, for hidden [T, d], weight [V, d] and targets [T].

    With N tables, the weight is [N, V, d], and the logits are the sum of the N products, weighted by the gates [T, N].
    Matrix products use the precision of autocast if it is enabled. The softmax and the sums over tables and chunks are
    fp32.

    If the tables are divided among ranks, the weight is this rank's slice [N, V', d], and the sum is over the tokens of
    this rank. The gradient of the weight is that of the summed losses of all ranks, which must be weighted equally.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, gates: Tensor | None, weight: Tensor, targets: Tensor, exchange: TableExchange
    ) -> Tensor:
        """Compute the sum, and the gradients for a loss gradient of 1."""
        of_hidden, of_gates, of_weight = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_gates = torch.empty_like(gates) if gates is not None and of_gates else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float) if of_weight else None
        total = hidden.new_zeros((), dtype=torch.float)
        head = SlicedHead(weight.to(product_dtype(weight)), exchange)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in head.chunks(hidden, gates, targets):
                log_p = head.log_p(chunk)
                total -= head.target_log_p(log_p, chunk).sum()
                if not any(ctx.needs_input_grad):
                    continue
                grad = head.grad_logits(log_p, chunk)
                if of_hidden or of_gates:
                    for whole, part in zip((grad_hidden, grad_gates), head.grad_inputs(grad, chunk), strict=True):
                        if whole is not None and part is not None:
                            whole[chunk.own] = part
                if grad_weight is not None:
                    head.add_grad_tables(grad_weight, grad, chunk)
                del log_p, grad  # frees them before the next chunk allocates its own
        ctx.save_for_backward(grad_hidden, grad_gates, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that `forward` computed."""
        grad_hidden, grad_gates, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_gates is not None:
            grad_gates = grad_gates * grad.to(grad_gates.dtype)
        if grad_weight is not None:  # in place, because it is as large as the weight
            grad_weight = grad_weight.mul_(grad).to(ctx.dtype)
        return grad_hidden, grad_gates, grad_weight, None, None


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the products with `weight`: that of autocast if it is enabled."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def tables_of(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the tables [V, d] of the weight of a head, which is [V, d] or [N, V, d]."""
    return weight.unbind(0) if weight.ndim == 3 else (weight,)


def summed_logits(states: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
    """Return the sum of the products of N states [C, d] and tables [V, d]: [C, V] in fp32."""
    logits: Tensor = (states[0] @ tables[0].t()).float()
    # One product over all tables would need a copy of them as [V, N·d]
    for each, table in zip(states[1:], tables[1:], strict=True):
        _add_product(logits, each, table.t())
    return logits


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product a [m, k] · b [k, n] to `into` [m, n], which is fp32."""
    if a.dtype is into.dtype:
        into.addmm_(a, b)
    else:
        into += a @ b
