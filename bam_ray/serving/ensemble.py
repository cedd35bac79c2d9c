"""The posterior ensemble of several models, as one model for the decode engine.

The probability of a token is the weighted mean of the probabilities that the N members give it:

    p(x_t | x_<t) = Σ_i w_i,t p_i(x_t | x_<t)        log w_t = log_softmax_i(Σ_{s<t} log p_i(x_s | x_<s))

The weights of the members are their probabilities after the earlier tokens of the same request, with a uniform prior
(DEMix, arXiv 2108.05036; Branch-Train-Merge, arXiv 2208.03306). Nothing is trained or merged, so a member that is left
out leaves nothing behind. `bam_ray.evaluation.ensemble` scores the same ensemble on held-out text.

Each member keeps its keys and values in a part of the engine's cache. The rows of the cache hold the N sums of each
request, and what each member predicts next, because the token that follows is known only at the next forward pass.

Shapes: N members, B batch, L length, d hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from bam_ray.errors import ServingError
from bam_ray.families import FAMILIES
from bam_ray.serving.cache import SlotCache

CHUNK_TOKENS = 256
"""Number of tokens of a prompt whose logits exist at the same time. With a large vocabulary, those of a whole prompt
would need more memory than its keys and values."""


class PosteriorEnsemble(nn.Module):
    """The posterior ensemble of causal language models that share one tokenizer.

    `DecodeEngine` uses it like a single model. Its logits are the logarithms of the probabilities of the ensemble.
    """

    def __init__(self, members: Sequence[PreTrainedModel]) -> None:
        """Create the ensemble of `members`, which are on one device. The first one gives the configuration.

        Raises:
            ServingError: The members are not dense models of one supported architecture and vocabulary.
        """
        super().__init__()
        self.members = tuple(members)
        self._submodules = nn.ModuleList(members)  # the same, so that `eval` reaches them
        first = members[0]
        self.config = first.config
        self.generation_config = first.generation_config
        kinds = {(each.config.model_type, _vocabulary(each)) for each in members}
        if len(kinds) > 1 or self.config.model_type not in FAMILIES:
            found = ", ".join(f"{kind} with {tokens} tokens" for kind, tokens in sorted(kinds))
            raise ServingError(
                f"a posterior ensemble cannot be made of {found}: use dense models of one architecture "
                f"({', '.join(FAMILIES)}) and one vocabulary"
            )

    @property
    def device(self) -> torch.device:
        """The device of the members."""
        device: torch.device = self.members[0].device
        return device

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embeddings of the first member, for the size of the vocabulary."""
        embeddings: nn.Module = self.members[0].get_input_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: SlotCache,
        slots: SlotCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 1,
    ) -> CausalLMOutput:
        """Compute the next token after a chunk of one prompt, or of B requests.

        Args:
            input_ids: A chunk [1, L], or the newest token of each request [B, 1].
            position_ids: The positions of the tokens, [1, L] or [B, 1].
            cache: The cache of the engine, from which the members read.
            slots: Has no effect, because it is the same cache.
            use_cache: Has no effect, because the ensemble always uses its cache.
            logits_to_keep: 1: only the logits of the last token; 0: those of all tokens.

        Returns:
            An output whose `logits` are the log-probabilities of the next token, double [B, 1 or L, V].
        """
        del slots, use_cache
        earlier = cache.rows.read()
        scores, last = [], []
        for index, member in enumerate(self.members):
            part = cache.part(index)
            hidden = member.base_model(
                input_ids=input_ids, position_ids=position_ids, cache=part, slots=part, use_cache=True
            ).last_hidden_state
            log_p, following = _score(member, hidden, input_ids[:, 1:], keep_all=not logits_to_keep)
            scores.append(log_p)
            last.append(following)
        predicted = torch.stack(last, dim=1)  # fp32 [B, N, 1 or L, V]
        sums = torch.stack(scores, dim=1).cumsum(2)  # double [B, N, L], after each token
        if earlier is not None:
            sums_before, predicted_before = earlier
            newest = input_ids[:, :1, None].expand(-1, len(self.members), 1)  # [B, N, 1]
            sums = sums + (sums_before.unsqueeze(2) + predicted_before.gather(2, newest))
        cache.rows.write((sums[:, :, -1], predicted[:, :, -1]))
        log_weights = sums[:, :, -predicted.shape[2] :].log_softmax(1)  # [B, N, 1 or L]
        return CausalLMOutput(logits=torch.logsumexp(log_weights.unsqueeze(3) + predicted, dim=1))


def _score(member: PreTrainedModel, hidden: Tensor, targets: Tensor, keep_all: bool) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the `targets` [B, L - 1], and those of all tokens after the last one.

    `hidden` [B, L, d] are the last hidden states. The results are double [B, L], which begins with 0, and fp32
    [B, 1, V], or with `keep_all` [B, L, V], those after each token.
    """
    head, scale = member.get_output_embeddings(), getattr(member.config, "logit_scale", 1.0)
    scores = [hidden.new_zeros(len(hidden), 1, dtype=torch.double)]
    kept: list[Tensor] = []
    for start in range(0, hidden.shape[1], CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        log_p = (head(hidden[:, chunk]) * scale).float().log_softmax(-1)
        target = targets[:, chunk].unsqueeze(-1)
        scores.append(log_p[:, : target.shape[1]].gather(2, target).double().squeeze(2))
        # A view of the last row would keep the whole chunk
        kept = [*kept, log_p] if keep_all else [log_p[:, -1:].clone()]
    return torch.cat(scores, dim=1), torch.cat(kept, dim=1)


def _vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens in the vocabulary of a model."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.num_embeddings
