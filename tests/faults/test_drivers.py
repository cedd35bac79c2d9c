"""Several drivers that share a store, at the same time and one after another."""

import json
from collections.abc import Callable
from datetime import datetime

import pytest

from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import epoch_key
from bam_ray.control.drivers import DRIVER_TIMEOUT
from bam_ray.pipeline.graph import task_graph
from bam_ray.settings import Recipe
from tests.support.faults.cluster_under_test import ClusterUnderTest
from tests.support.faults.disturbed_run import DisturbedRun
from tests.support.faults.nodes import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_second_driver_waits_for_the_first(start: Callable[..., DisturbedRun], cluster: ClusterUnderTest) -> None:
    run = start(step_seconds=0.2)
    run.log("code", step=20)
    run.log("law", step=20)
    second = cluster.submit(run.recipe)
    wait_for("the second driver has found the first", lambda: "elsewhere" in second.output)
    logs = run.finish()
    assert second.join() == 0, second.output[-3000:]
    assert (len(logs["code"]), len(logs["law"])) == (1, 1), "each branch was made once"
    assert "reference: finished, 4 of 4 committed" in second.output


def test_two_drivers_start_together(run: DisturbedRun, cluster: ClusterUnderTest) -> None:
    second = cluster.submit(run.recipe)
    logs = run.finish()
    assert second.join() == 0, second.output[-3000:]
    for attempts in logs.values():
        assert len(attempts) <= 2, "each driver has started it at most once"
        for stale in attempts[:-1]:
            assert [event["error"].split(":")[0] for event in stale.named("failed")] in ([], ["StaleLease"])


def test_two_runs_share_their_branches(start: Callable[..., DisturbedRun], cluster: ClusterUnderTest) -> None:
    run = start(step_seconds=0.2, kind="mixtures")
    training = run.recipe.mix.training.model_copy(update={"peak_lr": 0.005})
    other = run.recipe.model_copy(update={"mix": run.recipe.mix.model_copy(update={"training": training})})
    run.log("code", step=20)
    run.log("law", step=20)
    second = cluster.submit(other, kind="mixtures")
    wait_for("the second driver has found the first", lambda: "elsewhere" in second.output)
    logs = run.finish()
    assert second.join() == 0, second.output[-3000:]
    assert (len(logs["code"]), len(logs["law"])) == (1, 1), "each branch was made once"
    shared, others = made_by(run, run.recipe), made_by(run, other)
    assert sorted(kind for kind, _ in shared ^ others) == ["mixtures", "mixtures"], "all else is shared"
    (upcycled,) = (id for kind, id in shared if kind == "upcycled")
    assert len(list(run.store.list(f"upcycled/{upcycled}/leases/"))) == 1, "the mixture at step 0 was made once"


def made_by(run: DisturbedRun, recipe: Recipe) -> set[tuple[str, str]]:
    """Return kind and id of all artifacts up to the mixtures, after asserting that they are committed and intact."""
    tasks = [task for task in task_graph(recipe) if task.kind not in ("evaluations", "reports")]
    for task in tasks:
        artifact = Artifact(run.store, task.kind, task.id)
        manifest = artifact.manifest()
        assert manifest is not None, f"{task.full_name} is not committed"
        artifact.check_files(manifest)
    return {(task.kind, task.id) for task in tasks}


def test_a_killed_driver_is_noticed_at_once(start: Callable[..., DisturbedRun]) -> None:
    run = start(step_seconds=0.2)
    run.log("code", step=20)
    run.driver.kill()
    run.submit()
    logs = run.finish()
    assert "elsewhere" not in run.driver.output, "it does not wait for a process of this machine that is gone"
    started = datetime.fromisoformat(json.loads(run.store.get(epoch_key(2)))["taken"])
    second = logs["code"][-1]
    assert second.attempt.epoch == 2
    assert (second.taken - started).total_seconds() < DRIVER_TIMEOUT
