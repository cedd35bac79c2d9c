"""The local cluster: an S3 server, a Ray head and three worker nodes of different sizes, all on this machine.

    python -m cluster.local up          # `make cluster-up`
    . .bam/env                          # addresses and credentials, for `bam` and `ray job submit`
    python -m cluster.local status
    python -m cluster.local down        # `make cluster-down`; --wipe removes the data too

Each Ray node is a `ray start --block` process with its own loopback address, temporary folder and declared CPUs. Jobs
therefore encounter the conditions of a cluster of several machines: nodes of unequal size, nodes that die (to kill one,
use the pid that `status` shows), and storage that is accessible through the network only.

The S3 server and the dashboard listen on loopback addresses. Ray's gRPC servers listen on all interfaces and require a
token. docs/clusters.md lists the exceptions.

All state is in `.bam/` of the current folder, or in `$BAM_HOME`: cluster.json and env (addresses and credentials, mode
0600), pids/, logs/, s3/ (the data) and cache/. Free ports are selected once and then kept, so clusters of several
checkouts can run side by side.
"""

import fcntl
import shlex
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bam_ray.errors import BamError
from cluster.processes import ClusterError, Process, stop
from cluster.ray_nodes import NODES, RayNodes
from cluster.s3_server import S3Settings, start_s3_server, stop_s3_server
from cluster.state import ClusterState, read_state, write_private, write_state

NODE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the nodes share the cores of one machine
    "OMP_WAIT_POLICY": "PASSIVE",  # a waiting thread releases its core
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "150",  # Ray's default of 3 s is too short for the last checkpoints of a stopped job
}


class LocalCluster:
    """A cluster whose state is in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.s3 = Process("s3", self.home)
        self.ray = RayNodes(self.home)

    @property
    def processes(self) -> list[Process]:
        """All processes of the cluster, the S3 server first."""
        return [self.s3, *self.ray.processes.values()]

    def up(self, with_s3: bool, log: Callable[[str], None]) -> None:
        """Start the processes that do not run. Raises `ClusterError` if they do not start, and stops what it started.

        If only workers died, they are restarted. If the head or the S3 server died, the whole cluster is restarted.
        """
        state = read_state(self.home)
        expected = self.expected_processes(state)
        running = [process for process in expected if process.pid() is not None]
        if state and running:
            if with_s3 != (state.s3 is not None):
                raise ClusterError(
                    "the cluster runs with the other choice of S3 server: stop it first (down), then start it again"
                )
            dead = [process.name for process in expected if process not in running]
            if not dead:
                log(f"the local cluster is up already: {len(NODES)} nodes, {state.dashboard}")
                return
            if not {"s3", "head"} & set(dead):
                log(f"restarting dead nodes: {', '.join(dead)}")
                self._restart_workers(state, dead)
                return
            log(f"{' and '.join(dead)} died: restarting the whole cluster")
        self.down()
        with _rollback_on_error(self.down):
            self._start_all(state, with_s3, log)

    def expected_processes(self, state: ClusterState | None) -> list[Process]:
        """Return the processes that should run: all of them, but the S3 server only if `state` has one."""
        has_s3 = state is not None and state.s3 is not None
        return [process for process in self.processes if process is not self.s3 or has_s3]

    def down(self, wipe: bool = False) -> list[str]:
        """Stop all processes, Ray first. Returns the names of the processes that had to be killed."""
        state = read_state(self.home)
        killed = stop(self.ray.processes.values())
        if state is not None:
            self.ray.keep_logs(state)
            if state.s3 is not None:
                stop_s3_server(self.s3, state.s3)
        killed += stop([self.s3])
        if wipe:
            for name in ("s3", "cache", "logs", "pids"):
                shutil.rmtree(self.home / name, ignore_errors=True)
            for name in ("cluster.json", "env", "ray_token"):
                (self.home / name).unlink(missing_ok=True)
        return killed

    def environment(self, state: ClusterState) -> dict[str, str]:
        """Return the environment variables that a shell needs to use the cluster."""
        storage = state.s3.environment() | {"AWS_EC2_METADATA_DISABLED": "true"} if state.s3 else {}
        device = {} if self.ray.gpus else {"DS_ACCELERATOR": "cpu"}
        ray = {"RAY_ADDRESS": state.dashboard, **self.ray.authentication()}
        return storage | ray | device | NODE_ENVIRONMENT | {"BAM_CACHE": str(self.home / "cache")}

    def _restart_workers(self, state: ClusterState, names: list[str]) -> None:
        remains = [self.ray.processes[name] for name in names]
        stop(remains)
        with _rollback_on_error(lambda: stop(remains)):
            self.ray.start(state, self._node_environment(state), only=names)

    def _start_all(self, state: ClusterState | None, with_s3: bool, log: Callable[[str], None]) -> None:
        started = time.monotonic()
        settings = None
        if with_s3:
            s3_settings = state.s3 if state and state.s3 else S3Settings.generate()
            settings = start_s3_server(self.s3, self.home / "s3", s3_settings)
            log(f"blob store    {settings.endpoint}  SeaweedFS, data in {self.home / 's3'}")
        state = self.ray.plan(state, settings)
        write_state(self.home, state)
        self._write_env(state)
        self.ray.start(state, self._node_environment(state))
        kinds = ", ".join(f"{node.name} {node.cpus} CPU" for node in NODES)
        log(f"Ray           {state.dashboard}  {kinds}")
        log(f"up in {time.monotonic() - started:.0f} s; next: . {self.home / 'env'}")

    def _node_environment(self, state: ClusterState) -> dict[str, str]:
        return self.ray.environment(state, self.environment(state))

    def _write_env(self, state: ClusterState) -> None:
        lines = ["# Addresses and credentials of the local cluster. Load them with `. .bam/env`."]
        if state.s3 is not None:  # they would take precedence over the credentials below
            lines.append("unset AWS_SESSION_TOKEN AWS_SECURITY_TOKEN AWS_PROFILE AWS_ENDPOINT_URL_S3")
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment(state).items()]
        lines.append(f'export PATH={shlex.quote(sysconfig.get_path("scripts"))}:"$PATH"')
        write_private(self.home / "env", "\n".join(lines) + "\n")


app = typer.Typer(add_completion=False, no_args_is_help=True, help="A Ray cluster and an S3 server on this machine.")
Home = Annotated[Path, typer.Option("--home", envvar="BAM_HOME", help="The folder of the state of the cluster.")]
HOME = Path(".bam")


@app.command()
def up(
    home: Home = HOME,
    s3: Annotated[
        bool,
        typer.Option(
            "--s3/--no-s3", help="Start an S3 server. With --no-s3, use the AWS_* variables of the environment."
        ),
    ] = True,
) -> None:
    """Start the cluster. If it runs already, only dead nodes are restarted."""
    with _exclusive(home):
        LocalCluster(home).up(s3, typer.echo)


@app.command()
def down(
    home: Home = HOME,
    wipe: Annotated[bool, typer.Option("--wipe", help="Also remove the data and all other state.")] = False,
) -> None:
    """Stop the cluster. The data stays."""
    with _exclusive(home):
        cluster = LocalCluster(home)
        running = any(process.family() for process in cluster.processes)
        killed = cluster.down(wipe)
        typer.echo("the local cluster is down" if running else "the local cluster was not up")
        if killed:
            typer.echo(f"killed after 15 s: {', '.join(killed)}")


@app.command()
def status(home: Home = HOME) -> None:
    """Show every process. The exit code is 1 if one of them does not run."""
    cluster = LocalCluster(home)
    state = read_state(cluster.home)
    expected = cluster.expected_processes(state)
    addresses = {"s3": state.s3.endpoint if state.s3 else "", "head": state.dashboard} if state else {}
    typer.echo(f"{'process':<8} {'pid':>8} {'MiB':>6}  address")
    for process in expected:
        pid = process.pid()
        address = addresses.get(process.name) or (f"bam/kind={process.name}" if state else "")
        typer.echo(f"{process.name:<8} {pid or 'down':>8} {process.memory_mib():6.0f}  {address}")
    if any(process.pid() is None for process in expected):
        raise typer.Exit(1)


@app.command()
def env(home: Home = HOME) -> None:
    """Print the shell commands that connect `bam` and `ray job submit` to the cluster."""
    path = home / "env"
    if not path.exists():
        raise ClusterError(f"{path} does not exist: start the cluster first (up)")
    typer.echo(path.read_text(), nl=False)


@contextmanager
def _rollback_on_error(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` if the body fails, so that no part of the cluster keeps running."""
    try:
        yield
    except BaseException:  # including Ctrl-C
        undo()
        raise


@contextmanager
def _exclusive(home: Path) -> Iterator[None]:
    """Hold a lock on `home`: two concurrent `up` commands would start every process twice."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "lock").open("w")
    except OSError as error:
        raise ClusterError(
            f"{home} cannot hold the state of the cluster ({error.strerror}): choose another folder with BAM_HOME"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Run the command line. A `BamError` is printed as one line, and the exit code is 1."""
    try:
        app()
    except BamError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
