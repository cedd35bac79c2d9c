"""A run on a `ClusterUnderTest` that a test disturbs."""

from collections.abc import Callable

from bam_ray.blobs import BlobStore
from bam_ray.control import status
from bam_ray.control.status import Row
from bam_ray.settings import Recipe
from tests.support.faults.branch_checks import AttemptLog, attempts, check_branches
from tests.support.faults.cluster_under_test import ClusterUnderTest
from tests.support.faults.drivers import DriverProcess, SubmittedJob
from tests.support.faults.nodes import wait_for
from tests.support.faults.reference_run import ReferenceRun


class DisturbedRun:
    """A run of a reference run's branches over `store`, which is submitted at once."""

    def __init__(
        self,
        cluster: ClusterUnderTest,
        reference: ReferenceRun,
        recipe: Recipe,
        store: BlobStore,
        submit: Callable[[Recipe], DriverProcess | SubmittedJob] | None = None,
    ) -> None:
        self.cluster, self.recipe, self.store = cluster, recipe, store
        self._reference, self._submit = reference, submit or cluster.submit
        reference.copy_seed_to(store)
        self.submit()

    def log(self, domain: str, step: int = 40, attempt: int = 1) -> AttemptLog:
        """Wait until attempt `attempt` at a branch, or a later one, has the checkpoint of `step`; return its log."""

        def reached() -> AttemptLog | None:
            assert self.driver.is_running, self.driver.output
            logs = attempts(self.store, self.recipe, domain)
            newest = logs[-1] if len(logs) >= attempt else None
            return newest if newest and max(newest.checkpoints, default=-1) >= step else None

        what = f"attempt {attempt} at {domain} is at step {step}\n{self.driver.output[-3000:]}"
        log: AttemptLog = wait_for(what, reached)
        return log

    def row(self, domain: str) -> Row:
        """Return the row of a branch in the status of the run."""
        now = status.read(self.store)
        assert now is not None
        return next(row for row in now.rows if (row.kind, row.name) == ("branches", domain))

    def node(self, domain: str) -> str:
        """Wait until a branch is on a node; return the name of the node."""
        name: str = wait_for(f"{domain} is on a node", lambda: self.row(domain).node)
        return name

    def submit(self) -> None:
        """Submit the run, or submit it again."""
        self.driver = self._submit(self.recipe)

    def finish(self) -> dict[str, list[AttemptLog]]:
        """Wait for the end of the run and check its branches; return the attempts by domain."""
        assert self.driver.join() == 0, self.driver.output[-3000:]
        return check_branches(self.store, self.recipe, self._reference.expected)
