"""The process in which `benchmarks.on_gpu` runs its checks.

This module imports torch only in that process, so that nothing of CUDA is started in the process that waits for it.
"""

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, float | str]
"""The measurements of a check, by name."""


@dataclass(frozen=True)
class Setup:
    """The device of all checks, and the size of their models."""

    device: str
    tiny: bool  # models that a CPU computes in seconds


class CheckFailed(Exception):
    """A check did not find what it expects; the message is one line. `figures` are what it has measured."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


class NotOnThisDevice(Exception):
    """A check needs another device; the message is one line."""


@dataclass(frozen=True)
class Check:
    """One check: the function `NAME(setup)` of a module."""

    name: str
    module: str
    seconds: float  # its limit
    judges: bool = True  # False: it only measures

    def run(self, setup: Setup) -> Figures:
        """Run the check in this process."""
        function: Callable[[Setup], Figures] = getattr(importlib.import_module(self.module), self.name)
        return function(setup)


class Worker:
    """A process that runs checks, one after the other."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, setup))
        self._process.start()
        theirs.close()  # so that the end of the process ends `receive`

    def receive(self, seconds: float) -> Any:
        """Return the next message of the process.

        Raises:
            CheckFailed: There is none within `seconds`, or the process has ended.
        """
        if not self._pipe.poll(max(0.0, seconds)):
            raise CheckFailed(f"no answer within {seconds:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise CheckFailed(f"the process ended with code {self._process.exitcode}") from None

    def send(self, check: Check) -> None:
        """Let the process run a check, and send its `Outcome` without the time."""
        self._pipe.send(check)

    def stop(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()


def serve(pipe: Any, setup: Setup) -> None:
    """Send the description of the machine, or the reason why no check can run, and then the outcomes of checks."""
    if setup.device == "cuda":  # before torch reads it: as GPU workers have it
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        from benchmarks.gpu_checks import reset  # and all libraries, before the time of the first check begins
        from benchmarks.measure import hardware
    except ImportError as error:
        pipe.send(f"{one_line(error)}: install the packages that --list-wheels prints")
        return
    machine = hardware()
    if setup.device == "cuda" and machine["accelerator"] == "none":
        pipe.send("torch finds no GPU: use --device cpu --tiny, or a torch that fits the driver")
        return
    pipe.send(machine)
    while True:
        try:
            check = pipe.recv()
        except EOFError:
            return
        pipe.send(outcome(check, setup))
        reset()


def outcome(check: Check, setup: Setup) -> tuple[str, str, Figures]:
    """Run a check and return its outcome, the reason and its figures."""
    try:
        figures = check.run(setup)
    except NotOnThisDevice as reason:
        return "SKIPPED", one_line(reason), {}
    except CheckFailed as failure:
        return "FAIL", one_line(failure), failure.figures
    except Exception as error:
        traceback.print_exc()
        return "FAIL", f"{type(error).__name__}: {one_line(error)}", {}
    return ("PASS" if check.judges else "MEASURED"), "", figures


def one_line(error: Exception) -> str:
    """Return the first line of a message that has text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]
