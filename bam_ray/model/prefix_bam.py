"""The part of routing that depends on the earlier tokens of a document, and its state while decoding.

Routers may read the running mean of their inputs over the document so far instead of one token
(`BamConfig.router_input`), and a prior over the experts may be added to the logits of all routers
(`BamConfig.router_prior`). Both need little state for each sequence, which the cache keeps (`RoutingState`).

A router is linear, so the logits of the mean input are the mean of the logits: N numbers for each token are summed, not
d. Sums are in double precision, so that a document has the same logits alone, in a packed sequence and in chunks.

With `BamConfig.router_forgetting` f below 1, the tokens of the document so far have the weights 1, f, f² and so on,
from the current one back. If a text changes its domain, the sums follow within about 1 / (1 - f) tokens.

Shapes: B batch, L length, N experts, R routers, V vocabulary size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .bigrams_bam import pair_bucket
from .configuration_bam import BamConfig

SMOOTHING = 20.0
"""Number of occurrences by which the share of a token counts in its probability after another token."""


class SeenTokens(NamedTuple):
    """The state of the sequences of a batch after the tokens that they have seen."""

    length: Tensor  # double [B], number of tokens of the current document, which all sums weight by their age
    last: Tensor  # int64 [B], the last token
    evidence: Tensor  # double [B, N], sum of the log-probabilities of each expert's domain
    logits: Tensor  # double [B, R, N], sums of the logits of each router


class RoutingState(CacheLayerMixin):
    """The `SeenTokens` of a cache. It is one more layer of the cache, after those of the attentions."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: SeenTokens | None = None

    def read(self) -> SeenTokens | None:
        """Return the state before the next forward pass; None: the sequences begin with it."""
        return self.seen

    def write(self, seen: SeenTokens) -> None:
        """Store the state after a forward pass."""
        self.seen = seen

    def reset(self) -> None:
        """Forget all tokens."""
        self.seen = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the sequences that a beam search continues."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select sequences of the batch."""
        if self.seen is not None:
            self.seen = SeenTokens(*(each[indices.to(each.device)] for each in self.seen))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        if self.seen is not None:
            self.seen = SeenTokens(*(each.repeat_interleave(repeats, dim=0) for each in self.seen))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens: the sums do not tell what the last tokens have added.

        Raises:
            NotImplementedError: Tokens are to be removed.
        """
        if tokens_to_remove:
            raise NotImplementedError(
                "routers that read the prefix cannot take back tokens: generate without an assistant model or prompt "
                "lookup"
            )

    def offload(self) -> None:
        """Do nothing: the state is small."""

    def prefetch(self) -> None:
        """Do nothing: the state is small."""

    # Abstract in transformers, which reads sizes only from the layers of attentions
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there are no keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the arguments: there are no keys and values."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a layer without keys."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: there are no keys."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1


def routing_state(cache: Cache) -> RoutingState:
    """Return the routing state of a cache, and add one if there is none.

    Call it after the attentions have updated the cache, whose layers they add by number. A cache may have a method
    `new_routing_state`, which returns a state of its own kind.
    """
    found = existing_routing_state(cache)
    if found is None:
        found = getattr(cache, "new_routing_state", RoutingState)()
        cache.layers.append(found)
    return found


def existing_routing_state(cache: Cache) -> RoutingState | None:
    """Return the routing state of a cache, or None if no forward pass has added one."""
    return next((layer for layer in cache.layers if isinstance(layer, RoutingState)), None)


class Documents:
    """The documents of a batch of sequences: where each begins, and which tokens are padding.

    A document begins where the positions are 0 or do not continue. A sequence whose positions continue those of an
    earlier forward pass continues its document.
    """

    def __init__(
        self, position_ids: Tensor, non_padding: Tensor | None, continues: bool, forgetting: float = 1.0
    ) -> None:
        """Find the documents.

        Args:
            position_ids: [1 or B, L].
            non_padding: False for padding tokens [B, L]; None: there are none.
            continues: The first tokens may continue documents of an earlier forward pass.
            forgetting: The factor on a running sum before the next token is added.
        """
        starts = position_ids == 0
        starts[:, 1:] |= position_ids.diff(dim=1) != 1
        if not continues:
            starts[:, 0] = True
        places = torch.arange(position_ids.shape[1], device=position_ids.device)
        first = torch.where(starts, places, -1).cummax(1).values  # [1 or B, L]
        self._first = first.clamp_min(0)
        self._non_padding = non_padding
        self._decays: list[Tensor] = []
        # Factor on the sums of documents that an earlier forward pass began [1 or B, L]; 0 for other documents
        self._kept = (first < 0).double()
        if forgetting != 1.0:
            self._kept = self._find_decays(starts, forgetting)
        self.has_previous = ~starts  # tokens whose previous token belongs to the same document
        if non_padding is not None:
            before = torch.cat((torch.full_like(non_padding[:, :1], True), non_padding[:, :-1]), dim=1)
            self.has_previous = self.has_previous & non_padding & before

    def _find_decays(self, starts: Tensor, forgetting: float) -> Tensor:
        """Set the factors of `_decayed_sum`, and return the product of all factors up to each token [1 or B, L].

        The factor of a token is that on the sum before it: `forgetting`, 0 if it begins a document, and 1 for padding.
        """
        continues = (~starts).double()
        product = continues * forgetting
        if self._non_padding is not None:
            product = torch.where(self._non_padding, product, continues)
        span = 1  # number of factors in each product
        while span < starts.shape[1]:
            self._decays.append(product[:, span:].unsqueeze(-1))
            product = torch.cat((product[:, :span], product[:, span:] * product[:, :-span]), dim=1)
            span *= 2
        return product

    def running_sum(self, values: Tensor, before: Tensor | None) -> Tensor:
        """Return the sums of `values` [B, L, K] over each document up to each token, double [B, L, K].

        `before` [B, K] are the sums of the documents that an earlier forward pass began.
        """
        values = values.double()
        if self._non_padding is not None:
            values = values * self._non_padding.unsqueeze(-1)
        sums = self._decayed_sum(values) if self._decays else self._plain_sum(values)
        if before is not None:
            sums = sums + before.unsqueeze(1) * self._kept.unsqueeze(-1)
        return sums

    def _plain_sum(self, values: Tensor) -> Tensor:
        total = torch.cat((torch.zeros_like(values[:, :1]), values.cumsum(1)), dim=1)  # [B, L + 1, K]
        index = self._first.unsqueeze(-1).expand(*values.shape)
        return total[:, 1:] - total.gather(1, index)

    def _decayed_sum(self, values: Tensor) -> Tensor:
        """Add the sums of 1, 2, 4, ... earlier tokens. A cumulative sum of growing weights would overflow."""
        sums = values
        for power, decay in enumerate(self._decays):
            span = 1 << power
            sums = torch.cat((sums[:, :span], sums[:, span:] + sums[:, :-span] * decay), dim=1)
        return sums


class RoutingContext:
    """The knowledge that the routers of one forward pass have of the documents so far.

    Attributes:
        shape: B and L.
        prior: The logarithm of the prior probability of each expert [B, L, N]; None: there is no prior.
    """

    prior: Tensor | None = None

    def __init__(
        self,
        documents: Documents,
        seen: SeenTokens | None,
        shape: Sequence[int],
        device: torch.device,
        routers: int,
    ) -> None:
        self.shape = tuple(shape)
        self._documents, self._seen = documents, seen
        ones = torch.ones(*shape, 1, device=device)
        before = None if seen is None else seen.length.unsqueeze(1)
        self._lengths = documents.running_sum(ones, before)  # [B, L, 1]
        self._sums: list[Tensor | None] = [None] * routers  # [B, N] each, after the last token
        self._evidence: Tensor | None = None  # [B, N], after the last token

    def add_prior(self, prior: "BigramPrior", input_ids: Tensor) -> None:
        """Compute the prior of the tokens `input_ids` [B, L]."""
        last = torch.zeros_like(input_ids[:, 0]) if self._seen is None else self._seen.last
        previous = torch.cat((last.unsqueeze(1), input_ids[:, :-1]), dim=1)
        log_p = prior(previous, input_ids) * self._documents.has_previous.unsqueeze(-1)
        evidence = self._documents.running_sum(log_p, None if self._seen is None else self._seen.evidence)
        self._evidence = evidence[:, -1]
        self.prior = (evidence * prior.scale).log_softmax(-1).float()

    def replace_prior(self, given: Tensor) -> None:
        """Use `given` [B, N] in place of the computed prior, for all tokens of the sequences where it is not NaN."""
        assert self.prior is not None
        given = given.unsqueeze(1)  # [B, 1, N]
        self.prior = torch.where(given.isnan(), self.prior, given)

    def mean_logits(self, logits: Tensor, router: int) -> Tensor:
        """Return the mean of the logits [B, L, N] of a router over each document up to each token, fp32 [B, L, N]."""
        sums = self._documents.running_sum(logits, None if self._seen is None else self._seen.logits[:, router])
        self._sums[router] = sums[:, -1].detach()
        return (sums / self._lengths.clamp_min(1.0)).float()

    def seen(self, input_ids: Tensor | None, experts: int) -> SeenTokens:
        """Return the state after the forward pass. The last tokens are unknown without `input_ids` [B, L]."""
        length = self._lengths[:, -1, 0]
        zeros = self._lengths.new_zeros(len(length), experts)
        sums = [zeros if each is None else each for each in self._sums]
        return SeenTokens(
            length,
            torch.zeros_like(length, dtype=torch.long) if input_ids is None else input_ids[:, -1],
            zeros if self._evidence is None else self._evidence,
            torch.stack(sums, dim=1) if sums else zeros.unsqueeze(1)[:, :0],
        )


class BigramCounts(nn.Module):
    """The numbers of tokens and of pairs of tokens in the text of each expert."""

    tokens: Tensor
    pairs: Tensor

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        counted = config.router_prior_vocab_size or config.vocab_size
        self.register_buffer("tokens", torch.zeros(config.num_experts, counted, dtype=torch.long))
        self.register_buffer("pairs", torch.zeros(config.num_experts, config.router_prior_buckets, dtype=torch.int))


class BigramPrior(nn.Module):
    """A prior over the experts: how probable the text of each makes the tokens of the document so far.

    `p_i(b | a) = (c_i(a, b) + 20 · u_i(b)) / (c_i(a) + 20)` is the probability of token b after token a in the text of
    expert i: c_i counts tokens and pairs of tokens in that text, and u_i is the share of a token, with half a count
    added. The prior of token t is `log_softmax_i(scale · Σ_{s ≤ t} log p_i(x_s | x_{s-1}))`, over the tokens of the
    document. Counts of pairs are hashed (`pair_bucket`).
    """

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.scale = config.router_prior_scale
        self.experts = BigramCounts(config)

    def forward(self, previous: Tensor, current: Tensor) -> Tensor:
        """Return log p_i(current | previous) for each expert, double [B, L, N], for tokens [B, L]."""
        tokens, pairs = self.experts.tokens, self.experts.pairs  # [N, V], [N, buckets]
        vocabulary = tokens.shape[1]
        # A model may have more rows than its tokenizer has tokens, and may generate them
        previous, current = previous.clamp_max(vocabulary - 1), current.clamp_max(vocabulary - 1)
        total = tokens.sum(1).double()  # [N]
        share = (counts_at(tokens, current) + 0.5) / (total + 0.5 * vocabulary)
        after = counts_at(tokens, previous)
        together = counts_at(pairs, pair_bucket(previous, current, vocabulary, pairs.shape[1])).minimum(after)
        return ((together + SMOOTHING * share) / (after + SMOOTHING)).log()


def counts_at(counts: Tensor, index: Tensor) -> Tensor:
    """Return the counts [N, K] of all experts at `index` [B, L], double [B, L, N]."""
    return counts[:, index].movedim(0, -1).double()
