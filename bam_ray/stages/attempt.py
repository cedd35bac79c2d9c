"""An attempt at a task that is trained: rank 0's lease, and the log that tells how it began and how it ended."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.leases import Lease
from bam_ray.errors import Interrupted
from bam_ray.pipeline.tasks import StageContext
from bam_ray.training.events import Events


@dataclass
class Attempt:
    """What an attempt holds while it lasts."""

    lease: Lease | None  # rank 0's
    events: Events
    step: Callable[[], int] = lambda: 0  # steps done; 0 until a checkpoint to go on from has been read


@contextmanager
def attempting(store: BlobStore, prefix: str, context: StageContext, rank: int) -> Iterator[Attempt]:
    """On rank 0 take the lease of the artifact under `prefix`. From then on the log has the attempt's begin and end."""
    lease = Lease.take(store, prefix) if rank == 0 else None
    number = lease.number if lease else None
    events = Events(store, prefix, number)
    attempt = Attempt(lease, events)
    events.tell("started", attempt=number, node=context.node, host=socket.gethostname(), pid=os.getpid())
    try:
        yield attempt
    except Interrupted:
        events.tell("stopped", step=attempt.step())
        raise
    except Exception as error:
        events.tell("failed", step=attempt.step(), error=f"{type(error).__name__}: {error}")
        raise
    else:
        events.tell("finished", step=attempt.step())
    finally:
        events.close()
