"""The base class of all settings, and the types that they share."""

from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Blend = dict[Name, NotNegative]
"""Sampling weights over domains. They do not need to sum to 1."""


class Identity(Enum):
    """The role of a setting in the identity of the artifact that is made with it.

    Every setting is part of the identity, unless its field says otherwise:

        recompute: Annotated[bool, Identity.EXCLUDED] = False
    """

    EXCLUDED = "excluded"
    """The setting controls how an artifact is made (speed, memory, placement, checkpoints), but not its content."""


class Strict(BaseModel):
    """Frozen settings that reject unknown keys and numbers that are not finite.

    The docstring below a field is its description in the JSON schema and in the settings reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine an artifact's content, as plain JSON values.

        Fields that are marked `Identity.EXCLUDED` are left out, at every level.
        """
        return {
            name: _plain_identity(value, dumped)
            for (name, value), dumped in zip(self, self.model_dump(mode="json").values(), strict=True)
            if Identity.EXCLUDED not in type(self).model_fields[name].metadata
        }


def _plain_identity(value: Any, dumped: Any) -> Any:
    """Return the identity of nested settings, and any other value as it was dumped."""
    if isinstance(value, Strict):
        return value.identity()
    if isinstance(value, dict):
        return {key: _plain_identity(each, dumped[key]) for key, each in value.items()}
    return dumped
