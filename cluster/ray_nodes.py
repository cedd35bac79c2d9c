"""The Ray nodes of the local cluster: a head and workers of unequal kinds, each `ray start --block`."""

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

from cluster.processes import ClusterError, Process, free_ports, port_is_free, stop
from cluster.s3_server import S3Settings
from cluster.state import State, write_private

DASHBOARD_PORT = 8265  # Ray's own choice, where it is free
OBJECT_STORE_BYTES = 100_000_000  # of each node; large tensors travel through the blob store, not through Ray
START_SECONDS = 180.0
START_TRIES = 3
LONGEST_TEMPORARY = 30  # characters: Ray's sockets below it must stay under the 107 that the kernel allows


@dataclass(frozen=True)
class Node:
    """One node's name, which is also its `bam/kind` label, and the CPUs it declares."""

    name: str
    cpus: int
    market: str = "on-demand"  # Ray's well-known label for preemptible machines


HEAD = Node("head", 1)  # room for the driver
NODES = (HEAD, Node("large", 2), Node("small", 1), Node("spot", 1, "spot"))


class RayNodes:
    """The Ray processes whose pids, logs and token are in `home`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.processes = {node.name: Process(node.name, home) for node in NODES}
        self.gpus = _visible_gpus()

    def plan(self, state: State | None, s3: S3Settings | None) -> State:
        """Addresses for a new cluster: those of the one before where they are free still."""
        gcs, client, dashboard = free_ports(3)
        if port_is_free(DASHBOARD_PORT):
            dashboard = DASHBOARD_PORT
        if state is not None:
            gcs = state.gcs_port if port_is_free(state.gcs_port) else gcs
            client = state.client_port if port_is_free(state.client_port) else client
            dashboard = state.dashboard_port if port_is_free(state.dashboard_port) else dashboard
        network = state.network if state else f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        base = tempfile.gettempdir()
        temporary = tempfile.mkdtemp(prefix="bam-", dir=base if len(base) <= LONGEST_TEMPORARY else "/tmp")
        return replace(
            state or State(),
            s3=s3,
            network=network,
            gcs_port=gcs,
            client_port=client,
            dashboard_port=dashboard,
            temporary=temporary,
        )

    def authentication(self) -> dict[str, str]:
        """Ray's token mode, always said: its default depends on what else ran on the machine."""
        token = self._home / "ray_token"
        if not token.exists():
            write_private(token, secrets.token_hex(32))
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def environment(self, state: State, cluster: dict[str, str]) -> dict[str, str]:
        """The environment of nodes, and so of everything that runs on them."""
        inherited = dict(os.environ)
        for name in ("RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS"):
            inherited.pop(name, None)
        if state.s3 is not None:  # a profile or session token would go before the server's own credentials
            inherited = {name: value for name, value in inherited.items() if not name.startswith("AWS_")}
        nodes = inherited | cluster
        del nodes["RAY_ADDRESS"]  # that one is for submitting; Ray gives jobs their own
        nodes["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{nodes.get('PATH', os.defpath)}"
        nodes["RAY_TMPDIR"] = state.temporary
        # A node that is asked to stop drains its actors first; Ray's 30 s would outlast the patience of `down`
        nodes.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "5")
        return nodes

    def start(self, state: State, environment: dict[str, str], only: list[str] | None = None) -> None:
        """Start all nodes, or those named in `only`, and wait until they are alive; raises `ClusterError`."""
        (Path(state.temporary) / "ray").mkdir(parents=True, exist_ok=True)
        # Ray goes on calling a killed node alive until it misses its health checks
        before = self._alive(state)
        starting = [node for node in NODES if only is None or node.name in only]
        tries = {node.name: 1 for node in starting}
        until = time.monotonic() + START_SECONDS
        if HEAD in starting:
            self._start_node(HEAD, state, environment)
            while not _listens(f"{state.network}.1", state.gcs_port):
                self._start_again([HEAD], tries, until, state, environment)
        workers = [node for node in starting if node is not HEAD]
        for node in workers:
            self._start_node(node, state, environment)
        while not set(tries) <= {name for name, _ in self._alive(state) - before}:
            self._start_again(starting, tries, until, state, environment)

    def _start_again(
        self, nodes: list[Node], tries: dict[str, int], until: float, state: State, environment: dict[str, str]
    ) -> None:
        """Start again what died; raises `ClusterError` where that was tried often enough or time is up.

        On a busy machine a node may miss the 30 s that Ray gives it to start, whatever one sets.
        """
        for node in nodes:
            process = self.processes[node.name]
            if process.pid() is None:
                if tries[node.name] == START_TRIES:
                    raise ClusterError(f"Ray node {node.name} died: {process.last_words()} (whole log: {process.log})")
                tries[node.name] += 1
                stop([process])
                self._start_node(node, state, environment)
        if time.monotonic() > until:
            raise ClusterError(
                f"the Ray nodes were not up within {START_SECONDS:.0f} s: look at {self._home / 'logs'}; "
                "a machine short of memory or cores may need to stop other work first"
            )
        time.sleep(0.3)

    def keep_logs(self, state: State) -> None:
        """Move the stopped nodes' logs to `logs/ray/` and remove their temporary folders."""
        for node in NODES:
            logs = Path(state.temporary) / node.name / "session_latest" / "logs"
            if logs.is_dir():
                target = self._home / "logs" / "ray" / node.name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(logs.resolve(), target, symlinks=True, ignore_dangling_symlinks=True)
        if Path(state.temporary).name.startswith("bam-"):
            shutil.rmtree(state.temporary, ignore_errors=True)

    def _start_node(self, node: Node, state: State, environment: dict[str, str]) -> None:
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
        # Every node would number its GPUs from 0
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if self.gpus else {}
        self.processes[node.name].start(command, environment | own, self._home)

    def _gpus_of(self, node: Node) -> list[str]:
        """The machine's GPUs dealt out to the workers in turn; the head has none."""
        workers = NODES[1:]
        return [] if node is HEAD else self.gpus[workers.index(node) :: len(workers)]

    def _alive(self, state: State) -> set[tuple[str, str]]:
        """Names and ids of the nodes that Ray calls alive."""
        token = Path(self.authentication()["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{state.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=5) as response:
                answer = json.load(response)
        except (OSError, ValueError):  # not up yet
            return set()
        rows = ((answer.get("data") or {}).get("result") or {}).get("result") or []
        return {(row["node_name"], row["node_id"]) for row in rows if row["state"] == "ALIVE"}


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def _visible_gpus() -> list[str]:
    """Ids of this machine's NVIDIA GPUs, fewer where CUDA_VISIBLE_DEVICES says so; found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return present if visible is None or not present else [id for id in visible.split(",") if id]
