"""Reading blobs from S3: a body that is cut is continued from the byte that was reached.

boto3 repeats a request that fails, but not one whose body ends early. A read of many gigabytes would therefore fail as
a whole. All requests of one read ask for the same version of the blob (`If-Match`), so the result never mixes two
versions. If the blob has changed in the meantime, the read begins again.
"""

import contextlib
import io
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from botocore.exceptions import ClientError, FlexibleChecksumError

from bam_ray.blobs.s3_errors import BODY_ERRORS, CONDITION_FAILED, OUT_OF_RANGE, code_of
from bam_ray.errors import StoreError, StoreUnavailable

TRIES = 5  # of a request that brings no further byte, and of a read of a blob that changes
CHUNK = 1 << 18
RANGE_BYTES = 32 << 20  # a file is downloaded in ranges of this size
CONCURRENT_RANGES = 4


class BlobChangedError(Exception):
    """The blob was replaced while it was read."""


@dataclass
class BlobReader:
    """A reader of one version of a blob.

    Attributes:
        client: The boto3 S3 client.
        target: The bucket and the key of the blob.
        etag: The version to read; None: the version that the first answer has.
    """

    client: Any
    target: dict[str, str]
    etag: str | None = None

    def copy(self, start: int, stop: int | None, file: BinaryIO) -> None:
        """Write bytes [start, stop) of the blob to `file`; None: to the end of the blob.

        Raises:
            BlobChangedError: The blob was replaced after the first byte was read.
        """
        begin = file.tell()
        failures = 0
        while True:
            reached = file.tell()
            try:
                stop = self._copy_body(start + reached - begin, stop, file)
                return
            except _BodyError as error:
                stop = error.stop
                if isinstance(error.cause, FlexibleChecksumError):  # any of the bytes may be damaged
                    file.seek(begin)
                    failures += 1
                else:
                    failures = failures + 1 if file.tell() == reached else 0
                if failures == TRIES:
                    raise error.cause from None
            time.sleep(0.1 * failures * random.uniform(1, 2))

    def _copy_body(self, start: int, stop: int | None, file: BinaryIO) -> int | None:
        """Append bytes [start, stop) to `file` with one request; return where they end.

        Raises:
            _BodyError: The body ended early; `file` has the bytes before.
        """
        whole = start == 0 and stop is None
        if start == stop:
            return stop
        request = {} if whole else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        if self.etag:
            request["IfMatch"] = self.etag
        try:
            response = self.client.get_object(**self.target, **request)
        except ClientError as error:
            if code_of(error) in OUT_OF_RANGE:
                return stop
            if code_of(error) in CONDITION_FAILED:
                raise BlobChangedError from None
            raise
        length = response.get("ContentLength")
        stop = stop if length is None else start + int(length)
        try:
            self._check(response, None if whole else start)
            for chunk in response["Body"].iter_chunks(CHUNK):
                file.write(chunk)
        except (*BODY_ERRORS, FlexibleChecksumError) as error:
            raise _BodyError(error, stop) from None
        finally:
            response["Body"].close()
        return stop

    def _check(self, response: dict[str, Any], start: int | None) -> None:
        """Check that an answer is of the same version as the answers before, and that its body begins at `start`."""
        if start is not None and not str(response.get("ContentRange", "")).startswith(f"bytes {start}-"):
            raise StoreError(
                f"the S3 server ignores the range of a request for {self.target['Key']}: use a server that supports "
                "the Range header"
            )
        etag = response.get("ETag")
        if self.etag and etag and etag != self.etag:  # a server that ignores If-Match
            raise BlobChangedError
        self.etag = self.etag or etag


class _BodyError(Exception):
    """A body that ended early, and the end that the server announced for it."""

    def __init__(self, cause: Exception, stop: int | None) -> None:
        super().__init__()
        self.cause = cause
        self.stop = stop


def read_range(client: Any, target: dict[str, str], start: int, stop: int | None) -> bytes:
    """Return bytes [start, stop) of one version of a blob; None: to the end of the blob."""
    for _ in range(TRIES):
        data = io.BytesIO()
        if stop is not None and stop > start:  # allocate the buffer once: one that grows is copied again and again
            data.seek(stop - start - 1)
            data.write(b"\0")
            data.seek(0)
        with contextlib.suppress(BlobChangedError):
            BlobReader(client, target).copy(start, stop, data)
            data.truncate(data.tell())
            return data.getvalue()
    raise changing(target)


def read_file(client: Any, target: dict[str, str], size: int, etag: str | None, path: Path) -> None:
    """Write one version of a blob to the file at `path`, several ranges at once.

    Raises:
        BlobChangedError: The blob does not have this version any more.
    """
    path.write_bytes(b"")

    def read(start: int) -> None:
        with path.open("r+b") as file:
            file.seek(start)
            BlobReader(client, target, etag).copy(start, min(start + RANGE_BYTES, size), file)

    with ThreadPoolExecutor(CONCURRENT_RANGES, thread_name_prefix="download") as pool:
        futures = [pool.submit(read, start) for start in range(0, size, RANGE_BYTES)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if path.stat().st_size != size:
        raise BlobChangedError


def changing(target: dict[str, str]) -> StoreUnavailable:
    """Return the error of a read of a blob that changes all the time."""
    return StoreUnavailable(f"{target['Key']} was replaced {TRIES} times while it was read: try again")
