"""Sequences that change their domain: what a mixture loses until its routers follow, without and with forgetting.

    bam run recipes/compare-small.yaml store.uri=STORE seed.training.tokens=3000000
    python -m benchmarks.domain_change STORE/upcycled/bam-*/files/* STORE/corpora/*/files/*

A mixed sequence is half a held-out text of one domain and half a text of another, for each ordered pair of domains, as
one document. Its loss is the NLL of the second half, minus that of the same model with routers that are reset at the
change. The attention is not reset. Pure sequences are whole held-out texts. The mixture was trained with its own
setting of `router.forgetting`, and the others are set afterwards.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer

from bam_ray.data import Corpus
from bam_ray.model import BamForCausalLM
from bam_ray.training.next_token import NextTokenLoss
from benchmarks.measure import report

FORGETTING = (1.0, 0.99, 0.98, 0.95, 0.9)
SEQUENCES = 8  # of each domain, and of each pair of domains


class Routing:
    """The routing contexts of a model. Their priors are recorded, and they can be reset within a sequence."""

    def __init__(self, model: BamForCausalLM) -> None:
        self._original: Callable[..., Any] = model.model.routing_context
        self.restart: int | None = None
        self.prior: Tensor  # of the last forward pass, [B, L, N]
        model.model.routing_context = self.context  # type: ignore[assignment]

    def context(self, input_ids: Tensor, given: Tensor, positions: Tensor, *others: Any) -> Any:
        """Return the context of the model, as if positions restarted at `restart`."""
        routing = self._original(input_ids, given, positions % (self.restart or given.shape[1]), *others)
        self.prior = routing.prior
        return routing


class Experiment:
    """A mixture and the held-out text of its experts' domains."""

    def __init__(self, mixture: Path, corpus: Corpus) -> None:
        self.model = BamForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
        self.routing = Routing(self.model)
        self.loss = NextTokenLoss(self.model)
        end_of_text = AutoTokenizer.from_pretrained(corpus.tokenizer_folder).eos_token_id
        texts = {}
        for name in self.model.config.expert_names:
            rows = np.asarray(corpus.held_out(name)).astype(np.int64)
            texts[name] = torch.from_numpy(rows[(rows != end_of_text).all(1)][: 2 * SEQUENCES])
        self.half = next(iter(texts.values())).shape[1] // 2
        self.pure = {place: rows[:SEQUENCES] for place, rows in enumerate(texts.values()) if len(rows)}
        self.mixed = [
            (second, torch.cat([one[:count, : self.half], other[-count:, self.half :]], dim=1))
            for (first, one), (second, other) in itertools.permutations(enumerate(texts.values()), 2)
            if (count := min(len(one), len(other)) // 2)
        ]

    @torch.no_grad()
    def run(self, sequences: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """Return the NLL of each token [S, L - 1], and True if the prior prefers `expert` after a token [S, L]."""
        nll, _ = self.loss.token_nll(sequences)
        return nll, self.routing.prior.argmax(-1) == expert

    def second_halves(self, forgetting: float, restart: bool = False) -> tuple[Tensor, Tensor]:
        """Return the mean NLL of each token of the second halves, and the tokens until the prior prefers their expert.

        They are [L / 2], and [sequences] with L / 2 + 1 if the prior never does.
        """
        self.model.config.router_forgetting = forgetting
        self.routing.restart = self.half if restart else None
        losses, tokens = [], []
        for expert, sequences in self.mixed:
            nll, right = self.run(sequences, expert)
            losses.append(nll[:, self.half - 1 :])
            right = right[:, self.half :]
            tokens.append(torch.where(right.any(1), right.int().argmax(1) + 1, self.half + 1))
        self.routing.restart = None
        return torch.cat(losses).mean(0), torch.cat(tokens).double()

    def pure_texts(self, forgetting: float) -> tuple[float, float]:
        """Return the mean over domains of the NLL, and of the share of tokens after which the prior is right."""
        self.model.config.router_forgetting = forgetting
        found = [self.run(sequences, expert) for expert, sequences in self.pure.items()]
        means = [(nll.mean().item(), right.double().mean().item()) for nll, right in found]
        return float(np.mean([nll for nll, _ in means])), float(np.mean([right for _, right in means]))


def main(
    mixture: Annotated[Path, typer.Argument(help="The folder of a mixture with a bigram prior.")],
    corpus: Annotated[Path, typer.Argument(help="The folder of the corpus of its domains.")],
) -> None:
    """Measure, print a table and write `benchmarks/results/domain_change.json`."""
    torch.set_num_threads(1)
    experiment = Experiment(mixture, Corpus(corpus))
    reference, _ = experiment.second_halves(1.0, restart=True)
    rows: list[list[str | float]] = []
    for forgetting in FORGETTING:
        nll, tokens = experiment.second_halves(forgetting)
        lost = nll - reference
        pure, right = experiment.pure_texts(forgetting)
        rows.append(
            [
                str(forgetting),
                lost.mean().item(),
                lost[:32].mean().item(),
                lost[-32:].mean().item(),
                tokens.median().item(),
                tokens.quantile(0.9).item(),
                pure,
                right,
            ]
        )
    columns = (
        "forgetting",
        "NLL lost in the second half",
        "first 32 tokens",
        "last 32 tokens",
        "tokens until the prior turns, median",
        "90th percentile",
        "NLL of pure texts",
        "prior right on pure texts",
    )
    report("domain_change", columns, rows)


if __name__ == "__main__":
    typer.run(main)
