"""The addresses of a local cluster, stored in `cluster.json` so that a restarted cluster has the same addresses."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.processes import ClusterError
from cluster.s3_server import S3Settings


@dataclass(frozen=True)
class ClusterState:
    """The addresses of one cluster. The settings of the S3 server include its credentials."""

    s3: S3Settings | None = None
    network: str = ""  # the first three numbers of the loopback addresses of the nodes
    gcs_port: int = 0
    client_port: int = 0
    dashboard_port: int = 0
    temporary: str = ""  # the parent of the temporary folders of the nodes
    memory: int = 0  # bytes that were free before the cluster started, which the nodes share

    @property
    def dashboard(self) -> str:
        """The URL of the dashboard, to which jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"


def read_state(home: Path) -> ClusterState | None:
    """Return the state in `home`, or None if no cluster was started there. Raises `ClusterError` if it is damaged."""
    path = home / "cluster.json"
    try:
        plain = json.loads(path.read_text())
        s3 = plain.pop("s3")
        return ClusterState(S3Settings(**(s3 | {"ports": tuple(s3["ports"])})) if s3 else None, **plain)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ClusterError(
            f"{path} is damaged: remove it, and stop the processes whose pids are in {home / 'pids'}"
        ) from None


def write_state(home: Path, state: ClusterState) -> None:
    """Write `state` to `home`."""
    write_private(home / "cluster.json", json.dumps(asdict(state), indent=1) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file atomically. Only its owner can read it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)
