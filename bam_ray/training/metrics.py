"""Curves of training as TensorBoard event files in the blob store, and in Weights & Biases.

    <kind>/<id>/tensorboard/<attempt>-<part>.tfevents

A run that goes back (resumed from a checkpoint, or rolled back) begins a new file that tells TensorBoard to forget all
steps past that one, so a curve has each step once. To look: `aws s3 sync` the folder, `tensorboard --logdir` it.
"""

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bam_ray.blobs import BlobStore
from bam_ray.errors import SettingsError, StoreError
from bam_ray.settings import MetricsSettings

LARGEST_FILE = 4 << 20  # bytes; a file is uploaded whole each time, so a long run begins others


class Metrics:
    """Writes scalars where `settings` say; `attempt` None (ranks above 0): nowhere."""

    def __init__(
        self, settings: MetricsSettings, store: BlobStore, prefix: str, name: str, attempt: int | None, step: int
    ) -> None:
        """Of the artifact under `prefix`, called `name`; goes on after `step`."""
        self._board: _TensorBoard | None = None
        self._wandb: Any = None
        if attempt is None:
            return
        if settings.wandb_project is not None:
            self._wandb = _wandb_run(settings.wandb_project, prefix, name)
        if settings.tensorboard:
            with contextlib.suppress(OSError):
                self._board = _TensorBoard(store, prefix, attempt, step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add one step."""
        self._draw(lambda board: board.write(step, scalars))
        if step % 1000 == 0:
            self._draw(lambda board: board.begin(step) if board.grown() else None)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)  # steps that it had before are ignored

    def go_back(self, step: int) -> None:
        """Forget what was written past `step`."""
        self._draw(lambda board: board.begin(step))

    def flush(self) -> None:
        """Upload what there is."""
        self._draw(lambda board: board.upload())

    def close(self) -> None:
        """Upload all, and end."""
        self._draw(lambda board: board.close())
        if self._wandb is not None:
            self._wandb.finish()

    def _draw(self, what: Callable[["_TensorBoard"], None]) -> None:
        """Where there is a board still: a curve ends where the disk is full. It is not worth a run, and whether the run
        can go on its checkpoints will tell."""
        board = self._board
        if board is not None:
            try:
                what(board)
            except OSError:
                self._board = None
                shutil.rmtree(board.folder, ignore_errors=True)


class _TensorBoard:
    """Event files of one attempt. One thread writes; another may upload meanwhile."""

    def __init__(self, store: BlobStore, prefix: str, attempt: int, step: int) -> None:
        self._store, self._prefix, self._attempt = store, f"{prefix}/tensorboard", attempt
        self.folder = Path(tempfile.mkdtemp(prefix="bam-tensorboard-"))
        self._lock = threading.Lock()
        self._part = 0
        self._sent = 0  # parts before it lie in the store as they will stay
        self._step = step
        self._writer = self._new_writer()

    def begin(self, step: int) -> None:
        """A new file, which says that what others have of steps past `step` does not hold."""
        self.upload()
        with self._lock:
            self._writer.close()
            self._part += 1
            self._step = step
            self._writer = self._new_writer()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._step = step
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def upload(self) -> None:
        """Put the file that is being written, and those before it that the store did not take."""
        with self._lock:
            self._writer.flush()
            last = self._part
        with contextlib.suppress(StoreError):  # goes with the next
            for part in range(self._sent, last + 1):
                # TensorBoard reads files in the order of their names
                key = f"{self._prefix}/{self._attempt:04d}-{part:04d}.tfevents"
                self._store.put_file(key, self._file(part))
                self._sent = part

    def grown(self) -> bool:
        """Whether it is time for another file."""
        return self._file(self._part).stat().st_size > LARGEST_FILE

    def close(self) -> None:
        self.upload()
        self._writer.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _new_writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports

        return SummaryWriter(str(self.folder / str(self._part)), purge_step=self._step + 1)

    def _file(self, part: int) -> Path:
        (file,) = (self.folder / str(part)).iterdir()
        return file


def _wandb_run(project: str, prefix: str, name: str) -> Any:
    """The run of this artifact in a project: a new one, or the one that it had; WANDB_MODE=offline needs no network."""
    try:
        import wandb
    except ImportError:
        raise SettingsError(
            "metrics.wandb_project is set, but the package wandb is not installed: run `pip install wandb`"
        ) from None
    kind, _, id = prefix.partition("/")
    try:
        return wandb.init(
            project=project,
            id=id,
            name=name,
            group=kind,
            resume="allow",
            dir=tempfile.gettempdir(),
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        said = " ".join(str(error).split())
        raise SettingsError(
            f"Weights & Biases does not start ({said}): set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from None
