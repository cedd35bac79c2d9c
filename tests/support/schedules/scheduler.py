"""A scheduler of threads that share a blob store, in the style of Jepsen.

Every thread stops before each of its store operations. The scheduler chooses which thread performs its next one, and
whether the operation succeeds, fails, takes effect although its answer is lost, or whether the thread is killed before
or after it. The seed decides everything, so a schedule that fails can be repeated.
"""

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_ray.blobs.memory import MemoryStore
from bam_ray.errors import StoreUnavailable

OPERATIONS = ("put", "put_if_absent", "put_file", "get", "get_range", "get_file", "size", "exists", "delete")


class ThreadKilledError(BaseException):
    """The process of a thread was killed. Nothing in the code under test catches this."""


@dataclass(frozen=True)
class Faults:
    """The probabilities of faults in each operation."""

    fails: float = 0.0
    answer_is_lost: float = 0.0
    killed: float = 0.0


class ScheduledStore:
    """The view that one thread has of a shared store."""

    def __init__(self, store: MemoryStore, perform: Callable[[Callable[[], Any]], Any]) -> None:
        self._store, self._perform = store, perform

    @property
    def uri(self) -> str:
        return self._store.uri

    def __getattr__(self, name: str) -> Callable[..., Any]:
        assert name in OPERATIONS, name
        operation = getattr(self._store, name)
        return lambda *arguments: self._perform(lambda: operation(*arguments))

    def list(self, prefix: str = "") -> Iterator[str]:
        keys: list[str] = self._perform(lambda: list(self._store.list(prefix)))
        return iter(keys)


class Scheduler:
    """Threads that share `store`; `after_each` is called between the operations."""

    def __init__(self, seed: int, store: MemoryStore, faults: Faults, after_each: Callable[[], None]) -> None:
        self.random = random.Random(seed)
        self._store, self._faults, self._after_each = store, faults, after_each
        self._waiting: list[threading.Event] = []  # one for each operation that waits for its turn
        self._changed = threading.Condition()
        self._started = 0
        self._busy = 0  # threads that are neither waiting nor finished
        self._killed: set[int] = set()
        self.errors: list[BaseException] = []

    def start(self, work: Callable[[ScheduledStore], None]) -> None:
        """Start a thread that does `work` with its own view of the store."""
        identity = self._started = self._started + 1

        def perform(operation: Callable[[], Any]) -> Any:
            turn = threading.Event()
            with self._changed:
                self._waiting.append(turn)
                self._busy -= 1
                self._changed.notify_all()
            turn.wait()
            return self._perform(identity, operation)

        def run() -> None:
            try:
                work(ScheduledStore(self._store, perform))
            except ThreadKilledError:
                pass
            except BaseException as error:
                self.errors.append(error)
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

        with self._changed:
            self._busy += 1
        threading.Thread(target=run, daemon=True).start()

    def _perform(self, identity: int, operation: Callable[[], Any]) -> Any:
        if identity in self._killed:  # another operation of the same process, which had begun before
            raise ThreadKilledError
        draw = self.random.random()
        if draw < self._faults.fails:
            raise StoreUnavailable("the request failed")
        result = operation()
        draw -= self._faults.fails
        if draw < self._faults.answer_is_lost:
            raise StoreUnavailable("the answer was lost")
        if draw - self._faults.answer_is_lost < self._faults.killed:
            self._killed.add(identity)
            raise ThreadKilledError
        return result

    def step(self) -> bool:
        """Let one thread perform one operation; return False if all have finished."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._busy == 0, timeout=30.0), "a thread hangs"
            self._after_each()
            if not self._waiting:
                return False
            turn = self._waiting.pop(self.random.randrange(len(self._waiting)))
            self._busy += 1
        turn.set()
        return True

    def finish(self) -> None:
        """Step until all threads have finished; raise the first error that one of them did not expect."""
        while self.step():
            pass
        if self.errors:
            raise self.errors[0]


class SerialExecutor:
    """A `ThreadPoolExecutor` that does everything in the calling thread, which the scheduler can follow."""

    def __init__(self, max_workers: int) -> None:
        pass

    def __enter__(self) -> "SerialExecutor":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(work, items)


def write_files(folder: Path, content: str) -> Path:
    """Write two small files, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "curve.json"):
        (folder / name).write_text(f"{name} of {content}")
    return folder
