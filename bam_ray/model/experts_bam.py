"""The FFN experts of a mixture: tokens to the experts they chose, and the experts' arithmetic as one operator.

Shapes: T tokens, R rows sorted by expert (T·k where no choice is dropped), d hidden, f FFN hidden, N experts,
k experts a token.
"""

import re
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bam import ACTIVATIONS, BamConfig

Compute = Callable[[Tensor, Tensor], Tensor]
"""(rows [R, d] sorted by expert, how many each expert has) -> every expert applied to its rows: [R, d]."""


def in_place(compute: Compute, rows: Tensor, counts: Tensor) -> Tensor:
    """Rows to their experts, rows [R, d] and counts [N] -> [R, d]: all experts are here."""
    return compute(rows, counts)


def as_computed(x: Tensor) -> Tensor:
    """x as matrix products read it: in autocast's dtype, where that is on."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


# The experts' arithmetic is one operator with its own gradient. How many rows an expert gets is data, so a compiler
# could not see through it; and gradients are written straight into slices of the stacked gradient, which autograd
# would assemble from copies. It is named after this module: the copy in a saved mixture has operators of its own.
OPERATORS = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{OPERATORS}::expert_ffn", mutates_args=())
def expert_ffn(
    rows: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Optional[Tensor],  # noqa: UP045 (the schema's inference reads no unions)
    down_bias: Optional[Tensor],  # noqa: UP045
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply expert i to its counts[i] consecutive rows: rows [R, d] -> [R, d], and three [R, f] for the gradient.

    `up` [N, u, d] and `down` [N, d, f]: gated with u = 2f (gate first), plain with u = f. All of one floating dtype;
    `activation` a key of `ACTIVATIONS`. It has no second derivative and no forward-mode gradient.

    The three: of the first f rows of `up`, of its other rows (empty where plain), and what `down` is applied to.
    Elementwise work is done on all rows at once: buffers of one expert each, or of 2f, are slower by a tenth.
    """
    f, slices = down.shape[2], expert_slices(counts)
    first = project_rows(rows, up[:, :f], None if up_bias is None else up_bias[:, :f], slices)
    activated = activate(first, activation)
    second = rows.new_empty(0)
    if up.shape[1] > f:
        second = project_rows(rows, up[:, f:], None if up_bias is None else up_bias[:, f:], slices)
        activated.mul_(second)
    return project_rows(activated, down, down_bias, slices), first, second, activated


@torch.library.custom_op(f"{OPERATORS}::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
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
    """The gradients of rows, up, down and (empty where not `biased`) their biases, from that of `expert_ffn`'s rows."""
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
    """Every expert and where its rows are."""
    ends = counts.cumsum(0).tolist()
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]


def project_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, slices: list[tuple[int, slice]]) -> Tensor:
    """Each expert's linear map of its rows: rows [R, i], weight [N, o, i], bias [N, o] -> [R, o]."""
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
    """Write the gradients of `project_rows`'s weight [N, o, i] and, unless it is empty, its bias [N, o]."""
    for expert, part in slices:
        torch.mm(grad[part].t(), rows[part], out=weight[expert])  # zero where it has no rows
        if bias.numel():
            torch.sum(grad[part], 0, out=bias[expert])


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of `ACTIVATIONS`, elementwise."""
    name, kind = ACTIVATIONS[activation]
    if name == "gelu":
        return F.gelu(x, approximate=kind)
    return F.silu(x) if name == "silu" else F.relu(x)


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x from that of `activate(x)`."""
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
def _(
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
    ctx.set_materialize_grads(False)  # of those three


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grad_rows, grad_up, grad_down, *biases = expert_ffn_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.biased, ctx.activation
    )
    return grad_rows, None, grad_up, grad_down, *(biases if ctx.biased else (None, None)), None


expert_ffn.register_autograd(_backward, setup_context=_save_for_backward)


class BamExperts(nn.Module):
    """N FFNs, stacked: `down(act(gate(x)) * up(x))` each, or `down(act(up(x)))`."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        d, f, N = config.hidden_size, config.intermediate_size, config.num_experts
        self.num_experts = N  # of the whole mixture, wherever they are
        self.activation = config.hidden_act
        up, width = ("gate_up", 2 * f) if config.mlp_gated else ("up", f)
        self.up_name = up
        self.register_parameter(f"{up}_proj", nn.Parameter(torch.empty(N, width, d)))
        self.down_proj = nn.Parameter(torch.empty(N, d, f))
        self.register_parameter(f"{up}_bias", nn.Parameter(torch.empty(N, width)) if config.mlp_bias else None)
        self.down_bias = nn.Parameter(torch.empty(N, d)) if config.mlp_bias else None
        self.dispatcher: Callable[[Compute, Tensor, Tensor], Tensor] = in_place

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """[T, d], [T, k], [T, k] -> Σ_k weight · expert(hidden): [T, d].

        Choices that are not `kept` [T, k] (None: all are) have no row.
        """
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)
        if kept is not None:
            order = order[kept.reshape(-1)[order]]
            flat = flat[order]
        token = order // top_k_index.shape[1]
        counts = (flat.unsqueeze(1) == torch.arange(self.num_experts, device=flat.device)).sum(0)
        # Of the precision that experts compute in already here: on their way to other ranks rows are no larger
        rows = self.dispatcher(self.compute, as_computed(hidden_states.index_select(0, token)), counts)
        rows = rows.to(hidden_states.dtype)
        rows = rows * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(1).to(rows.dtype)
        return torch.zeros_like(hidden_states).index_add(0, token, rows)

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Apply expert i of those held here to its counts[i] rows: rows [R, d] sorted by expert -> [R, d]."""
        up, up_bias = getattr(self, f"{self.up_name}_proj"), getattr(self, f"{self.up_name}_bias")
        weights = (up, self.down_proj, up_bias, self.down_bias)
        computed = (None if weight is None else as_computed(weight) for weight in weights)
        out: Tensor = expert_ffn(as_computed(rows), counts, *computed, self.activation)[0]
        return out
