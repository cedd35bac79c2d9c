"""Routing statistics of a mixture on a domain: which experts process its tokens, by layer.

The choices of the FFN routers are recomputed from the router logits of the forward pass with the model's own rule, and
so are the attention gates. Sums are in double precision, so the result does not depend on the batch size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bam_ray.evaluation.results import DomainRouting, LayerRouting, MixtureRouting
from bam_ray.model import BamConfig, RouterOutput, keep_top, select_experts


class RoutingAccumulator:
    """Sums of routing statistics over tokens.

    Shapes: M layers with experts (no attention layers if attention is averaged), T tokens, N experts, k experts per
    token.
    """

    def __init__(self, config: BamConfig, selection_bias: Tensor | None = None) -> None:
        """Create empty sums. `selection_bias` [M, N]: the selection biases of the routers, if the model has any."""
        self.selection_bias = None if selection_bias is None else selection_bias.unsqueeze(1)
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

    def add(self, routers: Sequence[RouterOutput], attention_logits: Sequence[Tensor]) -> None:
        """Add the tokens of one forward pass: the outputs of its FFN routers and the logits of its attention routers.

        Both have one item for each layer; the logits are [T, N].
        """
        probability = torch.stack([router.logits for router in routers]).float().softmax(-1)  # [M, T, N]
        chosen = select_experts(probability, self.top_k, self.selection_bias)
        self.tokens += probability.shape[1]
        self.choices += F.one_hot(chosen, probability.shape[-1]).sum((1, 2)).cpu()
        self.probability += probability.sum(1, dtype=torch.double).cpu()
        self.entropy += total_entropy(probability).cpu()
        if attention_logits:
            gate = torch.stack(list(attention_logits)).float().softmax(-1)
            self.attention_entropy += total_entropy(gate).cpu()
            self.gate += keep_top(gate, self.attention_top_k).sum(1, dtype=torch.double).cpu()

    def routing(self) -> DomainRouting:
        """Return the means over all tokens so far."""
        share = self.choices / self.choices.sum(-1, keepdim=True)
        has_attention = len(self.gate) > 0
        return DomainRouting(
            tokens=self.tokens,
            layers=tuple(
                layer_routing(
                    share=share[layer].tolist(),
                    probability=(self.probability[layer] / self.tokens).tolist(),
                    entropy=self.entropy[layer].item() / self.tokens,
                    gate=(self.gate[layer] / self.tokens).tolist() if has_attention else [],
                    attention_entropy=self.attention_entropy[layer].item() / self.tokens if has_attention else None,
                )
                for layer in range(share.shape[0])
            ),
        )


def layer_routing(
    share: list[float], probability: list[float], entropy: float, gate: list[float], attention_entropy: float | None
) -> LayerRouting:
    """Return the routing of a layer from its means. Imbalance and dead experts follow from the shares."""
    return LayerRouting(
        ffn_share=tuple(share),
        ffn_probability=tuple(probability),
        ffn_entropy=entropy,
        load_imbalance=max(share) * len(share),
        dead_experts=tuple(expert for expert, part in enumerate(share) if part == 0.0),
        attention_gate=tuple(gate),
        attention_entropy=attention_entropy,
    )


def total_entropy(probability: Tensor) -> Tensor:
    """Return the sum over tokens of the entropy in nats: [M, T, N] -> [M], in double precision."""
    per_layer: Tensor = torch.special.entr(probability).sum((1, 2), dtype=torch.double)
    return per_layer


def combine_domains(config: BamConfig, domains: dict[str, DomainRouting]) -> MixtureRouting:
    """Return the routing of a mixture on each domain, and on the tokens of all domains together."""
    parts = list(domains.values())
    tokens = sum(part.tokens for part in parts)
    weights = torch.tensor([part.tokens / tokens for part in parts], dtype=torch.double)

    def weighted_mean(rows: Sequence[tuple[float, ...]]) -> list[float]:
        mean: list[float] = (weights @ torch.tensor(rows, dtype=torch.double)).tolist()
        return mean

    overall = []
    for layers in zip(*(part.layers for part in parts), strict=True):
        attention_entropies = [(layer.attention_entropy,) for layer in layers if layer.attention_entropy is not None]
        overall.append(
            layer_routing(
                share=weighted_mean([layer.ffn_share for layer in layers]),
                probability=weighted_mean([layer.ffn_probability for layer in layers]),
                entropy=weighted_mean([(layer.ffn_entropy,) for layer in layers])[0],
                gate=weighted_mean([layer.attention_gate for layer in layers]),
                attention_entropy=weighted_mean(attention_entropies)[0] if attention_entropies else None,
            )
        )
    names = config.expert_names or [str(expert) for expert in range(config.num_experts)]
    return MixtureRouting(
        expert_names=tuple(names), domains=domains, overall=DomainRouting(tokens=tokens, layers=tuple(overall))
    )
