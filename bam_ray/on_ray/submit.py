"""A run as a Ray job that is submitted from a user's machine and shown there as one live table.

    job_id = submit("recipes/demo.yaml", ["mix.expert_parallel=4"])
    sys.exit(follow(job_id, store))

The working folder is uploaded with the job, without the files that `.gitignore` names. So the nodes need only the
Python environment.
"""

import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import httpx
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console
from rich.live import Live
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from bam_ray.blobs import BlobStore
from bam_ray.control import status
from bam_ray.control.policies import STOP_TIMEOUT
from bam_ray.control.status import Status, TaskRow
from bam_ray.control.status_table import headline, render
from bam_ray.errors import PlacementError, SettingsError, StoreError, one_line, printable
from bam_ray.on_ray.deaths import describe_driver_death
from bam_ray.settings import load_recipe
from bam_ray.terminal import terminal_console

POLL_SECONDS = 1.0  # time between two polls of the job
END_OF_RUN = "-- end of the run --"
"""The line after which a job prints its results."""
TAKE_OVER = "--take-over"
DASHBOARD = "http://127.0.0.1:8265"  # of a local cluster
ANSWER_SECONDS = 20.0  # time that a cluster has to answer the first request
PATIENCE_SECONDS = 60.0  # time without an answer after which a job is followed no longer
LAST_LINES = 5  # of the log of a failed job, shown if it left no status
INTERRUPTED = 130  # the exit code of a stopped job, as a shell gives it after Ctrl-C


def submit(
    recipe: str | Path,
    overrides: list[str],
    entry: str = "jobs/run_all.py",
    address: str | None = None,
    take_over: bool = False,
) -> str:
    """Submit `python ENTRY --recipe RECIPE OVERRIDES...` from the current folder, and return the job's id.

    Args:
        recipe: The path of the recipe.
        overrides: Settings that override those of the recipe.
        entry: The script to run.
        address: The URL of the cluster's dashboard; None stands for `RAY_ADDRESS`.
        take_over: Replace other drivers that work on the same store.

    Raises:
        SettingsError: The recipe is wrong; nothing was sent.
        PlacementError: The cluster does not accept the job.
    """
    settings = load_recipe(recipe, overrides)
    root = Path.cwd()
    path = Path(recipe).absolute()
    if not (root / entry).is_file():
        raise SettingsError(
            f"{root}, which is uploaded with the job, is not the repository of bam_ray (it has no {entry}): run this "
            "command in the root folder of the repository"
        )
    if not path.is_relative_to(root):
        raise SettingsError(f"{path} is not below {root}, which is uploaded with the job: copy the recipe to it")
    if "://" not in settings.store.uri:  # relative to this folder, not to the one that the job is unpacked to
        overrides = [*overrides, f"store.uri={json.dumps(os.path.abspath(os.path.expanduser(settings.store.uri)))}"]
    flags = [TAKE_OVER] if take_over else []
    entrypoint = shlex.join(["python", entry, "--recipe", str(path.relative_to(root)), *flags, *overrides])
    # By default Ray kills a job 3 s after asking it to stop. Running tasks need longer for their last checkpoint.
    stop_timeout = str(int(STOP_TIMEOUT) + 30)
    try:
        job_id: str = client(address).submit_job(
            entrypoint=entrypoint,
            runtime_env={"working_dir": str(root), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": stop_timeout}},
            metadata={"run": settings.name},
        )
    except (RuntimeError, ValueError, OSError) as error:  # refused, too large, or not reachable
        raise PlacementError(f"the cluster did not accept the job: {one_line(error)}") from None
    return job_id


def follow(job_id: str, store: BlobStore, address: str | None = None) -> int:
    """Show a job until it ends, and return its exit code.

    Ctrl-C stops the job cleanly; a second Ctrl-C ends this function and leaves the job alone. On a terminal the output
    is one live table, otherwise one line per change. After that, the job's results are shown as it prints them.

    Raises `PlacementError` if the cluster does not answer for a minute. The job is left alone then.
    """
    jobs = PatientClient(client(address))
    console = terminal_console()
    try:
        with stop_on_interrupt(lambda: jobs.stop_job(job_id)):
            last = _show_status(console, jobs, job_id, store)
            details, has_results = _show_results(console, jobs, job_id)
        if has_results and details.status == JobStatus.FAILED:  # the end of its log has been shown
            return details.driver_exit_code or 1
        return show_end(console, jobs, job_id, details, last)
    except (RuntimeError, OSError) as error:
        raise PlacementError(
            f"the cluster does not answer any more ({one_line(error)}): `bam status {store.uri}` shows whether "
            f"{job_id} goes on"
        ) from None


class PatientClient:
    """A client of a job server that repeats a request for a minute if the server does not answer."""

    def __init__(self, jobs: JobSubmissionClient) -> None:
        self._jobs = jobs
        self._retry = Retrying(
            retry=retry_if_exception_type((RuntimeError, OSError)),
            stop=stop_after_delay(PATIENCE_SECONDS),
            wait=wait_fixed(POLL_SECONDS),
            reraise=True,
        )

    def get_job_info(self, job_id: str) -> JobDetails:
        """Return the state of a job."""
        return self._retry(self._jobs.get_job_info, job_id)

    def get_job_logs(self, job_id: str) -> str:
        """Return the output of a job so far."""
        return str(self._retry(self._jobs.get_job_logs, job_id))

    def stop_job(self, job_id: str) -> None:
        """Ask a job to stop."""
        self._retry(self._jobs.stop_job, job_id)


def _show_status(console: Console, jobs: PatientClient, job_id: str, store: BlobStore) -> Status | None:
    """Show the status until the last run of the job has finished or the job has ended, and return the last status."""
    view: Live | LineOutput
    with Live(console=console, auto_refresh=False) if console.is_terminal else LineOutput(console) as view:
        while True:
            details = jobs.get_job_info(job_id)
            now = last_status(store, details)
            if now:
                view.update(render(now), refresh=True) if isinstance(view, Live) else view.update(now)
            if details.status.is_terminal():
                return now
            # A comparison makes several runs, one after the other
            if now and now.state == "finished" and END_OF_RUN in jobs.get_job_logs(job_id):
                return now
            time.sleep(POLL_SECONDS)


def _show_results(console: Console, jobs: PatientClient, job_id: str) -> tuple[JobDetails, bool]:
    """Show what the job prints after `END_OF_RUN`; returns the job when it has ended, and True if there was output."""
    shown = 0
    while True:
        # In this order: the log of a job that has ended is complete
        details = jobs.get_job_info(job_id)
        results = jobs.get_job_logs(job_id).partition(END_OF_RUN)[2].lstrip("\n")
        console.file.write(printable(results[shown:]))
        console.file.flush()
        shown = len(results)
        if details.status.is_terminal():
            return details, shown > 0
        time.sleep(POLL_SECONDS)


def show_end(
    console: Console, jobs: PatientClient | JobSubmissionClient, job_id: str, details: JobDetails, last: Status | None
) -> int:
    """Print how a job ended, and return the exit code for it."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        console.print(f"{job_id} was stopped: submit it again to resume", soft_wrap=True)
        return INTERRUPTED
    killed = describe_driver_death(details.message or "")
    if killed:
        console.print(f"{job_id}: {killed}", soft_wrap=True)
    elif last is None or last.state != "failed":  # it failed outside of its tasks, so the end of its log says why
        for line in jobs.get_job_logs(job_id).strip().splitlines()[-LAST_LINES:] or [details.message or ""]:
            console.print(line, soft_wrap=True)
    return details.driver_exit_code or 1


def client(address: str | None = None) -> JobSubmissionClient:
    """Return a client of the cluster's job server; raises `PlacementError` if it does not answer."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise PlacementError(f"no cluster is given: set RAY_ADDRESS to its dashboard, such as {DASHBOARD}")
    _check_url(address)
    for logger in ("ray._private.runtime_env", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(logger).setLevel(logging.ERROR)  # they log a line for every file that is not uploaded
    try:
        httpx.get(f"{address.rstrip('/')}/api/version", timeout=ANSWER_SECONDS)  # Ray's client waits without a limit
        return JobSubmissionClient(address)
    except (ConnectionError, httpx.HTTPError, httpx.InvalidURL):
        raise PlacementError(f"no Ray cluster answers at {address}: start it or correct RAY_ADDRESS") from None
    except AuthenticationError:
        raise PlacementError(
            f"the cluster at {address} refuses this shell's token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to "
            "the file of the cluster's token (`. .bam/env` does this for the local cluster)"
        ) from None
    except (RuntimeError, ValueError, LookupError, OSError) as error:  # another server, or one that answers an error
        raise PlacementError(
            f"{address} does not answer as the dashboard of a Ray cluster ({one_line(error)}): correct RAY_ADDRESS"
        ) from None


def _check_url(address: str) -> None:
    """Raise `PlacementError` if an address is not the URL of an HTTP server."""
    try:
        url = urlsplit(address)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and address.isprintable()
    except ValueError:  # the port is not a number, or the brackets of an IPv6 address do not match
        valid = False
    if not valid:
        raise PlacementError(
            f"RAY_ADDRESS is {address!r}, which is not the URL of a dashboard: set it to one such as {DASHBOARD} (the "
            "ports of Ray itself and of Ray Client do not take jobs)"
        )


def last_status(store: BlobStore, details: JobDetails) -> Status | None:
    """Return the status of the run; None if it was not written since the job started."""
    try:
        now = status.read(store)
    except StoreError:
        return None  # if this matters, the job itself reports it
    started = datetime.fromtimestamp((details.start_time or 0) / 1000, UTC)
    return now if now and now.updated >= started else None


class LineOutput:
    """The output if it is not a terminal: one line for every change of a task's state."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._states: dict[str, str] = {}  # the last printed state by task id; "" stands for the run

    def __enter__(self) -> "LineOutput":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, now: Status) -> None:
        """Print the changes since the last call."""
        for row in now.rows:
            if row.state != self._states.get(row.id, "waiting"):
                self._states[row.id] = row.state
                self._print(line(row))
        if now.state != "running" and self._states.get("") != now.state:
            self._states[""] = now.state
            self._print(headline(now))

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def line(row: TaskRow) -> str:
    """Return the state of one task as one line."""
    parts = [f"{row.kind}/{row.name} {row.state}"]
    if row.node:
        parts.append(f"on {row.node}")
    if row.step:
        parts.append(f"step {row.step}/{row.total_steps}")
    if row.loss is not None:
        parts.append(f"loss {row.loss:.3f}")
    return " ".join(parts) + (f": {row.error or row.note}" if row.error or row.note else "")


@contextmanager
def stop_on_interrupt(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` at the first Ctrl-C inside the block; the second one interrupts as usual."""
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        print("stopping: running tasks write their checkpoints", file=sys.stderr)
        threading.Thread(target=stop, daemon=True).start()  # HTTP requests must not run inside a signal handler

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
