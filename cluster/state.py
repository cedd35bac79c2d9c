"""What a local cluster was started with, kept in `cluster.json` so that it comes back at the same addresses."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.processes import ClusterError
from cluster.s3_server import S3Settings


@dataclass(frozen=True)
class State:
    """Addresses of one cluster; the S3 server's settings carry its credentials."""

    s3: S3Settings | None = None
    network: str = ""  # the first three parts of the nodes' loopback addresses
    gcs_port: int = 0
    client_port: int = 0
    dashboard_port: int = 0
    temporary: str = ""  # holds the nodes' temporary folders

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"


def read_state(home: Path) -> State | None:
    """The state in `home`, or None where no cluster was ever started there; raises `ClusterError`."""
    path = home / "cluster.json"
    try:
        plain = json.loads(path.read_text())
        s3 = plain.pop("s3")
        return State(S3Settings(**(s3 | {"ports": tuple(s3["ports"])})) if s3 else None, **plain)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ClusterError(f"{path} is damaged: remove it, and stop what {home / 'pids'} names") from None


def write_state(home: Path, state: State) -> None:
    """Keep `state` in `home`."""
    write_private(home / "cluster.json", json.dumps(asdict(state), indent=1) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone may read, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)
