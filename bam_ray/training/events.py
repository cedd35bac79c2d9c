"""The event log of one attempt at a task, in the blob store: what a person wants to know the next morning.

<kind>/<id>/events/<attempt>.jsonl   one line an event: {"time": UTC, "event": name, ...facts}

    started      attempt, node, host, pid             it has the lease
    resumed      step                                 it goes on from there; 0: the start
    computing    step, device, precision, micro_batch, processes from this step on
    micro_batch  step, sequences, before              halved, because memory ran out
    blend        step, weights, held_out, reference   of a dynamic blend, by domain
    absorbed     step, branch                         arrived late, and is an expert from here on
    left_out     step, branch, error                  arrived late, and is damaged or does not fit
    shared       experts, processes, wanted           fewer processes than wanted divide the experts
    experts      step, dead, overloaded               of a mixture, where these are others than before
    checkpoint   step                                 committed
    refused      checkpoint, error                    damaged, and passed over
    rolled_back  step, to, error                      the loss was not finite, or spiked
    skipped      step, error                          the loss spiked, and its batch was left out
    stopped      step                                 as it was asked to
    finished     step
    failed       step, error                          step 0 also where it had not come to a checkpoint

An attempt is the only writer of its log, so the whole of it is put each time. The log never holds up training and
never fails it: what could not be written goes with the next event.
"""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from bam_ray.blobs import BlobStore
from bam_ray.errors import StoreError


class Events:
    """The log of attempt `attempt` at the artifact under `prefix`; of no attempt (ranks above 0): written nowhere."""

    def __init__(self, store: BlobStore, prefix: str, attempt: int | None) -> None:
        self._store = store
        self._key = None if attempt is None else f"{prefix}/events/{attempt:04d}.jsonl"
        self._lines: list[str] = []
        self._put_lines = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="events")

    def tell(self, what: str, **facts: Any) -> None:
        """Add an event; returns at once."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": what, **facts}
        with self._lock:
            self._lines.append(json.dumps(line))
        if self._key is not None:
            self._pool.submit(self._put, self._key)

    def close(self) -> None:
        """Wait for the last put."""
        self._pool.shutdown(wait=True)

    def _put(self, key: str) -> None:
        with self._lock:
            lines = len(self._lines)
            data = "\n".join(self._lines) + "\n"
        if lines == self._put_lines:  # a slow store has been told of this event with one before
            return
        with contextlib.suppress(StoreError):  # a log is not worth a run
            self._store.put(key, data.encode())
        self._put_lines = lines
