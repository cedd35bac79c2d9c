"""A spot node's ear: hears the cloud's notice that the node will be taken away, and tells Ray.

    python -m bam_ray.on_ray.spot aws HEAD:6379      # or gcp; on the node itself, for as long as it lives

Ray passes no such notice on by itself. Once told, it places nothing more there, and the controller has what trains
there write a checkpoint and go on elsewhere.
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

METADATA = "http://169.254.169.254"  # of the machine that asks, on either cloud
ASK_EVERY = 2.0  # seconds


def noticed_by_aws(metadata: str) -> bool:
    """Whether EC2 says that it will interrupt this instance, which it does two minutes before."""
    token = _ask(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    action = f"{metadata}/latest/meta-data/spot/instance-action"  # not there without a notice
    return token is not None and _ask(action, {"X-aws-ec2-metadata-token": token}) is not None


def noticed_by_gcp(metadata: str) -> bool:
    """Whether Compute Engine says that it preempts this instance, which it does half a minute before."""
    return _ask(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}) == "TRUE"


CLOUDS: dict[str, tuple[Callable[[str], bool], int]] = {"aws": (noticed_by_aws, 110), "gcp": (noticed_by_gcp, 25)}
"""What hears the notice, and how many seconds are left then at the least."""


def tell_ray(address: str, node_ip: str, seconds: int) -> bool:
    """Say to the head at `address` that the node will be gone in so many seconds; whether it has heard."""
    try:
        head: Any = ray._raylet.GcsClient(address=address)  # what `ray drain-node` asks too
        for node_id, node in head.get_all_node_info(timeout=5).items():
            if node.state == GcsNodeInfo.ALIVE and node.node_manager_address == node_ip:
                deadline = time.time_ns() // 1_000_000 + seconds * 1000
                accepted, _ = head.drain_node(node_id.hex(), DRAIN_NODE_REASON_PREEMPTION, "spot", deadline)
                return bool(accepted)
    except (RayError, OSError) as error:
        print(f"the head at {address} was not told: {error}", file=sys.stderr, flush=True)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell Ray of a spot node's end when the cloud gives notice of it.")
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("address", help="of Ray's head, HOST:PORT")
    parser.add_argument("--node-ip", help="that Ray knows this node by (default: its own)")
    parser.add_argument("--metadata", default=METADATA, help="URL of the cloud's metadata server")
    arguments = parser.parse_args()
    noticed, seconds = CLOUDS[arguments.cloud]
    while not noticed(arguments.metadata):
        time.sleep(ASK_EVERY)
    while not tell_ray(arguments.address, arguments.node_ip or get_node_ip_address(), seconds):
        time.sleep(1.0)


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """What a metadata server answers; None where it has nothing to say, or does not answer."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            said: bytes = answer.read()
            return said.decode()
    except (urllib.error.URLError, TimeoutError):
        return None


if __name__ == "__main__":
    main()
