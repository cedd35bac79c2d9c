"""The local cluster: four nodes and an S3 server in a temporary folder, jobs, secrets, and a clean shutdown."""

import contextlib
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from bam_ray.blobs import open_store
from cluster.local import LocalCluster
from cluster.processes import ClusterError, Process, free_ports, port_is_free, stop
from cluster.ray_nodes import START_TRIES, RayNodes
from cluster.s3_server import S3Settings, start_s3_server, stop_s3_server
from tests.support.cluster.stub_stages import write_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import ray
from bam_ray.blobs import open_store

ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, label_selector={"bam/kind": "spot"})
def write() -> str:
    open_store("s3://bam/from-a-job").put("key", b"written by a worker")
    return "OK from " + ray.get_runtime_context().get_node_id()[:4]

print(ray.get(write.remote()))
"""
RUN = """
import sys
from bam_ray.blobs import open_store
from bam_ray.on_ray.submit import follow, submit

sys.exit(follow(submit("recipe.yaml", ["branch.training.tokens=512"]), open_store("s3://bam/run")))
"""
ENDLESS = "import time, ray; ray.init(); time.sleep(1000)"


def cluster(home: Path, *arguments: str, code: int = 0) -> str:
    """Run the command line, check its exit code and return its output."""
    result = subprocess.run(
        [sys.executable, "-m", "cluster.local", *arguments],
        cwd=ROOT,
        env=os.environ | {"BAM_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def shell_environment(home: Path) -> dict[str, str]:
    """Return the environment of a shell after `. .bam/env`."""
    command = f". {shlex.quote(str(home / 'env'))} && env -0"
    output = subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout.decode()
    return dict(line.split("=", 1) for line in output.split("\0") if line)


def submit(environment: dict[str, str], folder: Path, *options: str) -> str:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "job", "submit", *options, "--", "python", "job.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a cluster in a folder whose path is longer than the limit for Ray's sockets, and return the folder."""
    home = tmp_path_factory.mktemp("home") / ("a-long-name-" * 8)
    assert "up in" in cluster(home, "up")
    yield home
    cluster(home, "down")


def test_four_nodes_with_declared_resources_are_alive(home: Path) -> None:
    environment = shell_environment(home)
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    url = f"{environment['RAY_ADDRESS']}/api/v0/nodes"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=10)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        rows = json.load(response)["data"]["result"]["result"]
    alive = {row["labels"]["bam/kind"]: row for row in rows if row["state"] == "ALIVE"}
    assert sum(row["resources_total"]["memory"] for row in alive.values()) < psutil.virtual_memory().total
    assert {kind: row["resources_total"]["CPU"] for kind, row in alive.items()} == {
        "head": 1.0,
        "large": 2.0,
        "small": 1.0,
        "spot": 1.0,
    }
    assert alive["spot"]["labels"]["ray.io/market-type"] == "spot"
    assert len({row["node_ip"] for row in rows}) == 4
    assert listeners(int(environment["RAY_ADDRESS"].rpartition(":")[2])) == {"127.0.0.1"}


def listeners(port: int) -> set[str]:
    """Return the addresses on which a process listens at `port`. IPv6 addresses are in the format of the kernel."""
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, number = row.split()[1].split(":")
            if row.split()[3] == "0A" and int(number, 16) == port:
                found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if len(address) == 8 else address)
    return found


# One method of each gRPC service that Ray's processes offer
RPCS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetSystemConfig",
    "ObjectManagerService/Pull",
    "ReporterService/GetTraceback",
    "RayletDriver/ClusterInfo",
)
HEAD_METRICS = {44217, 44227}  # plain HTTP of the autoscaler and the dashboard, which no setting of Ray switches off


def answers_without_token(port: int) -> set[str]:
    """Return how the gRPC services at a port answer; services that it does not have are left out."""
    found = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for rpc in RPCS:
            try:
                channel.unary_unary(f"/ray.rpc.{rpc}")(b"", timeout=10)
                found.add("OK")
            except grpc.RpcError as error:
                found.add(error.code().name)
    return found - {"UNIMPLEMENTED"}


def test_network_sockets_answer_only_with_the_token(home: Path) -> None:
    sockets = set()
    for process in LocalCluster(home).processes:
        for pid in process.family():
            with contextlib.suppress(psutil.Error):  # it has ended
                connections = psutil.Process(pid).net_connections("tcp")
                sockets |= {(process.name, *each.laddr) for each in connections if each.status == psutil.CONN_LISTEN}
    everywhere = {port for _, address, port in sockets if address in ("0.0.0.0", "::")} - HEAD_METRICS
    assert len(everywhere) == 13  # the GCS; on each of the four nodes two of the raylet and one of the agent
    answers = {port: answers_without_token(port) for port in everywhere}
    assert {port: found for port, found in answers.items() if found != {"UNAUTHENTICATED"}} == {}
    assert {address for name, address, _ in sockets if name == "s3"} == {"127.0.0.1"}


def test_a_second_up_changes_nothing(home: Path) -> None:
    before = [process.pid() for process in LocalCluster(home).processes]
    assert "is up already: 4 nodes, http://127.0.0.1:" in cluster(home, "up")
    assert [process.pid() for process in LocalCluster(home).processes] == before
    assert "other choice of S3 server" in cluster(home, "up", "--no-s3", code=1)


def test_status_shows_every_process(home: Path) -> None:
    lines = cluster(home, "status").splitlines()
    assert [line.split()[0] for line in lines] == ["process", "s3", "head", "large", "small", "spot"]


def test_only_the_owner_can_read_secrets(home: Path) -> None:
    for name in ("env", "cluster.json", "ray_token"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "s3").stat().st_mode) == 0o700
    assert cluster(home, "env") == (home / "env").read_text()


def test_a_job_runs_on_the_labeled_node_and_accesses_the_store(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.py").write_text(JOB)
    environment = shell_environment(home)
    assert "OK from " in submit(environment, tmp_path, "--working-dir", ".")
    for name, value in environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    assert open_store("s3://bam/from-a-job").get("key") == b"written by a worker"


def test_jobs_without_the_token_are_rejected(home: Path) -> None:
    environment = shell_environment(home)
    for changed in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        result = subprocess.run(
            [sys.executable, "-c", "from bam_ray.on_ray.submit import client; client()"],
            env=environment | changed,
            capture_output=True,
            text=True,
            check=False,
        )
        last = result.stderr.strip().splitlines()[-1]
        assert "PlacementError: the cluster at http://127.0.0.1:" in last
        assert "refuses this shell's token: set RAY_AUTH_MODE=token" in last


def test_a_run_does_not_leak_secrets(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(tmp_path, "s3://bam/run")
    environment = shell_environment(home)
    result = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "tiny: finished" in result.stdout

    token = (home / "ray_token").read_text().strip()
    secrets = [token.encode(), environment["AWS_SECRET_ACCESS_KEY"].encode()]

    def leaks(texts: dict[str, bytes]) -> list[str]:
        return [name for name, text in texts.items() if any(secret in text for secret in secrets)]

    assert leaks({"env": (home / "env").read_bytes(), "token": token.encode()}) == ["env", "token"]
    temporary = Path(json.loads((home / "cluster.json").read_text())["temporary"])
    logs = [path for folder in (home / "logs", temporary) for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in logs if path.suffix in (".log", ".out", ".err")]) > 40
    assert leaks({str(path): contents(path) for path in logs}) == []
    pids = {pid for process in LocalCluster(home).processes for pid in process.family()}
    lines = {f"ps {pid}": contents(Path(f"/proc/{pid}/cmdline")) for pid in pids}
    assert len([line for line in lines.values() if line]) > 20
    assert leaks(lines) == []
    for name, value in environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    store = open_store("s3://bam/run")
    blobs = {key: store.get(key) for key in store.list()}
    assert any("status" in key for key in blobs)
    assert leaks(blobs) == []
    request = urllib.request.Request(
        f"{environment['RAY_ADDRESS']}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        jobs = response.read()
    assert b"jobs/run_all.py" in jobs
    assert leaks({"jobs": jobs, "output": (result.stdout + result.stderr).encode()}) == []


def contents(path: Path) -> bytes:
    """Return the contents of a file, or nothing if the file or its process no longer exists."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_up_restarts_a_killed_node(home: Path) -> None:
    processes = LocalCluster(home).ray.processes
    before = {name: process.pid() for name, process in processes.items()}
    for pid in processes["spot"].family():
        os.kill(pid, signal.SIGKILL)
    while processes["spot"].pid() is not None:
        time.sleep(0.05)
    assert "spot         down" in cluster(home, "status", code=1)
    assert "restarting dead nodes: spot" in cluster(home, "up")
    after = {name: process.pid() for name, process in processes.items()}
    assert after.pop("spot") not in (None, before.pop("spot"))
    assert after == before


def test_down_leaves_no_process_and_keeps_the_data(home: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(ENDLESS)
    submit(shell_environment(home), tmp_path, "--no-wait", "--working-dir", ".")
    families = {pid: os.getsid(pid) for process in LocalCluster(home).processes for pid in process.family()}
    assert len(families) > 20
    temporary = Path(json.loads((home / "cluster.json").read_text())["temporary"])
    assert temporary.exists()
    started = time.monotonic()
    assert "is down" in cluster(home, "down")
    assert time.monotonic() - started < 30
    assert not temporary.exists()
    assert list((home / "pids").iterdir()) == []
    assert [pid for pid, session in families.items() if still_runs(pid, session)] == []
    assert (home / "logs" / "ray" / "head" / "dashboard.log").exists()
    assert "was not up" in cluster(home, "down")
    assert "down" in cluster(home, "status", code=1)
    assert (home / "s3" / "filerldb2").is_dir()
    cluster(home, "down", "--wipe")
    assert {path.name for path in home.iterdir()} == {"lock"}


def still_runs(pid: int, session: int) -> bool:
    """Return True if the process still runs in the session. A zombie does not run."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and os.getsid(pid) == session
    except OSError:
        return False


def test_the_server_keeps_its_data_when_its_ports_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process("s3", tmp_path)
    first = start_s3_server(process, tmp_path / "data", S3Settings.generate())
    for name, value in first.environment().items():
        monkeypatch.setenv(name, value)
    open_store("s3://bam/kept").put("key", b"data" * 10_000)
    stop_s3_server(process, first)
    with socket.create_server(("127.0.0.1", first.ports[0])):  # another process takes the port
        second = start_s3_server(process, tmp_path / "data", first)
        try:
            assert second.access_key == first.access_key
            assert second.endpoint != first.endpoint
            assert open_store("s3://bam/kept", second.endpoint).get("key") == b"data" * 10_000
        finally:
            stop_s3_server(process, second)
    assert process.pid() is None


def test_another_process_with_a_recorded_pid_is_not_stopped(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        process = Process("s3", tmp_path)
        (tmp_path / "pids").mkdir()
        (tmp_path / "pids" / "s3.pid").write_text(f"{other.pid}\n")
        assert process.pid() is None
        assert process.family() == set()
        assert stop([process]) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_processes_that_ignore_sigterm_are_killed(tmp_path: Path) -> None:
    process = Process("stubborn", tmp_path)
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    both = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n{child}"
    )
    process.start([sys.executable, "-c", both], dict(os.environ), tmp_path)
    while process.log.read_text().count("ready") < 2:
        time.sleep(0.05)
    assert len(process.family()) == 2
    assert stop([process], timeout=0.5) == ["stubborn"]
    assert process.family() == set()


def test_a_node_that_dies_at_start_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = tmp_path / "attempts"
    (tmp_path / "ray").write_text(
        f"#!/bin/sh\necho x >> {attempts}\necho RuntimeError: too slow\necho at last\nexit 1\n"
    )
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setattr("cluster.ray_nodes.sysconfig.get_path", lambda _: str(tmp_path))
    nodes = RayNodes(tmp_path / "home")
    (tmp_path / "home").mkdir()
    state = nodes.plan(None, None)
    try:
        with pytest.raises(ClusterError, match="Ray node head died: RuntimeError: too slow"):
            nodes.start(state, dict(os.environ))
    finally:
        nodes.keep_logs(state)
    assert attempts.read_text().count("x") == START_TRIES
    assert not Path(state.temporary).exists()


def test_start_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cluster(tmp_path / "file", "up", code=1).startswith(f"error: {tmp_path / 'file'} cannot hold")
    (tmp_path / "cluster.json").write_text("{")
    error = cluster(tmp_path, "up", code=1)
    assert error.startswith("error: ")
    assert "cluster.json is damaged: remove it" in error
    assert len(error.splitlines()) == 1
    assert "start the cluster first" in cluster(tmp_path / "new", "env", code=1)


def test_free_ports_are_free_and_distinct() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    with socket.create_server(("127.0.0.1", ports[0])):
        assert not port_is_free(ports[0])
        assert ports[0] not in free_ports(1000)
