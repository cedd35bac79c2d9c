"""Every error a user can cause, as one tree. The command line prints the message as one line and exits with 1.

BamError
├── SettingsError          a recipe or an override is wrong
├── DataError              a corpus is missing, empty or unreadable
├── StoreError             the blob store failed
│   ├── BlobNotFound       no such key
│   ├── BlobExists         a conditional put lost: the key is there already
│   ├── NoConditionalPut   the store cannot put a key only where it is absent
│   ├── StoreDenied        wrong credentials or no permission
│   └── StoreUnavailable   endpoint down, bucket missing, disk full
├── CheckpointError        a checkpoint cannot be used
│   ├── DigestMismatch     a file is not what its manifest says
│   └── StaleLease         a newer attempt owns this artifact: this writer must stop
├── FamilyError            an architecture that is not supported, or weights that do not fit it
├── UpcycleError           seed and branches cannot become one mixture
├── PlacementError         no node can ever meet a demand
├── TrainingError          a training run cannot go on (out of memory, no checkpoint can be written)
│   ├── LossNotFinite      the loss or its gradient is NaN or infinite
│   └── LossSpiked         the loss or its gradient is far above what it was
├── ServingError           the server cannot start or a request cannot be met
└── Interrupted            work was asked to stop and stopped cleanly: the same command goes on
"""


class BamError(Exception):
    """Root of all errors that a user can cause. The message is one line: what is wrong and how to mend it."""


class SettingsError(BamError):
    """A recipe or an override is wrong."""


class DataError(BamError):
    """A corpus is missing, empty or unreadable."""


class StoreError(BamError):
    """The blob store failed."""


class BlobNotFound(StoreError):
    """No such key."""


class BlobExists(StoreError):
    """A conditional put lost: the key is there already."""


class NoConditionalPut(StoreError):
    """The store cannot put a key only where it is absent: racing writers could both believe that they won."""


class StoreDenied(StoreError):
    """Wrong credentials or no permission."""


class StoreUnavailable(StoreError):
    """Endpoint down, bucket missing, disk full."""


class CheckpointError(BamError):
    """A checkpoint cannot be used."""


class DigestMismatch(CheckpointError):
    """A file is not what its manifest says."""


class StaleLease(CheckpointError):
    """A newer attempt owns this artifact: this writer must stop."""


class FamilyError(BamError):
    """An architecture that is not supported, or weights that do not fit it."""


class UpcycleError(BamError):
    """Seed and branches cannot become one mixture."""


class PlacementError(BamError):
    """No node can ever meet a demand."""


class TrainingError(BamError):
    """A training run cannot go on."""


class LossNotFinite(TrainingError):
    """The loss or its gradient is NaN or infinite."""


class LossSpiked(TrainingError):
    """The loss or its gradient is far above what it was."""


class ServingError(BamError):
    """The server cannot start or a request cannot be met."""


class Interrupted(BamError):
    """Work was asked to stop and stopped cleanly: the same command goes on where it stood."""


def one_line(error: BaseException) -> str:
    """An error for people: its message's first line, with its type's name where it is none of ours."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, BamError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
