"""The cluster of all tests of faults, the results of a run without faults, and runs that a test disturbs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bam_ray.settings import Recipe
from tests.support.faults.cluster_under_test import ClusterUnderTest
from tests.support.faults.disturbed_run import DisturbedRun
from tests.support.faults.drivers import DriverProcess
from tests.support.faults.reference_run import ReferenceRun


@pytest.fixture(scope="package")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ReferenceRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ReferenceRun(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="package")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    with ClusterUnderTest(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: ClusterUnderTest) -> ClusterUnderTest:
    """Return the cluster with all its nodes and its store."""
    shared_cluster.restore()
    return shared_cluster


Start = Callable[..., DisturbedRun]


@pytest.fixture
def start(cluster: ClusterUnderTest, reference: ReferenceRun, request: pytest.FixtureRequest) -> Start:
    """Return a function that starts a run over the S3 server, with the arguments of `ClusterUnderTest.submit`."""
    name = request.node.name.translate(str.maketrans("_[]", "---"))
    recipe = reference.recipe(cluster.uri(name), cluster.proxy.endpoint)

    def start(**how: Any) -> DisturbedRun:
        def submit(recipe: Recipe) -> DriverProcess:
            return cluster.submit(recipe, **how)

        return DisturbedRun(cluster, reference, recipe, cluster.store(name), submit)

    return start


@pytest.fixture
def run(start: Start) -> DisturbedRun:
    """Return a run over the S3 server that has just started."""
    return start()
