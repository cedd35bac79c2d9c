"""Processes that die of memory: the reason in one line, and the order in which the kernel kills them.

Ray's memory monitor and the kernel end processes when the memory of a machine runs out. Ray reports the first as
`OutOfMemoryError`, which is no `RayActorError`, with fifty lines of figures. It reports the second as a process that
died without an error.

The driver of a job should be the last process to be killed, because it continues everything else. It is a child of
Ray's job supervisor, an actor like any other, and inherits the score that makes the kernel prefer workers.
"""

import contextlib
import re
from pathlib import Path

import psutil
from ray.exceptions import OutOfMemoryError

from bam_ray.errors import TrainingError
from bam_ray.pipeline.tasks import Task

NODE_USAGE = re.compile(
    r"Memory on the node \(IP: (?P<address>[^,]+),.+?\) was (?P<used>[\d.]+GB) used / (?P<total>[\d.]+GB) limit"
)
PROCESS_USAGE = re.compile(r"^(?P<pid>\d+)\t(?P<used>[\d.]+)\t(?P<command>ray::.+)$", re.MULTILINE)
KILLED_FOR_MEMORY = "killed due to the node running low on memory"  # Ray's words
MAYBE_KILLED_FOR_MEMORY = "killed by the OOM killer"  # Ray's words about a process that left no error
DRIVER_KILLED = ("supervisor actor died", "exit code -9", "exit code 137")  # a signal, or the loss of its parent
SUPERVISOR = "ray::JobSupervisor"


def is_out_of_memory_death(error: BaseException) -> bool:
    """Return True if Ray's memory monitor killed a process and this is the error that Ray made of it."""
    return isinstance(error, OutOfMemoryError) or KILLED_FOR_MEMORY in str(error)


def describe_memory(error: object) -> str:
    """Return the memory of the node and its largest process from the message of Ray's memory monitor."""
    text = str(error)
    node = NODE_USAGE.search(text)
    facts = [f"{node['used']} of {node['total']} in use"] if node else []
    largest = PROCESS_USAGE.search(text)
    if largest:
        facts.append(f"largest worker {largest['command'].strip()} with {largest['used']}GB")
    return f" ({', '.join(facts)})" if facts else ""


def memory_advice(task: Task) -> str:
    """Return what a user can change if memory ended a process of `task`."""
    now = f", now {task.needs.memory_gib:g} GiB" if task.needs.memory_gib else ""
    change = [f"a larger memory_gib in {task.kind.setting}{now}"] if task.kind.setting != "the recipe" else []
    if task.kind.trains:
        change.append("a smaller micro_batch_sequences")
    return f"use {', '.join([*change, 'fewer tasks at once on this machine'])} or a node with more memory"


def describe_death(error: BaseException, task: Task, node: str | None = None) -> str:
    """Return in one line why a process of `task` died on `node`; None stands for the node that Ray names."""
    known = NODE_USAGE.search(str(error))
    where = f"node {node}" if node else f"node {known['address']}" if known else "its node"
    if is_out_of_memory_death(error):
        return f"memory ran out on {where}{describe_memory(error)}, so Ray killed this process: {memory_advice(task)}"
    if MAYBE_KILLED_FOR_MEMORY in str(error):
        return (
            f"its process was killed or crashed without an error; if memory ran out on {where}: {memory_advice(task)}"
        )
    return f"its process died: {_reason(error)}"


def with_memory_cause(error: BaseException, task: Task) -> BaseException:
    """Return the error of a rank of `task`, in one line if Ray's memory monitor killed the rank."""
    return TrainingError(describe_death(error, task)) if is_out_of_memory_death(error) else error


def describe_driver_death(message: str) -> str | None:
    """Return in one line why the driver of a job was killed, from the job's message; None if it ended by itself."""
    ended = message.partition(", last available logs")[0]  # what follows is the driver's own output
    if KILLED_FOR_MEMORY in ended:
        return (
            f"memory ran out on the node of the run's driver{describe_memory(message)}, so Ray killed the driver: "
            "submit the run again to continue it, with fewer tasks at once or a larger memory_gib in their needs"
        )
    if any(sign in ended for sign in DRIVER_KILLED):
        return (
            "the run's driver was killed, most often because memory ran out on its node: submit the run again to "
            "continue it"
        )
    return None


def protect_driver() -> None:
    """Make the kernel kill this process and the job supervisor above it after all workers of Ray.

    Ray raises the score of its workers. The driver of a job inherits it from the supervisor, and ends with it.
    Does nothing if the score cannot be changed.
    """
    process = psutil.Process()
    parents = process.parents()
    supervisor = next((number for number, each in enumerate(parents) if _is_supervisor(each)), -1)
    for each in (process, *parents[: supervisor + 1]):
        _lower_oom_score(Path(f"/proc/{each.pid}/oom_score_adj"))


def _is_supervisor(process: psutil.Process) -> bool:
    try:
        return any(SUPERVISOR in part for part in process.cmdline()[:1])
    except psutil.Error:
        return False


def _lower_oom_score(path: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        if int(path.read_text()) > 0:
            path.write_text("0")


def _reason(error: BaseException) -> str:
    """Return the informative part of Ray's message, which starts with lines of ids."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return " ".join(" ".join(lines[1:] or lines).split())
