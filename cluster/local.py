"""The local cluster: an S3 server, a Ray head and three worker nodes of different kinds, all on this machine.

    python -m cluster.local up          # `make cluster-up`
    . .bam/env                          # addresses and credentials, for `bam` and `ray job submit`
    python -m cluster.local status
    python -m cluster.local down        # `make cluster-down`; --wipe removes the data too

Each Ray node is a `ray start --block` process with its own loopback address, temporary folder and declared CPUs, so
that jobs meet what a cluster of several machines would show them: nodes of unequal size, nodes that die (kill one by
the pid that `status` shows), storage that only the network reaches. Ray asks for a token on every port.

All state is in `.bam/` of the current folder, or in `$BAM_HOME`: cluster.json and env (addresses and credentials, mode
0600), pids/, logs/, s3/ (the data), cache/. Ports are chosen among free ones and kept, so clusters of several checkouts
live side by side.
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
from cluster.state import State, read_state, write_private, write_state

QUIET = {
    "OMP_NUM_THREADS": "1",  # nodes share the cores of one machine
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits leaves its core to others
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "150",  # Ray's 3 s are too short for the last checkpoints of a stopped job
}


class LocalCluster:
    """The cluster whose state is in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.s3 = Process("s3", self.home)
        self.ray = RayNodes(self.home)

    @property
    def processes(self) -> list[Process]:
        """All of its processes, the S3 server first."""
        return [self.s3, *self.ray.processes.values()]

    def up(self, with_s3: bool, say: Callable[[str], None]) -> None:
        """Start what does not run; raises `ClusterError`, and leaves nothing half started."""
        state = read_state(self.home)
        expected = [process for process in self.processes if process is not self.s3 or (state or State()).s3]
        running = [process for process in expected if process.pid() is not None]
        if state and running:
            if with_s3 != (state.s3 is not None):
                raise ClusterError("the cluster runs with the other choice of S3 server: stop it first (down)")
            dead = [process.name for process in expected if process not in running]
            if not dead:
                say(f"the local cluster is up already: {len(NODES)} nodes, {state.dashboard}")
                return
            if not {"s3", "head"} & set(dead):
                say(f"starting again what died: {', '.join(dead)}")
                leftovers = [self.ray.processes[name] for name in dead]
                stop(leftovers)
                with _undone(lambda: stop(leftovers)):
                    self.ray.start(state, self._node_environment(state), only=dead)
                return
            say(f"{' and '.join(dead)} died: starting the whole cluster anew")
        self.down()
        with _undone(self.down):
            self._up_from_nothing(state, with_s3, say)

    def down(self, wipe: bool = False) -> list[str]:
        """Stop everything, Ray first; returns the names of processes that had to be killed."""
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

    def environment(self, state: State) -> dict[str, str]:
        """What a shell needs to use the cluster."""
        storage = state.s3.environment() | {"AWS_EC2_METADATA_DISABLED": "true"} if state.s3 else {}
        device = {} if self.ray.gpus else {"DS_ACCELERATOR": "cpu"}
        ray = {"RAY_ADDRESS": state.dashboard, **self.ray.authentication()}
        return storage | ray | device | QUIET | {"BAM_CACHE": str(self.home / "cache")}

    def _up_from_nothing(self, state: State | None, with_s3: bool, say: Callable[[str], None]) -> None:
        started = time.monotonic()
        settings = None
        if with_s3:
            kept = state.s3 if state and state.s3 else S3Settings.generate()
            settings = start_s3_server(self.s3, self.home / "s3", kept)
            say(f"blob store    {settings.endpoint}  SeaweedFS, data in {self.home / 's3'}")
        state = self.ray.plan(state, settings)
        write_state(self.home, state)
        self._write_env(state)
        self.ray.start(state, self._node_environment(state))
        kinds = ", ".join(f"{node.name} {node.cpus} CPU" for node in NODES)
        say(f"Ray           {state.dashboard}  {kinds}")
        say(f"up in {time.monotonic() - started:.0f} s; next: . {self.home / 'env'}")

    def _node_environment(self, state: State) -> dict[str, str]:
        return self.ray.environment(state, self.environment(state))

    def _write_env(self, state: State) -> None:
        lines = ["# The local cluster's addresses and credentials; load with `. .bam/env`"]
        if state.s3 is not None:  # what would go before or beside the credentials below
            lines.append("unset AWS_SESSION_TOKEN AWS_SECURITY_TOKEN AWS_PROFILE AWS_ENDPOINT_URL_S3")
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment(state).items()]
        lines.append(f'export PATH={shlex.quote(sysconfig.get_path("scripts"))}:"$PATH"')
        write_private(self.home / "env", "\n".join(lines) + "\n")


app = typer.Typer(add_completion=False, no_args_is_help=True, help="A Ray cluster and an S3 server on this machine.")
Home = Annotated[Path, typer.Option("--home", envvar="BAM_HOME", help="Folder of the cluster's state.")]
HOME = Path(".bam")


@app.command()
def up(
    home: Home = HOME,
    s3: Annotated[bool, typer.Option("--s3/--no-s3", help="--no-s3: use the AWS_* of the environment.")] = True,
) -> None:
    """Start the cluster; nothing happens where it runs, and dead nodes come back."""
    with _one_at_a_time(home):
        LocalCluster(home).up(s3, typer.echo)


@app.command()
def down(
    home: Home = HOME,
    wipe: Annotated[bool, typer.Option("--wipe", help="Remove the data and all other state as well.")] = False,
) -> None:
    """Stop the cluster. The data stays."""
    with _one_at_a_time(home):
        cluster = LocalCluster(home)
        running = any(process.family() for process in cluster.processes)
        killed = cluster.down(wipe)
        typer.echo("the local cluster is down" if running else "the local cluster was not up")
        if killed:
            typer.echo(f"killed after 15 s: {', '.join(killed)}")


@app.command()
def status(home: Home = HOME) -> None:
    """Show every process; exits with 1 where one does not run."""
    cluster = LocalCluster(home)
    state = read_state(cluster.home)
    expected = [process for process in cluster.processes if process is not cluster.s3 or (state or State()).s3]
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
    """Print the shell lines that point `bam` and `ray job submit` at the cluster."""
    path = home / "env"
    if not path.exists():
        raise ClusterError(f"{path} is not there: start the cluster first (up)")
    typer.echo(path.read_text(), nl=False)


@contextmanager
def _undone(undo: Callable[[], object]) -> Iterator[None]:
    """Leave nothing half started."""
    try:
        yield
    except BaseException:  # Ctrl-C too
        undo()
        raise


@contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Two `up` at once would start everything twice."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "lock").open("w")
    except OSError as error:
        raise ClusterError(f"{home} cannot hold the cluster's state: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Run the command line; a `BamError` becomes one line and exit code 1."""
    try:
        app()
    except BamError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
