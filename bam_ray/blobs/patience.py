"""Patience with a store that does not answer for a moment, for processes that nothing else starts again."""

from collections.abc import Callable
from functools import partial

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from bam_ray.errors import StoreError

PATIENCE = 120.0  # seconds

Report = Callable[[str], object]
"""Receives one line for people."""


def retry_on(error: type[StoreError], report: Report | None = None) -> Retrying:
    """Return a retrying caller that calls a function again for `PATIENCE` seconds while it raises `error`.

    All other errors are raised at once.

    Args:
        error: The error. `StoreBusy` is for the first use of a store, because a wrong endpoint or bucket is an error
            of the user then. `StoreUnavailable` is for a store that has answered before.
        report: Called with one line before each further attempt.
    """
    return Retrying(
        retry=retry_if_exception_type(error),
        stop=stop_after_delay(PATIENCE),
        wait=wait_random_exponential(max=15),
        before_sleep=partial(_report_attempt, report),
        reraise=True,
    )


def _report_attempt(report: Report | None, state: RetryCallState) -> None:
    if report is not None and state.outcome is not None and state.next_action is not None:
        report(f"{state.outcome.exception()}: trying again in {state.next_action.sleep:.0f} s")
