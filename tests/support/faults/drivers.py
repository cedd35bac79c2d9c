"""The drivers of runs on a `ClusterUnderTest`: processes of this machine and Ray jobs."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from ray.job_submission import JobDetails

from bam_ray.on_ray.submit import client, submit
from bam_ray.settings import Recipe
from tests.support.faults.nodes import TIMEOUT, wait_for

if TYPE_CHECKING:
    from tests.support.faults.cluster_under_test import ClusterUnderTest

ROOT = Path(__file__).resolve().parents[3]


class DriverProcess:
    """The driver of a run as a separate process, for artifacts of `kind` and everything that they are made from.

    Training steps take at least `step_seconds`.
    """

    def __init__(self, cluster: "ClusterUnderTest", recipe: Recipe, step_seconds: float, kind: str) -> None:
        number = cluster.count()
        path = cluster.home / f"recipe-{number}.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        self.log = cluster.home / f"driver-{number}.log"
        command = [
            sys.executable,
            "-m",
            "tests.support.faults.throttled_driver",
            str(path),
            kind,
            str(step_seconds),
        ]
        environment = cluster.environment() | {"RAY_ADDRESS": cluster.address}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=cluster.home, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        """True if it has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Stop the run cleanly with SIGTERM; return the exit code."""
        self.process.terminate()
        return self.join()

    def join(self) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(timeout=2 * TIMEOUT)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output[-3000:]) from None

    @property
    def output(self) -> str:
        """Everything that it has printed."""
        return self.log.read_text(errors="replace")


class SubmittedJob:
    """A run submitted as a Ray job with a script of `jobs/`, as users do; its steps are not slowed down."""

    def __init__(self, cluster: "ClusterUnderTest", recipe: Recipe) -> None:
        folder = cluster.home / f"job-{cluster.count()}"
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        with contextlib.chdir(folder):
            self._id = submit("recipe.yaml", [], "jobs/branch.py", cluster.dashboard)
        self._jobs = client(cluster.dashboard)

    @property
    def is_running(self) -> bool:
        """True if it has not ended."""
        return not self._details.status.is_terminal()

    def kill(self) -> None:
        """Send SIGKILL to the driver, whose pid the cluster knows, and wait for the end of the job."""
        driver = wait_for("the job has a driver", lambda: self._details.driver_info)
        os.kill(int(driver.pid), signal.SIGKILL)
        assert self.join() != 0

    def join(self) -> int:
        """Wait for the end; return the exit code."""
        wait_for(f"job {self._id} ends", lambda: not self.is_running, 2 * TIMEOUT)
        code: int = self._details.driver_exit_code
        return code

    @property
    def output(self) -> str:
        """Everything that it has printed."""
        output: str = self._jobs.get_job_logs(self._id)
        return output

    @property
    def _details(self) -> JobDetails:
        return self._jobs.get_job_info(self._id)
