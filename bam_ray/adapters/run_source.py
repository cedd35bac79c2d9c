"""The adapters of a run as a source for the server."""

from collections.abc import Mapping

from bam_ray.adapters.run_adapters import RunAdapters
from bam_ray.adapters.source import AdapterKey
from bam_ray.adapters.weights import AdapterWeights
from bam_ray.errors import CheckpointError


class RunSource:
    """The adapters that a run has trained, or that were imported for its seed.

    Args:
        adapters: The adapters of the run.
    """

    tier = "store"

    def __init__(self, adapters: RunAdapters) -> None:
        self._adapters = adapters

    def keys(self) -> Mapping[str, AdapterKey]:
        """Return the committed adapters by name. Raises `BamError` if the store cannot be read."""
        self._adapters.refresh()
        return {name: _key(name, each.entry.sha256) for name, each in self._adapters.found.items()}

    def fetch(self, key: AdapterKey) -> AdapterWeights:
        """Return the weights of an adapter. Raises `BamError` if it is gone, has changed or is damaged."""
        found = self._adapters.get(key.name)
        if _key(key.name, found.entry.sha256) != key:
            raise CheckpointError(f"adapter {key.name} has changed: retry")
        return found.read()


def _key(name: str, sha256: str) -> AdapterKey:
    return AdapterKey(name, sha256[:12])
