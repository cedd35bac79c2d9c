"""When mixing starts: with all branches, or with those that have arrived."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from bam_ray.settings.strict import Count, Positive, Strict


class Quorum(Strict):
    """So many branches are enough to start with; those that arrive later are absorbed at the next checkpoint.

    With a deadline mixing waits for the others until then, counted from when the branches could first begin.
    """

    at_least: Count = 1
    deadline_hours: Positive | None = None

    @model_validator(mode="after")
    def _says_when(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give at_least, deadline_hours or both, or `when: all` to wait for all branches")
        return self


When = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[Quorum, Tag("quorum")],
    # So that an error is that of the form which was meant
    Discriminator(lambda value: "quorum" if isinstance(value, dict | Quorum) else "all"),
]
