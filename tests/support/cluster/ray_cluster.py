"""A Ray cluster of a head and three nodes in this machine's processes."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def ray_cluster(nodes: int = 3, node_environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Start a cluster that this process is connected to, and shut it down at the end of the context.

    Its head has no CPUs and its `nodes` nodes have two each. Its processes import the modules of this repository. The
    `node_environment` is not that of the head.
    """
    # The folder keeps other clusters of this machine apart; its name is short because it contains sockets
    # A process of Ray that is still ending may write a log while the folder is removed
    temporary = tempfile.TemporaryDirectory(prefix="bam-control-", ignore_cleanup_errors=True)
    with temporary as folder, pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "ray").mkdir()
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # `python` of jobs
        patch.setenv("PYTHONPATH", str(ROOT))  # workers unpickle functions of `tests.support`
        patch.setenv("BAM_CACHE", f"{folder}/cache")
        patch.delenv("RAY_ADDRESS", raising=False)
        running = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": 100 << 20,
                "include_dashboard": True,
                "dashboard_port": 0,
                "dashboard_agent_listen_port": 0,
            },
        )
        for name, value in (node_environment or {}).items():
            patch.setenv(name, value)
        for _ in range(nodes):
            add_node(running)
        ray.init(address=running.address, log_to_driver=False)
        yield running
        ray.shutdown()
        running.shutdown()


def add_node(running: Cluster) -> None:
    """Add a node of two CPUs with the label `kind=plain`."""
    running.add_node(num_cpus=2, object_store_memory=100 << 20, labels={"kind": "plain"})
