"""All errors that a user can cause, as one tree, and the rendering of an error as one line.

The command line prints the message of a `BamError` as one line and exits with status 1.

BamError
├── SettingsError          a recipe or an override is wrong
├── DataError              a corpus is missing, empty or unreadable
├── StoreError             the blob store failed
│   ├── BlobNotFound       the key does not exist
│   ├── BlobExists         a conditional put failed because the key exists
│   ├── NoConditionalPut   the store does not support conditional puts
│   ├── StoreDenied        the credentials are wrong or a permission is missing
│   └── StoreUnavailable   the endpoint is down, the bucket is missing or the disk is full
│       └── StoreBusy      the server answers that it cannot serve a request now
├── CheckpointError        a checkpoint cannot be used
│   ├── DigestMismatch     a file differs from its manifest
│   └── StaleLease         a newer attempt owns this artifact, so this writer must stop
├── FamilyError            the architecture is not supported, or the weights do not match it
├── UpcycleError           the seed and the branches cannot become one mixture
├── PlacementError         no node can satisfy a resource request
├── TrainingError          training cannot continue (out of memory, or no checkpoint can be written)
│   ├── LossNotFinite      the loss or its gradient is NaN or infinite
│   └── LossSpiked         the loss or its gradient is far above its recent values
├── ServingError           the server cannot start or a request cannot be served
│   └── RetryLater         the request may succeed later
│       ├── Overloaded         the queue of the server is full
│       └── AdapterUnavailable an adapter cannot be loaded now
└── Interrupted            work stopped cleanly on request; the same command resumes it
"""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class BamError(Exception):
    """Root of all errors that a user can cause.

    The message is one line. It says what is wrong and what to do about it.
    """


class SettingsError(BamError):
    """A recipe or an override is wrong."""


class DataError(BamError):
    """A corpus is missing, empty or unreadable."""


class StoreError(BamError):
    """The blob store failed."""


class BlobNotFound(StoreError):
    """The key does not exist."""


class BlobExists(StoreError):
    """A conditional put failed because the key exists."""


class NoConditionalPut(StoreError):
    """The store does not support conditional puts, so each of two racing writers could believe that it won."""


class StoreDenied(StoreError):
    """The credentials are wrong or a permission is missing."""


class StoreUnavailable(StoreError):
    """The endpoint is down, the bucket is missing or the disk is full."""


class StoreBusy(StoreUnavailable):
    """The server answers that it cannot serve a request now."""


class CheckpointError(BamError):
    """A checkpoint cannot be used."""


class DigestMismatch(CheckpointError):
    """A file differs from its manifest, or is missing; `artifact_id` is set if it belongs to an artifact of a run."""

    def __init__(self, message: str, artifact_id: str | None = None) -> None:
        super().__init__(message)
        self.artifact_id = artifact_id


class StaleLease(CheckpointError):
    """A newer attempt owns this artifact, so this writer must stop."""


class FamilyError(BamError):
    """The architecture is not supported, or the weights do not match it."""


class UpcycleError(BamError):
    """The seed and the branches cannot become one mixture."""


class PlacementError(BamError):
    """No node can satisfy a resource request."""


class TrainingError(BamError):
    """Training cannot continue."""


class LossNotFinite(TrainingError):
    """The loss or its gradient is NaN or infinite."""


class LossSpiked(TrainingError):
    """The loss or its gradient is far above its recent values."""


class ServingError(BamError):
    """The server cannot start or a request cannot be served."""


class RetryLater(ServingError):
    """The request may succeed later.

    Attributes:
        retry_after: The number of seconds after which the client should try again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(RetryLater):
    """The queue of the server is full."""


class AdapterUnavailable(RetryLater):
    """An adapter cannot be loaded now."""


class Interrupted(BamError):
    """Work stopped cleanly on request; the same command resumes it."""


def one_line(error: BaseException, *, all_lines: bool = False) -> str:
    """Return an error as one line for people.

    The result is the first line of the message that is not blank, because the errors of Ray carry a whole remote
    traceback below it. The name of the type precedes the message of an error that is not a `BamError`, because such a
    message often does not stand alone (`KeyError: 'id'`).

    Args:
        error: The error to render.
        all_lines: Join all lines of the message, for libraries that put the cause below the first line.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    message = printable(" ".join(" ".join(lines if all_lines else lines[:1]).split()))
    if isinstance(error, BamError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def printable(text: str) -> str:
    """Return a text without control characters, except for line feeds and tabs.

    Marks that change the direction of text are removed too. Lone surrogates, which cannot be encoded, are replaced.
    """
    return encodable(_CONTROL.sub("", text))


def encodable(text: str) -> str:
    """Return a text in which lone surrogates, which no encoding has, are replaced by U+FFFD."""
    return _LONE_SURROGATE.sub("\ufffd", text)
