"""The expert-parallel implementation of the seam to the embedding experts: each rank holds n of the N tables.

The input needs the rows of all tables, because its router reads their mean. The token ids of a group are gathered, each
rank looks up the rows of its tables, and an all-to-all returns them.

The head could gather the hidden states, multiply them by the tables of each rank, and sum the logits over the ranks.
That sends V numbers for each token, where everything else sends about d. The tables are smaller than the logits of a
micro batch, so they are sent instead: an all-to-all gives each rank the slice [N, V', d] of all tables, V' = V / E. The
rank then has the complete logits of all tokens of the group in its slice of the vocabulary, and a softmax over the
whole vocabulary needs one more number for each token and slice (as in Megatron-LM, arXiv 1909.08053).

A rank sends these numbers in the forward pass, and as many in the backward pass:

    input   rows of its tables                      T·(E - 1)·n·d
            instead: two sums, as the gates of      T·(E - 1)·2d            less only if n > 2
            the second need the first
    head    hidden states and gates                 T·(E - 1)·(d + N)
            slices of its tables                    n·V·d·(E - 1)/E
            instead of slices: sums of logits       T·(E - 1)·V             less only if E·T < n·d

The last condition is rare, as a group usually has thousands of tokens in a micro batch. The loss holds as many logits
at once as the numbers of a slice, and the slice and its gradient are as large as the rank's own tables.

Shapes: E ranks of the group, N tables, n = N / E tables on each rank, B batch, L length, T tokens of one rank,
d hidden size, V vocabulary size, V' slice of the vocabulary.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from bam_ray.model.table_exchange_bam import LookUp
from bam_ray.model.token_dispatch_bam import to_autocast_dtype
from bam_ray.on_deepspeed.collectives import (
    AsyncCollective,
    EPGroup,
    StartCollective,
    start_all_gather,
    start_all_to_all,
    start_reduce_scatter,
)


class AllToAllTableExchange:
    """The table exchange of a group in which rank r has the tables r·n to (r + 1)·n - 1.

    All ranks must bring the same shapes. It keeps no state, so the input and the head can share it.
    """

    def __init__(self, ep_group: EPGroup, vocab_size: int) -> None:
        self.ep_group = ep_group
        self.size = ep_group.size
        self._vocab_size = vocab_size
        self._slice_size = -(-vocab_size // self.size)  # the slice of the last rank may be smaller
        self.first_token = self._slice_size * ep_group.rank
        self._gather: StartCollective = partial(start_all_gather, group=ep_group.process_group)
        self._scatter: StartCollective = partial(start_reduce_scatter, group=ep_group.process_group)

    def rows(self, input_ids: Tensor, look_up: LookUp) -> Tensor:
        """See `TableExchange.rows`. The rows travel in their own dtype, because the router computes in fp32."""
        received = self._transpose(look_up(self.gather(input_ids)))  # [E·B, L, n, d]: the tables of each rank in turn
        rows: Tensor = received.unflatten(0, (self.size, -1)).movedim(0, 2).flatten(2, 3)  # [B, L, E·n, d]
        return rows

    def slice_vocabulary(self, tables: Tensor) -> Tensor:
        """See `TableExchange.slice_vocabulary`."""
        padding = self._slice_size * self.size - self._vocab_size
        tables = to_autocast_dtype(tables)
        tables = F.pad(tables, (0, 0, 0, padding)) if padding else tables
        slices: Tensor = tables.unflatten(1, (self.size, -1)).movedim(1, 0)  # [E, n, V', d]
        return self._transpose(slices).flatten(0, 1)[:, : self._vocab_size - self.first_token]

    def gather(self, x: Tensor) -> Tensor:
        """See `TableExchange.gather`."""
        return self._sent(x, self._gather, self._scatter)

    def sum(self, parts: Tensor) -> Tensor:
        """See `TableExchange.sum`."""
        return self._sent(parts, self._scatter, self._gather)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """See `TableExchange.log_softmax`."""
        of_slices = self.gather(logits.logsumexp(-1))  # [E·E·T]
        return logits.sub_(of_slices.view(self.size, -1).logsumexp(0).unsqueeze(1))

    def join_vocabulary(self, logits: Tensor) -> Tensor:
        """See `TableExchange.join_vocabulary`."""
        padded = F.pad(logits, (0, self._slice_size - logits.shape[1]))
        slices: Tensor = self._transpose(padded).unflatten(0, (self.size, -1))  # [E, T, V']
        return slices.movedim(0, 1).flatten(1)[:, : self._vocab_size]

    def _transpose(self, x: Tensor) -> Tensor:
        """Send the r-th of E equal parts of x to rank r, and return the parts received, in the order of ranks."""
        parts = [len(x) // self.size] * self.size
        collective = partial(start_all_to_all, sent=parts, received=parts, group=self.ep_group.process_group)
        return self._sent(x, collective, collective)

    def _sent(self, x: Tensor, forward: StartCollective, backward: StartCollective) -> Tensor:
        collective = AsyncCollective(self.ep_group.timer, forward, backward)
        return collective.wait(collective.start(x))
