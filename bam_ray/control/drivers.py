"""The drivers that share a store: their epochs, their heartbeats, and which of them makes an artifact.

Problem: a run may be submitted twice, a driver may die without a word, and two recipes with common parts may use one
store. Each artifact should be made once, and no driver should wait for another one that is gone.

Design choice: every driver takes an epoch, which is the first part of the numbers of its attempts (see
`checkpoint.leases`), and writes a heartbeat every few seconds. A heartbeat lists the artifacts that the driver makes,
because an attempt has no lease while it waits for a node or starts. If another living driver makes an artifact, or has
its newest lease, a driver waits for the manifest. A driver counts as gone when its heartbeat has not changed for a
minute of the observer's own clock, so clocks need not agree. On the same machine, a process that has ended is noticed
at once.

Limits: a driver that is cut off from the store for a minute counts as gone. Its attempts then become stale, and no work
is lost up to their last checkpoints.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from bam_ray.blobs import BlobStore
from bam_ray.blobs.patience import Report, retry_on
from bam_ray.checkpoint.leases import epochs, newest_attempt, take_epoch
from bam_ray.errors import BlobNotFound, StoreError, StoreUnavailable

HEARTBEATS = "heartbeats/"
HEARTBEAT_SECONDS = 5.0
DRIVER_TIMEOUT = 60.0  # seconds without a heartbeat after which a driver counts as gone


class Drivers(Protocol):
    """The controller's view of its own driver and the others."""

    @property
    def epoch(self) -> int:
        """The epoch of this driver."""
        ...

    @property
    def has_company(self) -> bool:
        """True if another driver of the store is alive."""
        ...

    def refresh(self, at_once: bool = False) -> None:
        """Look for other drivers, if it is time to or `at_once`."""
        ...

    def owner_of(self, prefix: str) -> str | None:
        """Return a description of the living driver that makes the artifact under `prefix`; None if no other does.

        If a driver that is gone had a higher epoch than this one, this driver takes a new epoch.
        """
        ...

    def announce(self, prefixes: Collection[str]) -> None:
        """Tell the other drivers which artifacts this one makes now."""
        ...

    def give_up(self, prefixes: Collection[str]) -> None:
        """Tell the other drivers that this one will not make some artifacts; they may try."""
        ...


class LoneDriver:
    """The only driver of its store, for simulations and tests."""

    epoch = 1
    has_company = False

    def refresh(self, at_once: bool = False) -> None:
        """Do nothing."""

    def owner_of(self, prefix: str) -> None:
        """Return None."""

    def announce(self, prefixes: Collection[str]) -> None:
        """Do nothing."""

    def give_up(self, prefixes: Collection[str]) -> None:
        """Do nothing."""


@dataclass
class _OtherDriver:
    """Another driver, as its epoch and its heartbeats describe it."""

    token: str
    description: dict[str, Any]
    heard_at: float
    heartbeat: bytes = b""
    gone: bool = False
    making: frozenset[str] = field(default_factory=frozenset)
    given_up: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return _describe_driver(self.description)


class DriverRegistry:
    """This driver among those of a store.

    The store has answered before, so one that is unavailable now is asked again, see `retry_on`. All attempts write the
    same heartbeat.

    Args:
        store: The store of the run.
        run: The name of the run, for messages of other drivers.
        take_over: Treat all drivers that have been here before as gone.
        clock: Returns the time in seconds, from any origin.
        report: Called with one line before the store is asked again.

    Raises:
        StoreError: The store cannot be used.
    """

    def __init__(
        self,
        store: BlobStore,
        run: str,
        take_over: bool = False,
        clock: Callable[[], float] = time.monotonic,
        report: Report | None = None,
    ) -> None:
        self._store, self._run, self._clock = store, run, clock
        self._token = secrets.token_hex(8)
        self._beats = 0
        self._others: dict[int, _OtherDriver] = {}  # by epoch
        self._making: tuple[str, ...] = ()
        self._given_up: tuple[str, ...] = ()
        self._refreshed_at = float("-inf")
        self._ended = False
        self._wake = threading.Event()  # of the thread that writes heartbeats
        patiently = retry_on(StoreUnavailable, report)
        patiently(self.beat)
        self._own_epochs: list[int] = [patiently(take_epoch, store, self._describe())]
        if take_over:
            patiently(self._find_others)
            for other in self._others.values():
                other.gone = True

    @property
    def epoch(self) -> int:
        """The newest epoch of this driver."""
        return self._own_epochs[-1]

    @property
    def has_company(self) -> bool:
        """True if another driver of the store is alive."""
        return any(not other.gone for other in self._others.values())

    def refresh(self, at_once: bool = False) -> None:
        """Read the heartbeats of the other drivers, every `HEARTBEAT_SECONDS` or `at_once`; raises `StoreError`."""
        if not at_once and self._clock() - self._refreshed_at < HEARTBEAT_SECONDS:
            return
        self._refreshed_at = self._clock()
        self._find_others()
        living = {other.token: other for other in self._others.values() if not other.gone}
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(self._listen, living.values()))
        for other in self._others.values():  # a driver with several epochs has one heartbeat
            other.gone = other.gone or (other.token in living and living[other.token].gone)

    def owner_of(self, prefix: str) -> str | None:
        """See `Drivers`; raises `StoreError`."""
        newest = newest_attempt(self._store, prefix)
        if newest is not None and newest.epoch in self._own_epochs:
            return None
        for other in self._others.values():
            if not other.gone and prefix in other.making:
                return str(other)
        if newest is None:
            return None
        if newest.epoch not in self._others:
            self._find_others()
        owner = self._others.get(newest.epoch)
        if owner is not None and not owner.gone and prefix not in owner.given_up:
            return str(owner)
        while newest.epoch > self.epoch:
            self._own_epochs.append(take_epoch(self._store, self._describe()))
        return None

    def announce(self, prefixes: Collection[str]) -> None:
        """See `Drivers`; a heartbeat tells them at once."""
        making = tuple(sorted(prefixes))
        if making != self._making:
            self._making = making
            self._wake.set()

    def give_up(self, prefixes: Collection[str]) -> None:
        """See `Drivers`; the next heartbeat tells them."""
        self._given_up = tuple(prefixes)

    def beat(self, ended: bool = False) -> None:
        """Write a heartbeat; raises `StoreError`."""
        self._beats += 1
        content = {"beats": self._beats, "ended": ended, "making": self._making, "given_up": self._given_up}
        self._store.put(heartbeat_key(self._token), json.dumps(content).encode())

    @contextlib.contextmanager
    def beating(self) -> "Iterator[DriverRegistry]":
        """Write heartbeats in the background until the block ends, and then that this driver has ended."""
        thread = threading.Thread(target=self._beat_periodically, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended = True
            self._wake.set()
            thread.join()
            with contextlib.suppress(StoreError):
                self.beat(ended=True)

    def _beat_periodically(self) -> None:
        while not self._ended:
            self._wake.wait(HEARTBEAT_SECONDS)
            self._wake.clear()
            with contextlib.suppress(StoreError):
                self.beat()

    def _find_others(self) -> None:
        """Read the descriptions of the epochs that are new."""
        for epoch, description in _descriptions(self._store, self._others):
            if description["token"] != self._token:
                self._others[epoch] = _OtherDriver(description["token"], description, self._clock())

    def _listen(self, other: _OtherDriver) -> None:
        """Read the heartbeat of another driver, and decide whether it is gone."""
        heartbeat = _heartbeat(self._store, other.token) or b"{}"
        content = json.loads(heartbeat)
        now = self._clock()
        if heartbeat != other.heartbeat:
            other.heartbeat, other.heard_at = heartbeat, now
            other.making = frozenset(content.get("making", ()))
            other.given_up = frozenset(content.get("given_up", ()))
        silent = now - other.heard_at > DRIVER_TIMEOUT
        other.gone = bool(content.get("ended")) or silent or _has_died_here(other.description)

    def _describe(self) -> bytes:
        taken = datetime.now(UTC).isoformat(timespec="seconds")
        return json.dumps(
            {
                "token": self._token,
                "run": self._run,
                "host": socket.gethostname(),
                "taken": taken,
                "unique": secrets.token_hex(8),
                **_process_here(os.getpid()),
            }
        ).encode()


@dataclass(frozen=True)
class KnownDriver:
    """A driver that has worked on a store.

    Attributes:
        token: The name of its heartbeat.
        epochs: Its epochs, in order.
        description: The content of its newest epoch.
        alive: False if it has ended or is gone, and for a process without a controller.
    """

    token: str
    epochs: tuple[int, ...]
    description: dict[str, Any]
    alive: bool

    def __str__(self) -> str:
        return _describe_driver(self.description)


def known_drivers(store: BlobStore, patience: float = 4 * HEARTBEAT_SECONDS) -> list[KnownDriver]:
    """Return the drivers of a store, for a process that is none of them.

    A driver is gone if it says so, if its process was on this machine and has ended, or if it writes no heartbeat for
    `patience` seconds. Returns as soon as this is known of all drivers.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for epoch, description in _descriptions(store):
        found.setdefault(description["token"], {})[epoch] = description
    drivers = [KnownDriver(token, tuple(sorted(of)), of[max(of)], alive=False) for token, of in found.items()]
    first = {driver.token: _heartbeat(store, driver.token) for driver in drivers}
    undecided = {
        driver.token
        for driver in drivers
        if first[driver.token] and not _has_ended(first[driver.token]) and not _has_died_here(driver.description)
    }
    alive: set[str] = set()
    deadline = time.monotonic() + patience
    while undecided - alive and time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 10))
        alive |= {token for token in undecided - alive if _heartbeat(store, token) != first[token]}
    return [replace(driver, alive=driver.token in alive) for driver in drivers]


def _descriptions(store: BlobStore, known: Container[int] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each epoch that is not `known`, and the description of its driver."""
    for epoch, key in epochs(store):
        if epoch not in known:
            yield epoch, json.loads(store.get(key))


def heartbeat_key(token: str) -> str:
    """Return the key of the heartbeat of a driver."""
    return f"{HEARTBEATS}{token}.json"


def _heartbeat(store: BlobStore, token: str) -> bytes:
    """Return the heartbeat of a driver; empty for a process without a controller."""
    try:
        return store.get(heartbeat_key(token))
    except BlobNotFound:
        return b""


def _has_ended(heartbeat: bytes) -> bool:
    return bool(json.loads(heartbeat).get("ended"))


def _describe_driver(description: dict[str, Any]) -> str:
    since = description.get("taken", "an unknown time")
    return f"the driver of {description.get('run', 'a stage')} on {description.get('host')} since {since}"


def _process_here(pid: int) -> dict[str, Any]:
    """Describe a process of this machine so that it can be recognized; empty if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return {}
    return {"machine": f"{boot} {namespace}", "pid": pid, "started": started}


def _has_died_here(description: dict[str, Any]) -> bool:
    """Return True if a driver was a process of this machine that does not run any more."""
    here = _process_here(os.getpid())
    if not here or description.get("machine") != here["machine"]:
        return False
    return bool(_process_here(description["pid"]).get("started") != description["started"])
