"""Settings of the adapters that an endpoint serves."""

from typing import Annotated, Literal

from pydantic import Field

from bam_ray.settings.strict import Count, NotNegative, Strict


class ServeAdapterSettings(Strict):
    """The adapters of an endpoint with `serve.mode` `adapters`."""

    source: str | None = None
    """Folder that has one folder in peft's format for each adapter, whose name is that of its folder. It must be on all
    nodes. `null` means the adapters of the run (`adapters`), and those that were imported for its seed. Adapters that
    are added or removed are found without a restart."""
    topics: str | None = None
    """Folder with topics whose names are those of adapters (see [Topics](moin.md)). The model `auto` then chooses the
    adapter of each request. `null` means the topics of the run if `source` is `null`, and otherwise that requests name
    their adapter."""
    slots: Count = 16
    """Number of adapters that requests can use at the same time. Each takes the memory of an adapter of `max_rank`."""
    max_rank: Count = 16
    """Largest rank of an adapter."""
    host_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    """Size of the adapters that a replica keeps in host memory, in bytes. At least one is kept."""
    max_wait_seconds: NotNegative = 2.0
    """Time after which a request that waits for an adapter slot is served before later requests."""
    on_unavailable: Literal["base", "wait", "error"] = "error"
    """The response if an adapter cannot be loaded: an error with status 503 (`error`), the same after repeated attempts
    for 30 seconds (`wait`), or for requests that do not name the adapter, the response of the base model (`base`)."""
