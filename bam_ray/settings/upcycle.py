"""Settings of upcycling: the mixtures that are made of the seed and its branches."""

from typing import Annotated

from bam_ray.settings.methods import AnyMixture
from bam_ray.settings.quorum import When
from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Identity, Name, Strict


class UpcycleSettings(Strict):
    """The mixtures to make."""

    mixtures: dict[Name, AnyMixture]
    """The mixtures, by name."""
    when: When = "all"
    """The branches that mixing waits for: `all`, or a quorum `{at_least, deadline_hours}`."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of the process that upcycles."""
