"""The adapters of a run as a source for the server."""

import hashlib
from collections.abc import Mapping

from bam_ray.adapters.run_adapters import FoundAdapter, RunAdapters
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
        return {name: _key(each) for name, each in self._adapters.found.items()}

    def fetch(self, key: AdapterKey) -> AdapterWeights:
        """Return the weights of an adapter. Raises `BamError` if it is gone, has changed or is damaged."""
        found = self._adapters.get(key.name)
        if _key(found) != key:
            raise CheckpointError(f"adapter {key.name} has changed: retry")
        return found.read()


def _key(found: FoundAdapter) -> AdapterKey:
    """Return the key of an adapter. Equal factors with another scale are another adapter."""
    content = f"{found.entry.sha256} {found.index.file.scale!r}"
    return AdapterKey(found.entry.name, hashlib.sha256(content.encode()).hexdigest()[:12])
