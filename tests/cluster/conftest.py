"""A Ray cluster for the tests of one module."""

from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from tests.support.cluster.ray_cluster import ray_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and three nodes; tests that kill a node add another one."""
    with ray_cluster() as running:
        yield running
