"""Weights in the layout of oneDNN, for decoding on CPUs.

Matrix products of few rows read the weights once, so the speed of the memory bounds them. With weights in the layout
that oneDNN's kernels read, products of few rows are faster than those of torch's default (`benchmarks/serving.py`). The
kernel for a single row is slower than that for `LEAST_ROWS`, so fewer rows are padded.

The packed weights replace the original ones, so the memory stays the same. The sums are computed in another order, and
the results differ by rounding errors.

Shapes: R rows, i inputs, o outputs, T tokens, d hidden size, f hidden size of an FFN, N experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bam_ray.model.attention_bam import BamAttentionExperts
from bam_ray.model.experts_bam import BamExperts, activate, expert_slices

ROWS_HINT = 16
"""The number of rows that the layout is chosen for. Other numbers work too."""
LEAST_ROWS = 4


def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Return True if this build of torch and this processor have packed products for a device and a precision."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bf16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bf16)


def pack_weights(model: nn.Module) -> None:
    """Pack the weights of all linear layers and experts of a model, which can only be used for inference afterwards.

    Layers of classes that are derived from `nn.Linear` stay as they are, and a weight that is also the table of the
    input embeddings is kept besides its packed copy.
    """
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
            elif type(child) is BamExperts:
                setattr(parent, name, PackedExperts(child))
        if type(parent) is BamAttentionExperts:
            PackedAttentionExperts.convert(parent)


class PackedWeight:
    """One weight [o, i] and its bias [o]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS_HINT)
        self._weight: Tensor = packed
        self._bias = None if bias is None else bias.detach().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product with x [..., i], and the bias added to it: [..., o]."""
        rows = x.reshape(-1, x.shape[-1])  # [R, i]
        count = len(rows)
        if count < LEAST_ROWS:
            rows = F.pad(rows, (0, 0, 0, LEAST_ROWS - count))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out[:count].view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """A linear layer with a packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = PackedWeight(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with x [..., i]: [..., o]."""
        return self._product(x)


class PackedExperts(nn.Module):
    """The FFN experts of a mixture layer with packed weights."""

    def __init__(self, experts: BamExperts) -> None:
        super().__init__()
        up, up_bias = getattr(experts, f"{experts.up_name}_proj"), getattr(experts, f"{experts.up_name}_bias")
        self.activation, self.gated = experts.activation, experts.up_name == "gate_up"
        self.dispatcher = experts.dispatcher
        self._up = _packed(up, up_bias)
        self._down = _packed(experts.down_proj, experts.down_bias)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **more: Any) -> Tensor:
        """Return Σ_k weight · expert(x) of x [T, d]. The arguments are those of `BamExperts`."""
        rows, counts, metadata = self.dispatcher.dispatch(x, top_k_index, top_k_weights, **more)
        out = torch.empty_like(rows)  # [R, d]
        for expert, part in expert_slices(counts):
            if part.start < part.stop:
                out[part] = self._ffn(rows[part], expert)
        return self.dispatcher.combine(out, metadata, x)

    def _ffn(self, rows: Tensor, expert: int) -> Tensor:
        hidden = self._up[expert](rows)  # [R, 2f or f]
        if not self.gated:
            return self._down[expert](activate(hidden, self.activation))
        gate, up = hidden.chunk(2, dim=-1)
        return self._down[expert](activate(gate, self.activation).mul_(up))


class PackedAttentionExperts(BamAttentionExperts):
    """The attention experts of a mixture layer with packed weights."""

    _products: dict[str, PackedWeight]

    @classmethod
    def convert(cls, experts: BamAttentionExperts) -> None:
        """Make `experts` one of this class."""
        products = {}
        for role in "qkv":
            weight, bias = getattr(experts, f"{role}_proj"), getattr(experts, f"{role}_bias")
            products[role] = PackedWeight(weight.flatten(0, 1), None if bias is None else bias.flatten())
            setattr(experts, f"{role}_proj", None)
        # [n, d, H·h] -> [d, n·H·h]: one product that also sums the experts
        products["o"] = PackedWeight(experts.o_proj.transpose(0, 1).flatten(1))
        experts.o_proj = None  # type: ignore[assignment]
        converted: Any = experts
        converted.__class__ = cls
        converted._products = products

    def linear(self, x: Tensor, role: str) -> Tensor:
        """See `BamAttentionExperts.linear`."""
        return self._products[role](x)

    def output(self, heads: Tensor) -> Tensor:
        """See `BamAttentionExperts.output`."""
        return self._products["o"](heads.flatten(1))


def _packed(weight: Tensor, bias: Tensor | None) -> list[PackedWeight]:
    """Return the packed weights [o, i] of N experts, for their stacked weights [N, o, i] and biases [N, o]."""
    biases = [None] * len(weight) if bias is None else [*bias.detach()]
    return [PackedWeight(one, its) for one, its in zip(weight.detach(), biases, strict=True)]
