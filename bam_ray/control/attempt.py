"""One attempt at a task, as a thread that can be looked at and asked to stop while it works.

Work that runs inside a method of a Ray actor can be neither seen nor cancelled, so work goes on a thread of its own and
everything else asks the `Attempt`, which answers at once.
"""

import threading
import traceback
from collections.abc import Callable, Iterable

from bam_ray.control.observations import Alive, Broke, Done, Sighting, Stopped
from bam_ray.control.policies import is_final
from bam_ray.errors import BamError, Interrupted, StoreUnavailable, one_line
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, StageContext

LOG_LINES = 20


class Attempt:
    """Runs `work(self)` on a thread; a `StageContext` to the work, a mailbox to everyone else."""

    def __init__(self, work: Callable[[StageContext], object], where: Node, log: Iterable[str] = ()) -> None:
        self.where = where
        self._work = work
        self._log = log  # what the process has logged lately, to be shown with an error
        self._thread = threading.Thread(target=self._run, name="attempt", daemon=True)
        self._started = False
        self._stop = threading.Event()
        self._progress: Progress | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._started = True
        self._thread.start()

    @property
    def node(self) -> str:
        """Of `StageContext`."""
        return self.where.name

    def report(self, progress: Progress) -> None:
        """Of `StageContext`."""
        self._progress = progress

    def should_stop(self) -> bool:
        """Of `StageContext`."""
        return self._stop.is_set()

    def drain(self) -> None:
        """Ask the work to stop at its next chance."""
        self._stop.set()

    @property
    def busy(self) -> bool:
        """Whether the work goes on."""
        return self._thread.is_alive()

    def look(self) -> Sighting:
        """How it stands."""
        if not self._started or self._thread.is_alive():
            return Alive(self.where, self._progress)
        if self._error is None:
            return Done(self.where, self._progress)
        if isinstance(self._error, Interrupted):
            return Stopped(self.where, self._progress)
        return Broke(
            error=one_line(self._error),
            node=self.where,
            progress=self._progress,
            log=(*_lines(self._error), *self._log)[-LOG_LINES:],
            final=is_final(self._error),
            store_fault=isinstance(self._error, StoreUnavailable),
        )

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:  # a thread has no caller: what ended it is kept for `look`
            self._error = error


def _lines(error: BaseException) -> list[str]:
    """The end of an error's traceback; errors of ours explain themselves."""
    if isinstance(error, BamError):
        return []
    return "".join(traceback.format_exception(error)).rstrip().splitlines()[-LOG_LINES:]
