"""The embedding experts of a mixture: one table for each expert, at the input and at the output.

The gates are soft, as those of the attention experts: the input is the weighted mean of the rows of all tables, and the
output head weights the hidden state for each table, and adds the products with all of them. Tokens reach the tables
through a seam, `exchange`: expert parallelism divides the tables among ranks.

Shapes: B batch, L length, T = B·L tokens, d hidden size, N experts, V vocabulary size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bam import BamConfig
from .prefix_bam import RoutingContext
from .routing_bam import BamRouter
from .table_exchange_bam import LocalTableExchange, TableExchange


class BamTables(nn.Module):
    """The tables of all experts."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.vocab_size, config.hidden_size))


class BamInputEmbeddings(nn.Module):
    """The input embedding of a mixture with embedding experts."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = config.vocab_size, config.hidden_size
        self.padding_idx = config.pad_token_id
        self.experts = BamTables(config)
        self.exchange: TableExchange = LocalTableExchange()
        self.gate = BamRouter(config)

    def forward(self, input_ids: Tensor, routing: RoutingContext | None = None) -> Tensor:
        """Return Σ_i gate_i · table_i[input_ids]: [B, L] -> [B, L, d].

        The router reads the mean of the rows of all tables, normalized without weights.
        """
        rows = self.exchange.rows(input_ids, self.look_up)  # [B, L, N, d]
        mean = F.layer_norm(rows.mean(2).float(), rows.shape[-1:])
        gates = self.gate(mean, routing).softmax(-1).to(rows.dtype)  # [B, L, N]
        out: Tensor = (gates.unsqueeze(-2) @ rows).squeeze(-2)
        return out

    def look_up(self, input_ids: Tensor) -> Tensor:
        """Return the rows of the tables of this rank: ids [B, L] -> [B, L, n, d]."""
        tables = self.experts.weight.unbind(0)
        return torch.stack([F.embedding(input_ids, table, self.padding_idx) for table in tables], dim=2)


class BamHeadGate(nn.Module):
    """The router of the output head, which reads the last hidden states."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.gate = BamRouter(config)

    def forward(self, x: Tensor, routing: RoutingContext | None = None) -> Tensor:
        """Return the gates [B, L, N] of the last hidden states x [B, L, d], in fp32."""
        gates: Tensor = self.gate(x, routing).softmax(-1)
        return gates


class BamHead(nn.Module):
    """The output head of a mixture with embedding experts."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.experts = BamTables(config)
        self.exchange: TableExchange = LocalTableExchange()

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the logits Σ_i gate_i · table_i · x: x [B, L, d], gates [B, L, N] -> [B, L, V]."""
        tables = self.exchange.slice_vocabulary(self.experts.weight).unbind(0)
        tokens, weights = (self.exchange.gather(each.flatten(0, -2)) for each in (x, gates))
        states = weighted_states(tokens, weights).split(x.shape[-1], -1)  # N of [T, d]
        out: Tensor = states[0] @ tables[0].t()
        # One product over all tables would need a copy of them as [V, N·d]
        for each, table in zip(states[1:], tables[1:], strict=True):
            out = torch.addmm(out, each, table.t())
        return self.exchange.join_vocabulary(out).view(*x.shape[:-1], -1)


def weighted_states(x: Tensor, gates: Tensor) -> Tensor:
    """Return the hidden states x [..., d], weighted by the gates [..., N] of each expert: [..., N·d]."""
    return (gates.to(x.dtype).unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
