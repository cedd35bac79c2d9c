"""Denied requests, lost answers and cut bodies between a run and its S3 server."""

import time
from collections.abc import Callable

import pytest

from tests.support.faults.cluster_under_test import ClusterUnderTest
from tests.support.faults.disturbed_run import DisturbedRun
from tests.support.faults.flaky_proxy import Fault
from tests.support.faults.nodes import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_store_denies_requests_for_a_minute(run: DisturbedRun, cluster: ClusterUnderTest) -> None:
    run.log("code")
    run.log("law")
    denied = cluster.proxy.add(Fault.denied())
    time.sleep(60.0)
    assert run.driver.is_running, run.driver.output
    cluster.proxy.recover()
    logs = run.finish()
    assert denied.hits >= 10
    assert (len(logs["code"]), len(logs["law"])) == (1, 1), "training waits for the store"


def test_answers_to_writes_are_lost(start: Callable[..., DisturbedRun], cluster: ClusterUnderTest) -> None:
    lost = cluster.proxy.add(Fault.lost_answer("PUT", chance=0.2))
    logs = start().finish()
    assert lost.hits >= 20
    assert (len(logs["code"]), len(logs["law"])) == (1, 1), "a writer recognizes what it has written"


def test_bodies_are_cut(start: Callable[..., DisturbedRun], cluster: ClusterUnderTest) -> None:
    cut = cluster.proxy.add(Fault.cut_body(chance=0.4))
    run = start()
    run.log("code", step=80)
    assert run.driver.stop() == 130
    run.submit()  # its attempts read their checkpoints
    logs = run.finish()
    wait_for("bodies were cut", lambda: cut.hits >= 10, 1)
    assert (len(logs["code"]), len(logs["law"])) == (2, 2), "reads are continued"
