"""A run as a Ray job, submitted from one's own machine and followed there as one live table.

    job_id = submit("recipes/demo.yaml", ["mix.expert_parallel=4"])
    sys.exit(follow(job_id, store))

The working folder travels with the job (without what `.gitignore` names), so nodes need only the Python environment.
"""

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

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console
from rich.live import Live

from bam_ray.blobs import BlobStore
from bam_ray.control import status
from bam_ray.control.controller import DRAIN_PATIENCE
from bam_ray.control.status import Row, Status
from bam_ray.control.status_table import headline, render
from bam_ray.errors import PlacementError, SettingsError, StoreUnavailable, one_line
from bam_ray.settings import load_recipe

LOOK_EVERY = 1.0  # seconds
ENDING = "-- end of the run --"
"""The line after which a job prints what a person waited for."""
LAST_LINES = 5  # of a failed job's log, where it left no status
INTERRUPTED = 130  # the exit code of a stopped job, as a shell gives it after Ctrl-C


def submit(recipe: str | Path, overrides: list[str], entry: str = "jobs/run_all.py", address: str | None = None) -> str:
    """Submit `python ENTRY --recipe RECIPE OVERRIDES...` from the current folder; returns the job's id.

    `address` is the cluster's dashboard (None: `RAY_ADDRESS`). Raises `SettingsError` where the recipe is wrong, before
    anything is sent.
    """
    settings = load_recipe(recipe, overrides)
    root = Path.cwd()
    path = Path(recipe).absolute()
    for needed in (path, root / entry):
        if not (needed.is_file() and needed.is_relative_to(root)):
            raise SettingsError(f"{needed} is not below {root}, which is what travels with the job: run this there")
    if "://" not in settings.store.uri:  # relative to here, not to wherever the job is unpacked
        overrides = [*overrides, f"store.uri={Path(settings.store.uri).expanduser().absolute()}"]
    entrypoint = shlex.join(["python", entry, "--recipe", str(path.relative_to(root)), *overrides])
    # Ray kills a job 3 s after it asked it to stop: running tasks need longer for their last checkpoint
    patience = str(int(DRAIN_PATIENCE) + 30)
    try:
        job_id: str = client(address).submit_job(
            entrypoint=entrypoint,
            runtime_env={"working_dir": str(root), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": patience}},
            metadata={"run": settings.name},
        )
    except RuntimeError as error:  # all that Ray's client says of a server that answers, but not well
        raise PlacementError(f"the cluster did not take the job: {one_line(error)}") from None
    return job_id


def follow(job_id: str, store: BlobStore, address: str | None = None) -> int:
    """Show a job until it ends; returns its exit code. Ctrl-C stops it cleanly, a second one leaves it alone.

    On a terminal it is one live table, otherwise a line for every change; then what the job prints at its end, as it
    comes.
    """
    jobs = client(address)
    console = Console()
    with stop_on_interrupt(lambda: jobs.stop_job(job_id)):
        show: Live | Lines
        with Live(console=console, auto_refresh=False) if console.is_terminal else Lines(console) as show:
            while True:
                details = jobs.get_job_info(job_id)
                now = last_status(store, details)
                if now:
                    show.update(render(now), refresh=True) if isinstance(show, Live) else show.tell(now)
                if details.status.is_terminal() or (now and now.state == "finished"):
                    break
                time.sleep(LOOK_EVERY)
        told = 0
        while True:
            details = jobs.get_job_info(job_id)  # before the log: a job that has ended has printed all
            ending = jobs.get_job_logs(job_id).partition(ENDING)[2].lstrip("\n")
            console.file.write(ending[told:])
            console.file.flush()
            told = len(ending)
            if details.status.is_terminal():
                break
            time.sleep(LOOK_EVERY)
    if told and details.status == JobStatus.FAILED:  # its last words have been shown
        return details.driver_exit_code or 1
    return tell_end(console, jobs, job_id, details, now)


def tell_end(console: Console, jobs: JobSubmissionClient, job_id: str, details: JobDetails, last: Status | None) -> int:
    """Say how a job ended; returns the exit code for it."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        console.print(f"{job_id} was stopped: submit it again to go on", highlight=False, soft_wrap=True)
        return INTERRUPTED
    if last is None or last.state != "failed":  # it ended before or outside of its tasks: its last words say why
        for line in jobs.get_job_logs(job_id).strip().splitlines()[-LAST_LINES:] or [details.message or ""]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return details.driver_exit_code or 1


def client(address: str | None = None) -> JobSubmissionClient:
    """A client of the cluster's job server; raises `PlacementError` where none answers."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise PlacementError("no cluster is named: set RAY_ADDRESS to its dashboard, such as http://127.0.0.1:8265")
    for chatty in ("ray._private.runtime_env", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(chatty).setLevel(logging.ERROR)  # a line for every file that does not travel
    try:
        return JobSubmissionClient(address)
    except ConnectionError:
        raise PlacementError(f"no Ray cluster answers at {address}: start it or mend RAY_ADDRESS") from None
    except AuthenticationError:
        raise PlacementError(
            f"the cluster at {address} refuses this shell's token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to "
            "the file with the cluster's (`. .bam/env` does, for the local cluster)"
        ) from None


def last_status(store: BlobStore, details: JobDetails) -> Status | None:
    """The run's status, if it was written since the job began."""
    try:
        now = status.read(store)
    except StoreUnavailable:
        return None  # the job says so itself, if it matters
    began = datetime.fromtimestamp((details.start_time or 0) / 1000, UTC)
    return now if now and now.updated >= began else None


class Lines:
    """For output that is no terminal: a line for every task that changed its state."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, str] = {}

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def tell(self, now: Status) -> None:
        for row in now.rows:
            if row.state != self._told.get(row.id, "waiting"):
                self._told[row.id] = row.state
                self._say(line(row))
        if now.state != "running" and self._told.get("") != now.state:
            self._told[""] = now.state
            self._say(headline(now))

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def line(row: Row) -> str:
    """One task in one line."""
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
    """Ctrl-C calls `stop`; the second one has its usual effect again."""
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        print("stopping: running tasks write their checkpoints", file=sys.stderr)
        threading.Thread(target=stop, daemon=True).start()  # a request must not run inside a signal handler

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
