"""Scores of how well routers separate the tokens of the domains, as data and as a table."""

from typing import Literal

from pydantic import FiniteFloat
from rich.table import Table

from bam_ray.settings import Strict

Initialization = Literal["random", "means", "ridge"]
RouterKind = Literal["attention", "ffn", "embedding", "head"]
INITIALIZATIONS: tuple[Initialization, ...] = ("random", "means", "ridge")


class RouterScore(Strict):
    """The scores of one router on held-out tokens: means over the tokens of each domain, then over domains.

    The right experts of a token are the expert of its domain and copies of it. Their probabilities are added.
    """

    accuracy: FiniteFloat
    """Fraction of the tokens whose most probable expert is right."""
    probability: FiniteFloat
    """Probability of the right experts."""
    cross_entropy: FiniteFloat
    """Negative log probability of the right experts, in nats."""


class RouterSeparation(Strict):
    """One router of the mixture, scored with every initialization on the same inputs."""

    layer: int | None
    """None for the routers of embedding experts."""
    kind: RouterKind
    scores: dict[Initialization, RouterScore]


class Separation(Strict):
    """The scores of all routers of a mixture, layer by layer."""

    how: Initialization
    """The initialization that the mixture has. It also determines the inputs on which all are scored."""
    domains: tuple[str, ...]
    fit_tokens: int
    held_out_tokens: int
    chance: RouterScore
    """The scores of a router for which all experts are equally probable."""
    routers: tuple[RouterSeparation, ...]

    def to_json(self) -> str:
        """Return JSON, which `Separation.model_validate_json` reads."""
        return self.model_dump_json(indent=1)


def separation_table(separation: Separation) -> Table:
    """Return a table of routers × initializations with accuracy and cross-entropy, less than 80 columns wide."""
    table = Table(
        title="Held-out tokens routed to the right expert",
        caption=f"accuracy, cross-entropy (nats)\nchance: {_cell(separation.chance)}",
    )
    table.add_column("layer", justify="right")
    table.add_column("router")
    for initialization in INITIALIZATIONS:
        chosen = initialization == separation.how
        table.add_column(f"{initialization} *" if chosen else initialization, justify="right")
    for index, router in enumerate(separation.routers):
        following = separation.routers[index + 1 : index + 2]
        table.add_row(
            "" if router.layer is None else str(router.layer),
            router.kind,
            *(_cell(router.scores[initialization]) for initialization in INITIALIZATIONS),
            end_section=any(other.layer != router.layer for other in following),
        )
    return table


def _cell(score: RouterScore) -> str:
    return f"{score.accuracy:.0%} {score.cross_entropy:.2f}"
