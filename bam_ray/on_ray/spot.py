"""Watch for the cloud's notice that this spot node will be taken away, and ask Ray to drain the node.

    python -m bam_ray.on_ray.spot aws HEAD:6379      # or gcp; runs on the node for as long as the node exists

Ray does not watch for such notices. After a drain request it places nothing more on the node, and the controller makes
the tasks that train there write a checkpoint and resume on another node.
"""

import argparse
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import ray
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RayError
from ray.util import get_node_ip_address

METADATA = "http://169.254.169.254"  # the metadata server of both clouds
POLL_SECONDS = 2.0  # time between two requests to the metadata server


def aws_notice(metadata: str) -> bool:
    """Return True if EC2 will interrupt this instance; the notice comes two minutes before."""
    token = _request(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    action = f"{metadata}/latest/meta-data/spot/instance-action"  # absent without a notice
    return token is not None and _request(action, {"X-aws-ec2-metadata-token": token}) is not None


def gcp_notice(metadata: str) -> bool:
    """Return True if Compute Engine will preempt this instance; the notice comes 30 seconds before."""
    return _request(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}) == "TRUE"


CLOUDS: dict[str, tuple[Callable[[str], bool], int]] = {"aws": (aws_notice, 110), "gcp": (gcp_notice, 25)}
"""The function that checks for a notice, and the number of seconds that are left at least when there is one."""


def drain_node(address: str, node_ip: str, seconds: int) -> bool:
    """Ask Ray's head at `address` to drain the node within `seconds`; return True if it accepts."""
    try:
        head: Any = ray._raylet.GcsClient(address=address)  # the interface behind `ray drain-node`
        for node_id, node in head.get_all_node_info(timeout=5).items():
            if node.state == GcsNodeInfo.ALIVE and node.node_manager_address == node_ip:
                deadline = time.time_ns() // 1_000_000 + seconds * 1000
                accepted, _ = head.drain_node(node_id.hex(), DRAIN_NODE_REASON_PREEMPTION, "spot", deadline)
                return bool(accepted)
    except (RayError, OSError) as error:
        print(f"the head at {address} did not receive the drain request: {error}", file=sys.stderr, flush=True)
    return False


def main() -> None:
    """Watch this node until its cloud gives notice, then report it to Ray until Ray accepts it."""
    parser = argparse.ArgumentParser(description="Drain this spot node in Ray when its cloud gives notice.")
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("address", help="address of Ray's head node, HOST:PORT")
    parser.add_argument("--node-ip", help="IP address of this node in Ray (default: detected)")
    parser.add_argument(
        "--metadata", default=METADATA, help="URL of the cloud's metadata server (default: %(default)s)"
    )
    arguments = parser.parse_args()
    has_notice, seconds = CLOUDS[arguments.cloud]
    while not has_notice(arguments.metadata):
        time.sleep(POLL_SECONDS)
    while not drain_node(arguments.address, arguments.node_ip or get_node_ip_address(), seconds):
        time.sleep(1.0)


def _request(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """Return the answer of a metadata server; None if it answers with an error or not at all."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            body: bytes = answer.read()
            return body.decode()
    except (urllib.error.URLError, TimeoutError):
        return None


if __name__ == "__main__":
    main()
