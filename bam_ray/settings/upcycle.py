"""Settings of upcycling: the mixtures that are made of the seed and its branches."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from bam_ray.settings.methods import AnyMixture
from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Count, Identity, Name, Positive, Strict


class QuorumSettings(Strict):
    """The number of branches that are enough to start mixing. Later branches are absorbed at the next checkpoint."""

    at_least: Count = 1
    """Number of committed branches that are enough."""
    deadline_hours: Positive | None = None
    """Wait this long for the other branches, counted from the time when the first branch could start. `null` means
    not to wait."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give at_least, deadline_hours or both, or `when: all` to wait for all branches")
        return self


When = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[QuorumSettings, Tag("quorum")],
    # The discriminator makes pydantic report the errors of the form that was meant, not of both
    Discriminator(lambda value: "quorum" if isinstance(value, dict | QuorumSettings) else "all"),
]


class UpcycleSettings(Strict):
    """The mixtures to make."""

    mixtures: dict[Name, AnyMixture]
    """The mixtures, by name."""
    when: When = "all"
    """The branches that mixing waits for: `all`, or a quorum `{at_least, deadline_hours}`."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of the process that upcycles."""
