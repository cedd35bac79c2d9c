"""The FFN experts of a mixture, whose arithmetic is one operator.

Shapes: T tokens, k experts a token, R rows sorted by expert (T·k unless choices are dropped), d hidden size, f hidden
size of an FFN, u rows of `up` of one expert (2f if gated, else f), N experts. Under expert parallelism N counts the
experts of this rank.
"""

import re
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bam import ACTIVATIONS, BamConfig
from .token_dispatch_bam import LocalTokenDispatcher, Overlap, TokenDispatcher, to_autocast_dtype

# The experts' arithmetic is one operator with its own gradient, for two reasons. The number of rows of an expert
# depends on the data, which a compiler cannot trace. And gradients are written directly into slices of the stacked
# gradient, which autograd would assemble from copies. The operator is named after this module, because the copy of this
# code in a saved mixture must register operators of its own.
OPERATORS = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{OPERATORS}::expert_ffn", mutates_args=())
def expert_ffn(
    rows: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Optional[Tensor],  # noqa: UP045 (torch infers the operator's schema and does not support `X | None`)
    down_bias: Optional[Tensor],  # noqa: UP045 (see above)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply each expert to its consecutive rows.

    Elementwise operations run on all rows at once: buffers of one expert each, or of width 2f, are 10 % slower. The
    operator has no second derivative and no forward-mode gradient. All floating-point tensors have the same dtype.

    Args:
        rows: The inputs, sorted by expert [R, d].
        counts: The number of rows of each expert [N].
        up: The first projections [N, u, d]. If the FFN is gated, u is 2f and the gate comes first; else u is f.
        down: The second projections [N, d, f].
        up_bias: [N, u] or None.
        down_bias: [N, d] or None.
        activation: A key of `ACTIVATIONS`.

    Returns:
        The outputs [R, d], and three tensors that the gradient needs: the projection by the first f rows of `up`
        [R, f], the projection by its other rows [R, f] (empty if not gated), and the input of `down` [R, f].
    """
    f, slices = down.shape[2], expert_slices(counts)
    first = project_rows(rows, up[:, :f], None if up_bias is None else up_bias[:, :f], slices)  # [R, f]
    activated = activate(first, activation)  # [R, f]
    second = rows.new_empty(0)
    if up.shape[1] > f:
        second = project_rows(rows, up[:, f:], None if up_bias is None else up_bias[:, f:], slices)  # [R, f]
        activated.mul_(second)
    return project_rows(activated, down, down_bias, slices), first, second, activated


@torch.library.custom_op(f"{OPERATORS}::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(  # noqa: PLR0913 (an operator takes tensors, not structures of tensors)
    grad: Tensor,
    rows: Tensor,
    counts: Tensor,
    first: Tensor,
    second: Tensor,
    activated: Tensor,
    up: Tensor,
    down: Tensor,
    biased: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the rows, `up`, `down` and their biases of `expert_ffn`; the last two empty without bias.

    Args:
        grad: The gradient of the outputs [R, d].
        rows: See `expert_ffn`.
        counts: See `expert_ffn`.
        first: The first of the three tensors that `expert_ffn` returns for the gradient.
        second: The second of them.
        activated: The third of them.
        up: See `expert_ffn`.
        down: See `expert_ffn`.
        biased: True if the experts have biases.
        activation: See `expert_ffn`.
    """
    f, slices = down.shape[2], expert_slices(counts)
    grad_rows, grad_up, grad_down = torch.empty_like(rows), torch.empty_like(up), torch.empty_like(down)
    grad_up_bias, grad_down_bias = (weight.new_empty(weight.shape[:2] if biased else (0,)) for weight in (up, down))
    grad_activated = torch.empty_like(activated)
    weight_gradient(grad, activated, grad_down, grad_down_bias, slices)
    for expert, part in slices:
        torch.mm(grad[part], down[expert], out=grad_activated[part])
    halves = []
    if up.shape[1] > f:
        halves.append((activate(first, activation).mul_(grad_activated), slice(f, 2 * f)))
        grad_activated.mul_(second)
    halves.append((activation_gradient(grad_activated, first, activation), slice(0, f)))
    for number, (grad_hidden, half) in enumerate(halves):
        weight_gradient(grad_hidden, rows, grad_up[:, half], grad_up_bias[:, half] if biased else grad_up_bias, slices)
        for expert, part in slices:
            out, weight = grad_rows[part], up[expert, half]
            torch.addmm(out, grad_hidden[part], weight, beta=min(number, 1), out=out)
    return grad_rows, grad_up, grad_down, grad_up_bias, grad_down_bias


def expert_slices(counts: Tensor) -> list[tuple[int, slice]]:
    """Return the index of each expert and the slice of its rows, for counts [N]."""
    ends = counts.cumsum(0).tolist()
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]


def project_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, slices: list[tuple[int, slice]]) -> Tensor:
    """Apply each expert's linear map to its rows: rows [R, i], weight [N, o, i], bias [N, o] -> [R, o]."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, part in slices:
        if part.start == part.stop:
            continue
        if bias is None:
            torch.mm(rows[part], weight[expert].t(), out=out[part])
        else:
            torch.addmm(bias[expert], rows[part], weight[expert].t(), out=out[part])
    return out


def weight_gradient(grad: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, slices: list[tuple[int, slice]]) -> None:
    """Write the gradients of the weight [N, o, i] and the bias [N, o] of `project_rows`; an empty bias is skipped."""
    for expert, part in slices:
        torch.mm(grad[part].t(), rows[part], out=weight[expert])  # zeros for an expert without rows
        if bias.numel():
            torch.sum(grad[part], 0, out=bias[expert])


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation of `ACTIVATIONS` elementwise."""
    name, kind = ACTIVATIONS[activation]
    if name == "gelu":
        return F.gelu(x, approximate=kind)
    return F.silu(x) if name == "silu" else F.relu(x)


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Return the gradient of x from the gradient of `activate(x)`."""
    name, kind = ACTIVATIONS[activation]
    out: Tensor
    if name == "gelu":
        out = torch.ops.aten.gelu_backward(grad, x, approximate=kind)
    elif name == "silu":
        out = torch.ops.aten.silu_backward(grad, x)
    else:
        out = torch.ops.aten.threshold_backward(grad, x, 0)
    return out


@expert_ffn.register_fake
def _(
    rows: Tensor, counts: Tensor, up: Tensor, down: Tensor, up_bias: Any, down_bias: Any, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (rows.shape[0], down.shape[2])
    second = rows.new_empty(shape if up.shape[1] > shape[1] else 0)
    return rows.new_empty(rows.shape), rows.new_empty(shape), second, rows.new_empty(shape)


@expert_ffn_backward.register_fake
def _(  # noqa: PLR0913 (the signature of `expert_ffn_backward`)
    grad: Tensor,
    rows: Tensor,
    counts: Tensor,
    first: Tensor,
    second: Tensor,
    activated: Tensor,
    up: Tensor,
    down: Tensor,
    biased: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    up_bias, down_bias = (weight.new_empty(weight.shape[:2] if biased else (0,)) for weight in (up, down))
    return torch.empty_like(rows), torch.empty_like(up), torch.empty_like(down), up_bias, down_bias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, counts, up, down, up_bias, _, ctx.activation = inputs
    ctx.biased = up_bias is not None
    ctx.save_for_backward(rows, counts, *output[1:], up, down)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros as gradients of the three tensors that are not differentiable


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grad_rows, grad_up, grad_down, *biases = expert_ffn_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.biased, ctx.activation
    )
    return grad_rows, None, grad_up, grad_down, *(biases if ctx.biased else (None, None)), None


expert_ffn.register_autograd(_backward, setup_context=_save_for_backward)


class BamExperts(nn.Module):
    """N stacked FFNs, each `down(act(gate(x)) * up(x))` if gated, else `down(act(up(x)))`."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        d, f, num_experts = config.hidden_size, config.intermediate_size, config.num_experts
        self.activation = config.hidden_act
        up, width = ("gate_up", 2 * f) if config.mlp_gated else ("up", f)
        self.up_name = up
        self.register_parameter(f"{up}_proj", nn.Parameter(torch.empty(num_experts, width, d)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d, f))
        self.register_parameter(
            f"{up}_bias", nn.Parameter(torch.empty(num_experts, width)) if config.mlp_bias else None
        )
        self.down_bias = nn.Parameter(torch.empty(num_experts, d)) if config.mlp_bias else None
        self.dispatcher: TokenDispatcher = LocalTokenDispatcher(num_experts)

    def forward(
        self,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        kept: Tensor | None = None,
        overlap: Overlap | None = None,
    ) -> Tensor:
        """Return Σ_k weight · expert(x) of x [T, d], experts [T, k] and weights [T, k]: [T, d].

        Choices that are False in `kept` [T, k] contribute nothing. `overlap` is called once while tokens are in flight.
        """
        rows, counts, metadata = self.dispatcher.dispatch(x, top_k_index, top_k_weights, kept, overlap)
        return self.dispatcher.combine(self.compute(rows, counts), metadata, x)

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Apply each expert of this rank to its rows: rows [R, d], sorted by expert, and counts [N] -> [R, d]."""
        up, up_bias = getattr(self, f"{self.up_name}_proj"), getattr(self, f"{self.up_name}_bias")
        weights = (up, self.down_proj, up_bias, self.down_bias)
        cast = (None if weight is None else to_autocast_dtype(weight) for weight in weights)
        out: Tensor = expert_ffn(to_autocast_dtype(rows), counts, *cast, self.activation)[0]
        return out
