"""How well routers tell the domains' tokens apart, as data and as a table."""

from typing import Literal

from pydantic import FiniteFloat
from rich.table import Table

from bam_ray.settings import Strict

Initialisation = Literal["random", "means", "ridge"]
RouterKind = Literal["attention", "ffn"]
INITIALISATIONS: tuple[Initialisation, ...] = ("random", "means", "ridge")


class RouterScore(Strict):
    """One router on held-out tokens; means over each domain's tokens, then over domains.

    A token is right with the expert of its domain or a copy of that expert, whose probabilities count together.
    """

    accuracy: FiniteFloat  # share of the tokens whose most probable expert is right
    probability: FiniteFloat  # on the right expert
    cross_entropy: FiniteFloat  # -log probability of the right expert, nats


class RouterSeparation(Strict):
    """One router of the mixture, scored under every initialisation on the same inputs."""

    layer: int
    kind: RouterKind
    scores: dict[Initialisation, RouterScore]


class Separation(Strict):
    """All routers of a mixture, layer by layer. `how` made the routers whose outputs the layers behind them saw."""

    how: Initialisation
    domains: tuple[str, ...]
    fit_tokens: int
    held_out_tokens: int
    chance: RouterScore  # of a router that finds all experts equally probable
    routers: tuple[RouterSeparation, ...]

    def to_json(self) -> str:
        """As JSON, which `Separation.model_validate_json` reads back."""
        return self.model_dump_json(indent=1)


def separation_table(separation: Separation) -> Table:
    """Routers × initialisations; a cell has the accuracy and the cross-entropy. Below 80 columns wide."""
    table = Table(
        title="Held-out tokens on the right expert",
        caption=f"accuracy, cross-entropy (nats)\nchance: {_cell(separation.chance)}",
    )
    table.add_column("layer", justify="right")
    table.add_column("router")
    for initialisation in INITIALISATIONS:
        chosen = initialisation == separation.how
        table.add_column(f"{initialisation} *" if chosen else initialisation, justify="right")
    for index, router in enumerate(separation.routers):
        following = separation.routers[index + 1 : index + 2]
        table.add_row(
            str(router.layer),
            router.kind,
            *(_cell(router.scores[initialisation]) for initialisation in INITIALISATIONS),
            end_section=any(other.layer != router.layer for other in following),
        )
    return table


def _cell(score: RouterScore) -> str:
    return f"{score.accuracy:.0%} {score.cross_entropy:.2f}"
