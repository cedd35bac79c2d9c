"""The curves of training, as TensorBoard event files in the blob store and in Weights & Biases.

    <kind>/<id>/tensorboard/<attempt>-<part>.tfevents

A run that resumes from a checkpoint or rolls back starts a new file, which makes TensorBoard forget all later steps of
earlier files. A curve therefore has each step once. To view the curves, `aws s3 sync` the folder and run
`tensorboard --logdir` on it.
"""

import contextlib
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.checkpoint.scratch import new_scratch_folder, remove_scratch_folder
from bam_ray.errors import SettingsError, StoreError
from bam_ray.settings import MetricsSettings

MAX_FILE_BYTES = 4 << 20  # a file is uploaded whole each time, so a long run starts new files


class CurveWriter:
    """A writer of scalars to the destinations in the settings."""

    def __init__(self, settings: MetricsSettings, artifact: Artifact, name: str, attempt: AttemptNumber | None) -> None:
        """Prepare the curves of `artifact`; nothing is written before `open`.

        Args:
            settings: The destinations.
            artifact: The artifact that is trained.
            name: The name of the task, as Weights & Biases shows it.
            attempt: The number of the attempt; None (ranks above 0): nothing is ever written.
        """
        self._settings, self._artifact, self._name, self._attempt = settings, artifact, name, attempt
        self._board: _TensorBoard | None = None
        self._wandb: Any = None

    def open(self, step: int) -> None:
        """Open the destinations; the curves continue after `step`."""
        if self._attempt is None:
            return
        if self._settings.wandb_project is not None:
            self._wandb = _wandb_run(self._settings.wandb_project, self._artifact, self._name)
        if self._settings.tensorboard:
            with contextlib.suppress(OSError):
                self._board = _TensorBoard(self._artifact, self._attempt, step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add one step."""
        self._with_board(lambda board: board.write(step, scalars))
        if step % 1000 == 0:
            self._with_board(lambda board: board.start_file(step) if board.is_large() else None)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)  # steps that were logged before are ignored

    def roll_back(self, step: int) -> None:
        """Forget everything that was written after `step`."""
        self._with_board(lambda board: board.start_file(step))

    def flush(self) -> None:
        """Upload what has been written."""
        self._with_board(lambda board: board.upload())

    def close(self) -> None:
        """Upload everything and close all files."""
        self._with_board(lambda board: board.close())
        if self._wandb is not None:
            self._wandb.finish()

    def _with_board(self, operation: Callable[["_TensorBoard"], None]) -> None:
        """Call `operation`, unless TensorBoard files are disabled.

        A full disk only ends the curves. Whether training can continue is decided when a checkpoint is written.
        """
        board = self._board
        if board is not None:
            try:
                operation(board)
            except OSError:
                self._board = None
                remove_scratch_folder(board.folder)


class _TensorBoard:
    """The event files of one attempt. One thread writes; another thread may upload at the same time."""

    def __init__(self, artifact: Artifact, attempt: AttemptNumber, step: int) -> None:
        self._store, self._prefix, self._attempt = artifact.store, f"{artifact.prefix}/tensorboard", attempt
        self.folder = new_scratch_folder("tensorboard")
        self._lock = threading.Lock()
        self._part = 0
        self._uploaded = 0  # the parts before this one are complete in the store
        self._step = step
        self._writer = self._new_writer()

    def start_file(self, step: int) -> None:
        """Start a new file, which invalidates the steps after `step` in earlier files."""
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
        """Upload the current file, and earlier files whose upload failed."""
        with self._lock:
            self._writer.flush()
            last = self._part
        with contextlib.suppress(StoreError):  # the next upload includes them
            for part in range(self._uploaded, last + 1):
                # TensorBoard reads files in the order of their names
                key = f"{self._prefix}/{self._attempt}-{part:04d}.tfevents"
                self._store.put_file(key, self._file(part))
                self._uploaded = part

    def is_large(self) -> bool:
        """Return True if it is time for a new file."""
        return self._file(self._part).stat().st_size > MAX_FILE_BYTES

    def close(self) -> None:
        self.upload()
        self._writer.close()
        remove_scratch_folder(self.folder)

    def _new_writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # this import takes a second

        return SummaryWriter(str(self.folder / str(self._part)), purge_step=self._step + 1)

    def _file(self, part: int) -> Path:
        (file,) = (self.folder / str(part)).iterdir()
        return file


def _wandb_run(project: str, artifact: Artifact, name: str) -> Any:
    """Return the artifact's run in a project: a new run, or the one of an earlier attempt.

    With WANDB_MODE=offline it needs no network.
    """
    try:
        import wandb
    except ImportError:
        raise SettingsError(
            "metrics.wandb_project is set, but the package wandb is not installed: run `pip install wandb`"
        ) from None
    try:
        return wandb.init(
            project=project,
            id=artifact.id,
            name=name,
            group=artifact.kind,
            resume="allow",
            dir=tempfile.gettempdir(),
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        message = " ".join(str(error).split())
        raise SettingsError(
            f"Weights & Biases does not start ({message}): set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from None
