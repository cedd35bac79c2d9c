"""A store that fails when a test says so."""

from bam_ray.blobs.memory import MemoryStore
from bam_ray.errors import StoreError, StoreUnavailable


class FailingStore(MemoryStore):
    """A store that raises `failure` while it is set, and can lose the answer to the next conditional put."""

    failure: StoreError | None = None
    loses_next_answer = False

    def _admit(self) -> None:
        if self.failure is not None:
            raise self.failure

    def get(self, key: str) -> bytes:
        self._admit()
        return super().get(key)

    def put(self, key: str, data: bytes) -> None:
        self._admit()
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> None:
        self._admit()
        super().put_if_absent(key, data)
        if self.loses_next_answer:
            self.loses_next_answer = False
            raise StoreUnavailable("the answer was lost")

    def list(self, prefix: str = "") -> object:  # type: ignore[override]
        self._admit()
        return super().list(prefix)
