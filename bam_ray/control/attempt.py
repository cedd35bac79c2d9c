"""One attempt at a task, as a thread that can be polled and asked to stop while it works.

Work that runs inside a method of a Ray actor can be neither observed nor canceled. So the work runs on a separate
thread, and all calls go to the `Attempt`, which returns at once.
"""

import threading
import traceback
from collections.abc import Callable, Iterable

from bam_ray.control.observations import Alive, AttemptStatus, Crashed, Done, Stopped
from bam_ray.control.policies import is_final
from bam_ray.errors import BamError, DigestMismatch, Interrupted, StaleLease, StoreDenied, StoreUnavailable, one_line
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, StageContext

LOG_LINES = 20  # lines of a crashed attempt's traceback and log that are kept


class Attempt:
    """A thread that runs `work(self)`. The work uses the attempt as its `StageContext`.

    Args:
        work: The function to run.
        host: The node that the work runs on.
        log: The latest log lines of the process; they are shown with an error.
    """

    def __init__(self, work: Callable[[StageContext], object], host: Node, log: Iterable[str] = ()) -> None:
        self.host = host
        self._work = work
        self._log = log
        self._thread = threading.Thread(target=self._run, name="attempt", daemon=True)
        self._started = False
        self._stop = threading.Event()
        self._progress: Progress | None = None
        self.signs = 0  # of life: how often the work has reported or asked whether to stop
        self._error: BaseException | None = None

    def start(self) -> None:
        """Start the work."""
        self._started = True
        self._thread.start()

    @property
    def node(self) -> str:
        """The name of the node, for the work."""
        return self.host.name

    def report(self, progress: Progress) -> None:
        """Record progress, for the work."""
        self.signs += 1
        self._progress = progress

    def should_stop(self) -> bool:
        """Return True if the work was asked to stop, for the work."""
        self.signs += 1
        return self._stop.is_set()

    def drain(self) -> None:
        """Ask the work to stop when it next checks `should_stop`."""
        self._stop.set()

    @property
    def busy(self) -> bool:
        """True while the work runs."""
        return self._thread.is_alive()

    def poll(self) -> AttemptStatus:
        """Return the status of the attempt."""
        if not self._started or self._thread.is_alive():
            return Alive(self.host, self._progress, signs=self.signs)
        if self._error is None:
            return Done(self.host, self._progress)
        if isinstance(self._error, Interrupted):
            return Stopped(self.host, self._progress)
        return Crashed(
            error=one_line(self._error),
            node=self.host,
            progress=self._progress,
            log=(*_traceback_lines(self._error), *self._log)[-LOG_LINES:],
            final=is_final(self._error),
            store_fault=isinstance(self._error, StoreUnavailable | StoreDenied),
            stale=isinstance(self._error, StaleLease),
            damaged=self._error.artifact_id if isinstance(self._error, DigestMismatch) else None,
        )

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:  # a thread has no caller: `poll` reports the error
            self._error = error


def _traceback_lines(error: BaseException) -> list[str]:
    """Return the end of an error's traceback; the message of a `BamError` suffices without it."""
    if isinstance(error, BamError):
        return []
    return "".join(traceback.format_exception(error)).rstrip().splitlines()[-LOG_LINES:]
