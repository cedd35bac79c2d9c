"""Many faults in a row over one cluster, by a schedule drawn from a seed: `make soak`.

    BAM_SOAK_SECONDS=600 BAM_SOAK_SEED=7 python -m faults.soak

Runs of four branches on three nodes follow one another while faults befall them, one at a time: each is made good after
the seconds that the schedule gives it, and the next comes after its pause. Every run must end with all its branches as
in an undisturbed one. The same seed gives the same schedule; which step a fault meets is the machine's to say.
"""

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.checking import attempts, check_branches
from faults.disk import SmallDisk
from faults.tale import Tale, branch_id
from faults.world import Run, World, send

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import MANIFEST
from bam_ray.errors import BlobNotFound

DOMAINS = ("code", "law", "prose", "verse")
STEPS = 400
PACE = 0.1  # seconds a step: most of a branch's life is then training, not the start of its process
# Faults come by the minute here, not by the day: a branch may be hit many times before its next checkpoint
MAX_ATTEMPTS = 1000


@dataclass(frozen=True)
class Fault:
    """One entry of the schedule: what comes after `pause` seconds, whom it hits, and for how long."""

    pause: float
    name: str
    target: int  # of a node or a branch
    lasts: float

    def __str__(self) -> str:
        return f"after {self.pause:4.1f} s: {self.name} {self.target} for {self.lasts:4.1f} s"


class Soak:
    """The world, and the run that goes on in it."""

    def __init__(self, world: World, tale: Tale, disks: list[SmallDisk]) -> None:
        self.world, self._tale, self.disks = world, tale, disks
        self.workers = [node for name, node in world.nodes.items() if name != "head"]
        self.committed = self.attempts = self.rounds = 0
        self._driver_lost = False
        self._begin()

    def _begin(self) -> None:
        name = f"round-{self.rounds}"
        self.store: BlobStore = self.world.store(name)
        self.recipe = self._tale.recipe(self.world.uri(name), self.world.proxy.endpoint, MAX_ATTEMPTS)
        self._tale.begin(self.store)
        self.run: Run = self.world.submit(self.recipe, PACE)

    def look(self) -> None:
        """Submit again what lost its driver; check a run that ended, and begin the next."""
        if self.run.goes_on:
            return
        code = self.run.join()
        if code != 0:
            assert self._driver_lost, f"the run ended with {code}:\n{self.run.said[-3000:]}"
            self._driver_lost = False
            self.run = self.world.submit(self.recipe, PACE)
            return
        self.check()
        self._begin()

    def check(self) -> None:
        """That the run which ended is whole."""
        logs = check_branches(self.store, self.recipe, self._tale.unbroken)
        self.rounds += 1
        self.committed += len(logs)
        self.attempts += sum(map(len, logs.values()))

    def finish(self) -> None:
        """Let the run come to its end."""
        while self.run.join() != 0:
            self.look()
        self.check()

    def wait(self, seconds: float) -> None:
        """Let the run go on for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.look()
            time.sleep(min(0.5, max(0.0, until - time.monotonic())))

    # The faults; each is made good when its context ends

    @contextlib.contextmanager
    def worker_killed(self, target: int) -> Iterator[None]:
        domain = DOMAINS[target % len(DOMAINS)]
        logs = attempts(self.store, self.recipe, domain)
        started = logs[-1].named("started") if logs else []
        if started and not logs[-1].named("finished"):
            send(signal.SIGKILL, [started[0]["pid"]])
        yield

    @contextlib.contextmanager
    def raylet_killed(self, target: int) -> Iterator[None]:
        self.workers[target].kill_raylet()
        yield

    @contextlib.contextmanager
    def raylet_terminated(self, target: int) -> Iterator[None]:
        self.workers[target].terminate_raylet()
        yield
        self.workers[target].kill()

    @contextlib.contextmanager
    def node_drained(self, target: int) -> Iterator[None]:
        self.workers[target].drain(15)
        yield
        self.workers[target].kill()

    @contextlib.contextmanager
    def node_cut_off(self, target: int) -> Iterator[None]:
        self.workers[target].freeze()
        yield
        self.workers[target].thaw()

    @contextlib.contextmanager
    def driver_killed(self, target: int) -> Iterator[None]:
        self._driver_lost = True
        self.run.kill()
        yield

    @contextlib.contextmanager
    def head_killed(self, target: int) -> Iterator[None]:
        self._driver_lost = True
        self.world.nodes["head"].kill()
        self.run.join()
        yield

    @contextlib.contextmanager
    def store_killed(self, target: int) -> Iterator[None]:
        self.world.kill_s3()
        yield

    @contextlib.contextmanager
    def store_refusing(self, target: int) -> Iterator[None]:
        self.world.proxy.refuse()
        yield

    @contextlib.contextmanager
    def store_slow(self, target: int) -> Iterator[None]:
        self.world.proxy.slow_down(10.0)
        yield

    @contextlib.contextmanager
    def checkpoint_damaged(self, target: int) -> Iterator[None]:
        domain = DOMAINS[target % len(DOMAINS)]
        prefix = f"branches/{branch_id(self.recipe, domain)}/steps/"
        newest = [key for key in self.store.list(prefix) if key.endswith(f"/{MANIFEST}")][-1:]
        for key in newest:
            with contextlib.suppress(BlobNotFound):  # pruned meanwhile
                self.store.put(key.replace(MANIFEST, "model.safetensors"), b"damaged")
        yield

    @contextlib.contextmanager
    def loss_not_finite(self, target: int) -> Iterator[None]:
        mark = self.workers[target].break_weights()
        yield
        mark.unlink(missing_ok=True)

    @contextlib.contextmanager
    def disk_full(self, target: int) -> Iterator[None]:
        self.disks[target].fill()
        yield
        self.disks[target].empty()


WEIGHTS: dict[Callable[[Soak, int], contextlib.AbstractContextManager[None]], int] = {
    Soak.worker_killed: 3,
    Soak.raylet_killed: 2,
    Soak.raylet_terminated: 1,
    Soak.node_drained: 2,
    Soak.node_cut_off: 2,
    Soak.driver_killed: 2,
    Soak.head_killed: 1,
    Soak.store_killed: 2,
    Soak.store_refusing: 2,
    Soak.store_slow: 1,
    Soak.checkpoint_damaged: 1,
    Soak.loss_not_finite: 1,
    Soak.disk_full: 1,
}
FAULTS = {fault.__name__: fault for fault in WEIGHTS}


def schedule(seed: int, seconds: float) -> list[Fault]:
    """Faults whose pauses and durations fill that time, the same for the same seed."""
    draw = random.Random(seed)
    entries: list[Fault] = []
    total = 0.0
    while total < seconds:
        (name,) = draw.choices(list(FAULTS), list(WEIGHTS.values()))
        fault = Fault(
            round(draw.uniform(2.0, 12.0), 1),
            name,
            draw.randrange(3),
            16.0 if name == "node_drained" else draw.choice((2.0, 5.0, 10.0)),
        )
        entries.append(fault)
        total += fault.pause + fault.lasts
    return entries


def play(soak: Soak, entries: list[Fault], seconds: float) -> Counter[str]:
    """Let the schedule happen until time is up, and the last run end; returns what happened how often."""
    done: Counter[str] = Counter()
    began = time.monotonic()
    for entry in entries:
        soak.wait(entry.pause)
        if time.monotonic() - began > seconds:
            break
        if entry.name == "disk_full" and not soak.disks:
            continue
        print(f"{time.monotonic() - began:6.1f} s  {entry.name} {entry.target}", flush=True)
        with FAULTS[entry.name](soak, entry.target):
            time.sleep(entry.lasts)
        soak.world.mend()
        done[entry.name] += 1
    soak.finish()
    return done


def main() -> None:
    seconds = float(os.environ.get("BAM_SOAK_SECONDS") or 600)
    seed = int(os.environ.get("BAM_SOAK_SEED") or random.randrange(1_000_000))
    entries = schedule(seed, seconds)
    print(f"seed {seed}: {len(entries)} faults")
    for entry in entries:
        print(f"  {entry}")
    home = Path(tempfile.mkdtemp(prefix="bam-soak-"))
    print(f"what happens is logged below {home}", flush=True)
    os.environ |= {"BAM_CACHE": str(home / "cache" / "reference"), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    tale = Tale(home / "tale", DOMAINS, STEPS)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(World(home))
        disks: list[SmallDisk] = []
        try:
            for name, node in world.nodes.items():
                if name != "head":
                    disks.append(stack.enter_context(SmallDisk(node.temporary)))
        except OSError as error:
            print(f"disk_full is left out: {error}", flush=True)
        soak = Soak(world, tale, disks)
        done = play(soak, entries, seconds)
    shutil.rmtree(home)  # it stays where this was not reached
    happened = ", ".join(f"{count} {name}" for name, count in sorted(done.items()))
    print(f"seed {seed}: {happened}")
    print(f"{soak.rounds} runs, {soak.committed} branches in {soak.attempts} attempts: all whole, all as undisturbed")


if __name__ == "__main__":
    main()
