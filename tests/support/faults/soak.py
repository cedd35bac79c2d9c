"""Many random faults in a row on one cluster, by a schedule drawn from a seed: `make soak`.

    BAM_SOAK_SECONDS=600 BAM_SOAK_SEED=7 python -m tests.support.faults.soak

Runs of four branches on three nodes follow one another while faults occur one at a time. Each fault is repaired after
the number of seconds in the schedule, and the next one follows after its pause. The branches of every run must reach
the results of a run without faults. The schedule depends only on the seed; at which step a fault occurs depends on the
speed of the machine. The processes of the cluster authenticate each other with a token, as those of real clusters do.
"""

import contextlib
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import MANIFEST
from bam_ray.errors import BlobNotFound
from tests.support.faults import flaky_proxy
from tests.support.faults.branch_checks import attempts, check_branches
from tests.support.faults.cluster_under_test import ClusterUnderTest
from tests.support.faults.drivers import DriverProcess
from tests.support.faults.nodes import send, wait_for
from tests.support.faults.reference_run import ReferenceRun, branch_id
from tests.support.faults.small_disk import SmallDisk

DOMAINS = ("code", "law", "prose", "verse")
STEPS = 400
STEP_SECONDS = 0.1  # so that a branch spends most of its time in training, not in the start of its process
# Faults are minutes apart here, not days: a branch may fail many times before its next checkpoint
MAX_ATTEMPTS = 1000
STARTED = "BAM_SOAK_STARTED"  # in the environment of a process that has a token
HANG_SECONDS = 10.0  # a hung worker is replaced after twice this time
CHANCE = 0.3  # of a request whose answer is lost or cut
DURATIONS = (2.0, 5.0, 10.0)  # seconds
OTHER_DURATIONS = {
    "node_drained": (16.0,),
    "worker_hung": (5.0, 45.0),  # it goes on, or is replaced
    "second_driver": (30.0, 60.0),
    "store_denying": (10.0, 30.0),
}


@dataclass(frozen=True)
class Fault:
    """One entry of the schedule: a fault that occurs after `pause` seconds and is repaired after `lasts` seconds."""

    pause: float
    name: str
    target: int  # the number of a node or a branch
    lasts: float

    def __str__(self) -> str:
        return f"after {self.pause:4.1f} s: {self.name} {self.target} for {self.lasts:4.1f} s"


class Soak:
    """The cluster and the run that it executes."""

    def __init__(self, cluster: ClusterUnderTest, reference: ReferenceRun, disks: list[SmallDisk]) -> None:
        self.cluster, self._reference, self.disks = cluster, reference, disks
        self.workers = [node for name, node in cluster.nodes.items() if name != "head"]
        self.committed = self.attempts = self.rounds = 0
        self._driver_lost = False
        self._start_run()

    def _start_run(self) -> None:
        name = f"round-{self.rounds}"
        self.store: BlobStore = self.cluster.store(name)
        self.recipe = self._reference.recipe(self.cluster.uri(name), self.cluster.proxy.endpoint, MAX_ATTEMPTS)
        self._reference.copy_seed_to(self.store)
        self.driver: DriverProcess = self.cluster.submit(self.recipe, STEP_SECONDS)

    def poll(self) -> None:
        """Submit the run again if its driver was killed; check a run that has ended and start the next one."""
        if self.driver.is_running:
            return
        code = self.driver.join()
        if code != 0:
            assert self._driver_lost, f"the run ended with {code}:\n{self.driver.output[-3000:]}"
            self._driver_lost = False
            self.driver = self.cluster.submit(self.recipe, STEP_SECONDS)
            return
        self.check()
        self._start_run()

    def check(self) -> None:
        """Check the branches of the run that has ended."""
        logs = check_branches(self.store, self.recipe, self._reference.expected)
        self.rounds += 1
        self.committed += len(logs)
        self.attempts += sum(map(len, logs.values()))

    def finish(self) -> None:
        """Wait for the end of the current run."""
        while self.driver.join() != 0:
            self.poll()
        self.check()

    def wait(self, seconds: float) -> None:
        """Wait while runs are executed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.poll()
            time.sleep(min(0.5, max(0.0, until - time.monotonic())))

    def _wait_for_driver(self) -> None:
        """Wait until the driver has opened the store: one that cannot open it ends with an error at once."""
        first = f"{self.recipe.name}: running"  # the first line of the table, which comes after all warnings
        wait_for("the driver has started", lambda: first in self.driver.output or not self.driver.is_running)

    def _worker_pids(self, target: int) -> list[int]:
        """Return the id of the process of a branch, in a list that is empty if it is not in training."""
        logs = attempts(self.store, self.recipe, DOMAINS[target % len(DOMAINS)])
        started = logs[-1].named("started") if logs else []
        ended = logs and (logs[-1].named("finished") or logs[-1].named("failed"))
        return [event["pid"] for event in started[:1] if not ended]

    # The faults; each is repaired when its context ends

    @contextlib.contextmanager
    def worker_killed(self, target: int) -> Iterator[None]:
        """Send SIGKILL to the process of a branch."""
        send(signal.SIGKILL, self._worker_pids(target))
        yield

    @contextlib.contextmanager
    def worker_hung(self, target: int) -> Iterator[None]:
        """Suspend the process of a branch."""
        pids = self._worker_pids(target)
        send(signal.SIGSTOP, pids)
        yield
        send(signal.SIGCONT, pids)

    @contextlib.contextmanager
    def raylet_killed(self, target: int) -> Iterator[None]:
        """Send SIGKILL to a node's raylet."""
        self.workers[target].kill_raylet()
        yield

    @contextlib.contextmanager
    def raylet_terminated(self, target: int) -> Iterator[None]:
        """Send SIGTERM to a node's raylet, and kill the node at the end."""
        self.workers[target].terminate_raylet()
        yield
        self.workers[target].kill()

    @contextlib.contextmanager
    def node_drained(self, target: int) -> Iterator[None]:
        """Announce the termination of a node, and kill the node at the end."""
        self.workers[target].drain(15)
        yield
        self.workers[target].kill()

    @contextlib.contextmanager
    def node_cut_off(self, target: int) -> Iterator[None]:
        """Suspend the processes of a node."""
        self.workers[target].freeze()
        yield
        self.workers[target].resume()

    @contextlib.contextmanager
    def driver_killed(self, target: int) -> Iterator[None]:
        """Send SIGKILL to the driver."""
        self._driver_lost = True
        self.driver.kill()
        yield

    @contextlib.contextmanager
    def second_driver(self, target: int) -> Iterator[None]:
        """Submit the run once more, and kill one of its drivers at the end."""
        other = self.cluster.submit(self.recipe, STEP_SECONDS)
        yield
        if target % 2:
            self.driver, other = other, self.driver
        other.kill()

    @contextlib.contextmanager
    def head_killed(self, target: int) -> Iterator[None]:
        """Kill the head, which ends the driver."""
        self._driver_lost = True
        self.cluster.nodes["head"].kill()
        self.driver.join()
        yield

    @contextlib.contextmanager
    def store_killed(self, target: int) -> Iterator[None]:
        """Send SIGKILL to the S3 server."""
        self._wait_for_driver()
        self.cluster.kill_s3()
        yield

    @contextlib.contextmanager
    def store_refusing(self, target: int) -> Iterator[None]:
        """Let the store answer 503."""
        self.cluster.proxy.refuse()
        yield

    @contextlib.contextmanager
    def store_slow(self, target: int) -> Iterator[None]:
        """Make the store ten times slower."""
        self.cluster.proxy.slow_down(10.0)
        yield

    @contextlib.contextmanager
    def store_denying(self, target: int) -> Iterator[None]:
        """Let the store answer 403."""
        self._wait_for_driver()
        self.cluster.proxy.add(flaky_proxy.Fault.denied())
        yield

    @contextlib.contextmanager
    def answers_lost(self, target: int) -> Iterator[None]:
        """Close some connections after the store has carried out a request, instead of its answer."""
        self.cluster.proxy.add(flaky_proxy.Fault.lost_answer(chance=CHANCE))
        yield

    @contextlib.contextmanager
    def bodies_cut(self, target: int) -> Iterator[None]:
        """Close some connections within the body of the store's answer."""
        self.cluster.proxy.add(flaky_proxy.Fault.cut_body(chance=CHANCE))
        yield

    @contextlib.contextmanager
    def checkpoint_damaged(self, target: int) -> Iterator[None]:
        """Damage the newest checkpoint of a branch."""
        domain = DOMAINS[target % len(DOMAINS)]
        prefix = f"branches/{branch_id(self.recipe, domain)}/steps/"
        newest = [key for key in self.store.list(prefix) if key.endswith(f"/{MANIFEST}")][-1:]
        for key in newest:
            with contextlib.suppress(BlobNotFound):  # it has been pruned
                self.store.put(key.replace(MANIFEST, "model.safetensors"), b"damaged")
        yield

    @contextlib.contextmanager
    def loss_not_finite(self, target: int) -> Iterator[None]:
        """Make the weights of the branch on a node NaN, once."""
        mark = self.workers[target].break_weights()
        yield
        mark.unlink(missing_ok=True)

    @contextlib.contextmanager
    def disk_full(self, target: int) -> Iterator[None]:
        """Fill a node's disk."""
        self.disks[target].fill()
        yield
        self.disks[target].empty()


WEIGHTS: dict[Callable[[Soak, int], contextlib.AbstractContextManager[None]], int] = {
    Soak.worker_killed: 3,
    Soak.worker_hung: 2,
    Soak.raylet_killed: 2,
    Soak.raylet_terminated: 1,
    Soak.node_drained: 2,
    Soak.node_cut_off: 2,
    Soak.driver_killed: 2,
    Soak.second_driver: 2,
    Soak.head_killed: 1,
    Soak.store_killed: 2,
    Soak.store_refusing: 2,
    Soak.store_slow: 1,
    Soak.store_denying: 2,
    Soak.answers_lost: 2,
    Soak.bodies_cut: 2,
    Soak.checkpoint_damaged: 1,
    Soak.loss_not_finite: 1,
    Soak.disk_full: 1,
}
FAULTS = {fault.__name__: fault for fault in WEIGHTS}


def schedule(seed: int, seconds: float) -> list[Fault]:
    """Return faults whose pauses and durations add up to at least `seconds`; they depend only on `seed`."""
    draw = random.Random(seed)
    entries: list[Fault] = []
    total = 0.0
    while total < seconds:
        (name,) = draw.choices(list(FAULTS), list(WEIGHTS.values()))
        fault = Fault(
            round(draw.uniform(2.0, 12.0), 1),
            name,
            draw.randrange(3),
            draw.choice(OTHER_DURATIONS.get(name, DURATIONS)),
        )
        entries.append(fault)
        total += fault.pause + fault.lasts
    return entries


def execute(soak: Soak, entries: list[Fault], seconds: float) -> Counter[str]:
    """Execute the schedule for `seconds` and wait for the end of the last run; return how often each fault occurred."""
    done: Counter[str] = Counter()
    started_at = time.monotonic()
    for entry in entries:
        soak.wait(entry.pause)
        if time.monotonic() - started_at > seconds:
            break
        if entry.name == "disk_full" and not soak.disks:
            continue
        print(f"{time.monotonic() - started_at:6.1f} s  {entry.name} {entry.target}", flush=True)
        with FAULTS[entry.name](soak, entry.target):
            time.sleep(entry.lasts)
        soak.cluster.restore()
        done[entry.name] += 1
    soak.finish()
    return done


def main() -> None:
    """Draw a schedule from BAM_SOAK_SEED and execute it for BAM_SOAK_SECONDS."""
    seconds = float(os.environ.get("BAM_SOAK_SECONDS") or 600)
    seed = int(os.environ.get("BAM_SOAK_SEED") or random.randrange(1_000_000))
    entries = schedule(seed, seconds)
    print(f"seed {seed}: {len(entries)} faults")
    for entry in entries:
        print(f"  {entry}")
    home = Path(tempfile.mkdtemp(prefix="bam-soak-"))
    print(f"logs are below {home}", flush=True)
    os.environ |= {
        "BAM_CACHE": str(home / "cache" / "reference"),
        "BAM_HANG_SECONDS": str(HANG_SECONDS),
        "OMP_NUM_THREADS": "1",
    }
    reference = ReferenceRun(home / "reference", DOMAINS, STEPS)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(ClusterUnderTest(home))
        disks: list[SmallDisk] = []
        try:
            for name, node in cluster.nodes.items():
                if name != "head":
                    disks.append(stack.enter_context(SmallDisk(node.temporary)))
        except OSError as error:
            print(f"disk_full is omitted: {error}", flush=True)
        soak = Soak(cluster, reference, disks)
        done = execute(soak, entries, seconds)
    shutil.rmtree(home)  # the logs are kept if an error occurred before
    occurred = ", ".join(f"{count} {name}" for name, count in sorted(done.items()))
    print(f"seed {seed}: {occurred}")
    print(f"{soak.rounds} runs, {soak.committed} branches in {soak.attempts} attempts: all results as expected")


def with_token() -> dict[str, str]:
    """Return the environment for a soak test with a new token."""
    others = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN_PATH"}
    return others | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), STARTED: "1"}


if __name__ == "__main__":
    if STARTED not in os.environ:  # Ray reads these variables when it is imported
        os.execve(sys.executable, [sys.executable, "-m", "tests.support.faults.soak"], with_token())
    main()
