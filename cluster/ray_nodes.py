"""The Ray nodes of the local cluster: a head and workers of unequal sizes, each a `ray start --block` process."""

import json
import os
import random
import secrets
import shutil
import socket
import sysconfig
import tempfile
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.machine import HEAD_BYTES, available_memory, memory_of_nodes
from cluster.processes import ClusterError, Process, free_ports, port_is_free, stop
from cluster.s3_server import S3Settings
from cluster.state import ClusterState, write_private

DASHBOARD_PORT = 8265  # Ray's default, used if it is free
OBJECT_STORE_BYTES = 100_000_000  # per node; large tensors are transferred through the blob store, not through Ray
START_SECONDS = 180.0
START_TRIES = 3
MAX_TEMPORARY_LENGTH = 30  # characters: the kernel limits the paths of Ray's sockets, which are below it, to 107


@dataclass(frozen=True)
class LocalNode:
    """The name of a node, which is also its `bam/kind` label, and the CPUs that it declares."""

    name: str
    cpus: int
    market: str = "on-demand"  # Ray's well-known label for preemptible machines


HEAD = LocalNode("head", 1)  # one CPU for the driver
NODES = (HEAD, LocalNode("large", 2), LocalNode("small", 1), LocalNode("spot", 1, "spot"))


class RayNodes:
    """The Ray processes whose pids, logs and token are in `home`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.processes = {node.name: Process(node.name, home) for node in NODES}
        self.gpus = _visible_gpus()

    def plan(self, state: ClusterState | None, s3: S3Settings | None) -> ClusterState:
        """Return the addresses of a new cluster: those of the previous cluster, as far as they are free."""
        gcs, client, dashboard = free_ports(3)
        if port_is_free(DASHBOARD_PORT):
            dashboard = DASHBOARD_PORT
        if state is not None:
            gcs = state.gcs_port if port_is_free(state.gcs_port) else gcs
            client = state.client_port if port_is_free(state.client_port) else client
            dashboard = state.dashboard_port if port_is_free(state.dashboard_port) else dashboard
        network = state.network if state else f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        base = tempfile.gettempdir()
        temporary = tempfile.mkdtemp(prefix="bam-", dir=base if len(base) <= MAX_TEMPORARY_LENGTH else "/tmp")
        return replace(
            state or ClusterState(),
            s3=s3,
            network=network,
            gcs_port=gcs,
            client_port=client,
            dashboard_port=dashboard,
            temporary=temporary,
            memory=available_memory(),
        )

    def authentication(self) -> dict[str, str]:
        """Return the environment variables of Ray's token authentication.

        The mode is always set, because its default depends on what else ran on the machine.
        """
        token = self._home / "ray_token"
        if not token.exists():
            write_private(token, secrets.token_hex(32))
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def environment(self, state: ClusterState, cluster: dict[str, str]) -> dict[str, str]:
        """Return the environment of the nodes, which all processes on them inherit."""
        inherited = dict(os.environ)
        for name in ("RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS"):
            inherited.pop(name, None)
        if state.s3 is not None:  # a profile or session token would take precedence over the credentials of the server
            inherited = {name: value for name, value in inherited.items() if not name.startswith("AWS_")}
        nodes = inherited | cluster
        del nodes["RAY_ADDRESS"]  # it is for submitting jobs; Ray sets another value for the jobs themselves
        nodes["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{nodes.get('PATH', os.defpath)}"
        nodes["RAY_TMPDIR"] = state.temporary
        # A node drains its actors before it stops; Ray's default of 30 s exceeds the timeout of `down`
        nodes.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "5")
        # Ray serves metrics without a token, and on all interfaces unless the address of the node is 127.0.0.1
        nodes.setdefault("RAY_enable_metrics_collection", "false")
        return nodes

    def start(self, state: ClusterState, environment: dict[str, str], only: list[str] | None = None) -> None:
        """Start all nodes, or those named in `only`, and wait until they are alive.

        Raises `ClusterError` if they do not start.
        """
        (Path(state.temporary) / "ray").mkdir(parents=True, exist_ok=True)
        # Ray reports a killed node as alive until it misses its health checks
        already_alive = self._alive(state)
        starting = [node for node in NODES if only is None or node.name in only]
        attempts = {node.name: 1 for node in starting}
        deadline = time.monotonic() + START_SECONDS
        if HEAD in starting:
            self._start_node(HEAD, state, environment)
            while not _listens(f"{state.network}.1", state.gcs_port):
                self._restart_dead([HEAD], attempts, deadline, state, environment)
        workers = [node for node in starting if node is not HEAD]
        for node in workers:
            self._start_node(node, state, environment)
        while not set(attempts) <= {name for name, _ in self._alive(state) - already_alive}:
            self._restart_dead(starting, attempts, deadline, state, environment)

    def _restart_dead(
        self,
        nodes: list[LocalNode],
        attempts: dict[str, int],
        deadline: float,
        state: ClusterState,
        environment: dict[str, str],
    ) -> None:
        """Restart the nodes that died. Raises `ClusterError` after `START_TRIES` attempts or after the deadline.

        On a busy machine a node may exceed the 30 s that Ray allows for its start, which no setting changes.
        """
        for node in nodes:
            process = self.processes[node.name]
            if process.pid() is None:
                if attempts[node.name] == START_TRIES:
                    raise ClusterError(f"Ray node {node.name} died: {process.failure_reason()}: see {process.log}")
                attempts[node.name] += 1
                stop([process])
                self._start_node(node, state, environment)
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the Ray nodes did not start within {START_SECONDS:.0f} s: see {self._home / 'logs'}, and stop other "
                "work if the machine is short of memory or cores"
            )
        time.sleep(0.3)

    def keep_logs(self, state: ClusterState) -> None:
        """Move the logs of the stopped nodes to `logs/ray/`, and remove their temporary folders."""
        for node in NODES:
            logs = Path(state.temporary) / node.name / "session_latest" / "logs"
            if logs.is_dir():
                target = self._home / "logs" / "ray" / node.name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(logs.resolve(), target, symlinks=True, ignore_dangling_symlinks=True)
        if Path(state.temporary).name.startswith("bam-"):
            shutil.rmtree(state.temporary, ignore_errors=True)

    def launch_of(
        self, node: LocalNode, state: ClusterState, environment: dict[str, str]
    ) -> tuple[list[str], dict[str, str]]:
        """Return the command and the environment that start a node."""
        number = NODES.index(node) + 1
        gpus = self._gpus_of(node)
        command = [str(Path(sysconfig.get_path("scripts")) / "ray"), "start", "--block", "--disable-usage-stats"]
        if node is HEAD:
            command += ["--head", f"--port={state.gcs_port}", f"--ray-client-server-port={state.client_port}"]
            command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={state.dashboard_port}"]
        else:
            command += [f"--address={state.network}.1:{state.gcs_port}"]
        command += [f"--node-ip-address={state.network}.{number}", f"--node-name={node.name}"]
        command += [f"--num-cpus={node.cpus}", f"--num-gpus={len(gpus)}"]
        command += [f"--labels=bam/kind={node.name},ray.io/market-type={node.market}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={state.temporary}/{node.name}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        command += ["--log-color=false"]
        command += [f"--memory={self.memory_of(node, state)}"]
        # Without this variable every node would number its GPUs from 0
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if self.gpus else {}
        if node is HEAD:
            # Each node's memory monitor sees the memory of the whole machine, and kills processes of its own node. That
            # of the head would kill the supervisor of the job, and so the driver, for what tasks on other nodes take.
            own["RAY_memory_monitor_refresh_ms"] = environment.get("RAY_memory_monitor_refresh_ms", "0")
        return command, environment | own

    def memory_of(self, node: LocalNode, state: ClusterState) -> int:
        """Return the bytes of memory that a node offers to tasks; all nodes together offer no more than there are."""
        if node is HEAD:
            return HEAD_BYTES
        cpus = {each.name: each.cpus for each in NODES if each is not HEAD}
        return memory_of_nodes(state.memory or available_memory(), cpus)[node.name]

    def _start_node(self, node: LocalNode, state: ClusterState, environment: dict[str, str]) -> None:
        command, own = self.launch_of(node, state, environment)
        self.processes[node.name].start(command, own, self._home)

    def _gpus_of(self, node: LocalNode) -> list[str]:
        """Return the GPUs of a node. The workers get the GPUs of the machine in turn, and the head gets none."""
        workers = NODES[1:]
        return [] if node is HEAD else self.gpus[workers.index(node) :: len(workers)]

    def _alive(self, state: ClusterState) -> set[tuple[str, str]]:
        """Return the names and ids of the nodes that Ray reports as alive."""
        token = Path(self.authentication()["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{state.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=5) as response:
                body = json.load(response)
        except (OSError, ValueError):  # the dashboard is not ready yet
            return set()
        rows = ((body.get("data") or {}).get("result") or {}).get("result") or []
        return {(row["node_name"], row["node_id"]) for row in rows if row["state"] == "ALIVE"}


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def _visible_gpus() -> list[str]:
    """Return the ids of the NVIDIA GPUs of this machine, restricted by CUDA_VISIBLE_DEVICES. Does not import torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return present if visible is None or not present else [id for id in visible.split(",") if id]
