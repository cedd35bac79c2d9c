"""Which experts the tokens of a domain meet in a mixture, layer by layer.

The FFN's choices are recomputed from the router logits of the forward pass by the model's own rule; the attention gates
likewise. Sums are kept in double precision, so the batch size does not show in the result.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bam_ray.evaluation.results import DomainRouting, LayerRouting, Routing
from bam_ray.model import BamCausalLMOutput, BamConfig, select_experts


class RoutingTally:
    """Sums over the tokens seen so far.

    Shapes: M layers that have experts (0 of attention where it is averaged), T tokens, N experts, k experts a token.
    """

    def __init__(self, config: BamConfig, bias: Tensor | None = None) -> None:
        """`bias` [M, N]: the selection biases, where there are any."""
        self.bias = None if bias is None else bias.unsqueeze(1)
        self.top_k = config.num_experts_per_tok
        self.attention_top_k = config.num_attention_experts_per_tok
        layers, experts = len(config.mixture_layers), config.num_experts
        attention_layers = 0 if config.attention_experts == "averaged" else layers
        self.tokens = 0
        self.choices = torch.zeros(layers, experts, dtype=torch.double)
        self.probability = torch.zeros(layers, experts, dtype=torch.double)
        self.entropy = torch.zeros(layers, dtype=torch.double)
        self.gate = torch.zeros(attention_layers, experts, dtype=torch.double)
        self.attention_entropy = torch.zeros(attention_layers, dtype=torch.double)

    def add(self, out: BamCausalLMOutput) -> None:
        """Count the tokens of one forward pass with `output_router_logits`."""
        assert out.router_logits is not None and out.attention_router_logits is not None
        probability = torch.stack(out.router_logits).float().softmax(-1)  # [M, T, N]
        chosen = select_experts(probability, self.top_k, self.bias)
        self.tokens += probability.shape[1]
        self.choices += F.one_hot(chosen, probability.shape[-1]).sum((1, 2)).cpu()
        self.probability += probability.sum(1, dtype=torch.double).cpu()
        self.entropy += entropy(probability).cpu()
        if len(out.attention_router_logits):
            gate = torch.stack(out.attention_router_logits).float().softmax(-1)
            self.attention_entropy += entropy(gate).cpu()
            if self.attention_top_k:  # the others' gates are 0; the rest is not made to sum to 1
                kept = gate.topk(self.attention_top_k, dim=-1).indices
                gate = gate * torch.zeros_like(gate).scatter(-1, kept, 1.0)
            self.gate += gate.sum(1, dtype=torch.double).cpu()

    def routing(self) -> DomainRouting:
        """Means over the tokens seen."""
        share = self.choices / self.choices.sum(-1, keepdim=True)
        return DomainRouting(
            tokens=self.tokens,
            layers=tuple(
                layer_routing(
                    share=share[layer].tolist(),
                    probability=(self.probability[layer] / self.tokens).tolist(),
                    entropy=self.entropy[layer].item() / self.tokens,
                    gate=(self.gate[layer] / self.tokens).tolist() if len(self.gate) else [],
                    attention_entropy=self.attention_entropy[layer].item() / self.tokens if len(self.gate) else None,
                )
                for layer in range(share.shape[0])
            ),
        )


def layer_routing(
    share: list[float], probability: list[float], entropy: float, gate: list[float], attention_entropy: float | None
) -> LayerRouting:
    """A layer's means, with what follows from the shares."""
    return LayerRouting(
        ffn_share=tuple(share),
        ffn_probability=tuple(probability),
        ffn_entropy=entropy,
        load_imbalance=max(share) * len(share),
        dead_experts=tuple(expert for expert, part in enumerate(share) if part == 0.0),
        attention_gate=tuple(gate),
        attention_entropy=attention_entropy,
    )


def entropy(probability: Tensor) -> Tensor:
    """Sum over tokens of the entropy in nats: [M, T, N] -> [M], double."""
    per_layer: Tensor = torch.special.entr(probability).sum((1, 2), dtype=torch.double)
    return per_layer


def routing_of(config: BamConfig, domains: dict[str, DomainRouting]) -> Routing:
    """A mixture's routing on each domain, and on all their tokens together."""
    parts = list(domains.values())
    tokens = sum(part.tokens for part in parts)
    weights = torch.tensor([part.tokens / tokens for part in parts], dtype=torch.double)

    def pooled(rows: Sequence[tuple[float, ...]]) -> list[float]:
        pooled: list[float] = (weights @ torch.tensor(rows, dtype=torch.double)).tolist()
        return pooled

    overall = []
    for layers in zip(*(part.layers for part in parts), strict=True):
        attention_entropies = [(layer.attention_entropy,) for layer in layers if layer.attention_entropy is not None]
        overall.append(
            layer_routing(
                share=pooled([layer.ffn_share for layer in layers]),
                probability=pooled([layer.ffn_probability for layer in layers]),
                entropy=pooled([(layer.ffn_entropy,) for layer in layers])[0],
                gate=pooled([layer.attention_gate for layer in layers]),
                attention_entropy=pooled(attention_entropies)[0] if attention_entropies else None,
            )
        )
    names = config.expert_names or [str(expert) for expert in range(config.num_experts)]
    return Routing(
        expert_names=tuple(names), domains=domains, overall=DomainRouting(tokens=tokens, layers=tuple(overall))
    )
