"""A process that died of memory is reported in one line that says what died, the figures, and what to change."""

import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from rich.console import Console

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import TrainingError
from bam_ray.on_ray.deaths import describe_death, describe_driver_death, protect_driver, with_memory_cause
from bam_ray.on_ray.group import root_cause
from bam_ray.on_ray.submit import show_end
from bam_ray.pipeline.tasks import Task
from bam_ray.settings import Needs

MONITOR = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: \
0c85216a36d13752768569048788d3743ac3cf051e5e41de53ed7375) was 22.79GB used / 23.54GB limit (0.968018)
OOM kill reason: Memory usage 24471142400B exceeded threshold of 24012684697B (95.0% of 25276510208B limit)
Object store memory usage: [- objects spillable: 0
Eviction Stats:
(global lru) bytes evicted: 0]
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(895381c178317e615456412601000000): job ID=01000000, task name=A.__init__, pid=9027)
]
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
9167\t9.40\t/usr/bin/python3 -m something.else
9027\t7.26\tray::TaskActor
8999\t0.26\tray::JobSupervisor
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"""
"""The message of Ray 2.60's memory monitor, with fewer lines."""
DEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: TaskActor
\tactor_id: ff4fe1bc1ccfc54ae1f5a0b401000000
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was \
killed by the OOM killer due to high memory usage, (2) ray stop --force was called."""
FIGURES = "(22.79GB of 23.54GB in use, largest worker ray::TaskActor with 7.26GB)"
BRANCH = Task(ArtifactKind.BRANCHES, "law", "law-1", (), Needs(memory_gib=6.5))
CORPUS = Task(ArtifactKind.CORPORA, "corpus", "corpus-1", (), Needs())


def test_a_process_killed_by_the_memory_monitor() -> None:
    line = describe_death(OutOfMemoryError(MONITOR), BRANCH, "large")
    assert line == (
        f"memory ran out on node large {FIGURES}, so Ray killed this process: use a larger memory_gib in branch.needs "
        "(or its override), now 6.5 GiB, a smaller micro_batch_sequences, fewer tasks at once on this machine or a "
        "node with more memory"
    )


def test_a_task_without_settings_gets_no_advice_about_them() -> None:
    line = describe_death(OutOfMemoryError(MONITOR), CORPUS)
    assert "memory ran out on node 192.0.2.2" in line
    assert "memory_gib" not in line
    assert "micro_batch" not in line


def test_a_process_that_left_no_error_may_have_run_out() -> None:
    line = describe_death(RayActorError(None, DEAD), BRANCH, "large")
    assert "killed or crashed without an error; if memory ran out on node large: use a larger memory_gib" in line
    assert "\n" not in line
    assert "OOM killer" not in line


def test_another_death_is_reported_in_the_words_of_ray() -> None:
    line = describe_death(RayActorError(None, "The actor died.\n\tpid: 7\nits owner has left"), BRANCH, "large")
    assert line == "its process died: its owner has left"


def test_a_rank_killed_for_memory_is_the_cause_of_its_group() -> None:
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    killed = WorkerHealthCheckFailedError("A worker health check failed.", OutOfMemoryError(MONITOR))
    cause = with_memory_cause(root_cause(WorkerGroupError("", {0: lost, 1: killed})), BRANCH)
    assert isinstance(cause, TrainingError)
    assert str(cause).startswith(f"memory ran out on node 192.0.2.2 {FIGURES}")
    assert "\n" not in str(cause)


def test_other_errors_of_a_group_stay_as_they_are() -> None:
    error = TrainingError("the loss is not finite")
    assert with_memory_cause(error, BRANCH) is error


def test_the_death_of_a_driver_is_one_line() -> None:
    killed = describe_driver_death(f"Unexpected error occurred: {MONITOR}")
    assert killed is not None
    assert FIGURES in killed
    assert "submit the run again to continue it" in killed
    assert "\n" not in killed


@pytest.mark.parametrize(
    "message", [f"Job supervisor actor died: {DEAD}", "Job entrypoint command failed with exit code -9, last available"]
)
def test_a_driver_that_was_killed_can_be_continued(message: str) -> None:
    assert "submit the run again" in (describe_driver_death(message) or "")


def test_the_end_of_a_job_names_the_death_of_its_driver() -> None:
    details = JobDetails(type="SUBMISSION", status=JobStatus.FAILED, entrypoint="", message=f"Unexpected: {MONITOR}")
    console = Console(width=80)
    with console.capture() as capture:
        assert show_end(console, cast(JobSubmissionClient, None), "raysubmit_1", details, None) == 1
    (line,) = capture.get().splitlines()
    assert line.startswith(f"raysubmit_1: memory ran out on the node of the run's driver {FIGURES}")


def test_the_output_of_a_driver_is_not_its_death() -> None:
    message = f"Job entrypoint command failed with exit code 1, last available logs (truncated):\n{MONITOR}"
    assert describe_driver_death(message) is None


def test_the_driver_gets_the_score_of_an_ordinary_process() -> None:
    code = "import sys; from bam_ray.on_ray.deaths import protect_driver; protect_driver()"
    score = "print(open('/proc/self/oom_score_adj').read().strip())"
    raised = f"open('/proc/self/oom_score_adj', 'w').write('700'); {score}; {code}; {score}"
    before, after = subprocess.run(
        [sys.executable, "-c", raised], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    ).stdout.split()
    assert (before, after) == ("700", "0")


def test_a_driver_that_is_protected_already_stays_so() -> None:
    score = Path("/proc/self/oom_score_adj")
    before = score.read_text()
    protect_driver()
    assert score.read_text() == before or int(before) > 0
