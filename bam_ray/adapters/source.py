"""The protocol of sources of adapters. A source may gain, change and lose adapters while it is used."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from bam_ray.adapters.weights import AdapterWeights


class AdapterKey(NamedTuple):
    """The identity of the weights of an adapter. A changed adapter has the same name and another version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class AdapterSource(Protocol):
    """A set of adapters of one base model. Its methods may block, so they are called on threads.

    Attributes:
        tier: The storage of the source.
    """

    tier: str

    def keys(self) -> Mapping[str, AdapterKey]:
        """Return the present adapters by name. Raises `BamError` if the source cannot be read."""
        ...

    def fetch(self, key: AdapterKey) -> AdapterWeights:
        """Return the weights of an adapter. Raises `BamError` if it is gone, damaged or does not fit the base model."""
        ...
