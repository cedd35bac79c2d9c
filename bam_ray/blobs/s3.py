"""A blob store in an S3 bucket, on AWS or on any server that implements its protocol."""

import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import chain
from pathlib import Path
from typing import Any

from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError

from bam_ray.blobs.s3_client import new_client, sends_checksums
from bam_ray.blobs.s3_errors import (
    CONDITION_FAILED,
    CONFLICT,
    MISSING,
    NOT_IMPLEMENTED,
    S3_ERRORS,
    code_of,
    may_reject_checksums,
    needs_new_credentials,
    status_of,
    store_error,
)
from bam_ray.blobs.s3_reading import TRIES, BlobChangedError, changing, read_file, read_range
from bam_ray.blobs.s3_uploads import MAX_PARTS, part_bytes, rechunk
from bam_ray.blobs.store import Promise, sort_keys, validate_key
from bam_ray.errors import BlobExists, BlobNotFound, NoConditionalPut, StoreError
from bam_ray.units import MIB

CONFLICT_TRIES = 6
TOKEN = "bam-put"  # name of the metadata that identifies the call which wrote a blob
TRANSFER = TransferConfig(multipart_threshold=64 * MIB, multipart_chunksize=32 * MIB, max_concurrency=4)
CONCURRENT_PARTS = 3


class S3Store:
    """A `BlobStore` under a prefix of a bucket.

    The client is created at the first operation, and a copy of a store that was pickled creates its own. It is created
    again without checksums if the server rejects them, and again if only other credentials can succeed, because a
    client never looks for credentials a second time.

    Args:
        bucket: The name of an existing bucket.
        prefix: The prefix of all keys of this store; may be empty.
        endpoint: The URL of an S3 server other than AWS.
        promise: "weak" makes `put_if_absent` check and then put, which is not atomic.
        client: The boto3 S3 client to use. By default the store creates one for `endpoint`.
    """

    def __init__(
        self, bucket: str, prefix: str, endpoint: str | None = None, promise: Promise = "strict", client: Any = None
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._endpoint = endpoint
        self._promise = promise
        self._client = client
        self._owns_client = client is None
        self._checksums = True
        self._lock = threading.Lock()  # held while the client is created

    @property
    def uri(self) -> str:
        """The URI `s3://BUCKET/PREFIX`."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def client(self) -> Any:
        """The boto3 S3 client of this store; raises `StoreUnavailable` if the endpoint is not a URL."""
        with self._lock:
            if self._client is None:
                self._client = new_client(self._endpoint, self._checksums)
            return self._client

    def put(self, key: str, data: bytes) -> None:
        """Write `data` to `key` in one request."""
        target = self._target(key)
        with self._translated_errors(key):
            self._request(lambda client: client.put_object(**target, Body=data))

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write `data` to `key` if it does not exist; raise `BlobExists` if it does.

        With the strict promise the server tests the condition (`If-None-Match: *`). A conflict means that another
        writer's put of the same key is in progress; the put is then retried with exponential backoff.

        If the answer to a put is lost, the repeated put fails because of the blob that the first one wrote. The
        metadata of the blob therefore contains a random token of this call. A blob with this token counts as success.

        Raises:
            BlobExists: The key exists.
            NoConditionalPut: The promise is strict and the server has no conditional puts.
        """
        if self._promise == "weak":  # another writer may put the key between the check and the put
            if self.exists(key):
                raise BlobExists(f"{self.uri}/{key} exists already")
            self.put(key, data)
            return
        target, token = self._target(key), {TOKEN: uuid.uuid4().hex}
        request = {**target, "Body": data, "IfNoneMatch": "*", "Metadata": token}
        with self._translated_errors(key):
            for attempt in range(CONFLICT_TRIES):
                try:
                    self._request(lambda client: client.put_object(**request))
                    return
                except ClientError as error:
                    code = code_of(error)
                    if code in CONDITION_FAILED and self._wrote(target, token):
                        return
                    if code in NOT_IMPLEMENTED:
                        raise NoConditionalPut(f"the store at {self.uri} has no conditional puts ({code})") from None
                    if code not in CONFLICT or attempt == CONFLICT_TRIES - 1:
                        raise
                    time.sleep(0.05 * 2**attempt)

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file, from 64 MiB on in several parts at once."""
        target = self._target(key)
        token = {TOKEN: uuid.uuid4().hex}

        def upload(client: Any) -> None:
            try:
                client.upload_file(
                    str(path), self._bucket, target["Key"], ExtraArgs={"Metadata": token}, Config=TRANSFER
                )
            except S3UploadFailedError as error:  # boto3 hides the server's response behind it
                raise error.__context__ or error from None

        with self._translated_errors(key):
            try:
                self._request(upload)
            except ClientError as error:
                if code_of(error) != "NoSuchUpload" or not self._wrote(target, token):
                    raise

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview], size: int | None = None) -> None:
        """Upload a stream in parts, of which at most three are in flight.

        A part has 8 MiB, or more if `size` bytes would be too many parts. A stream shorter than one part is a single
        put. A multipart upload becomes visible when it is completed; it is aborted if anything fails.

        Raises:
            StoreError: S3 cannot hold a blob of this size; this is found before anything is sent if `size` is given.
        """
        target, token = self._target(key), {TOKEN: uuid.uuid4().hex}
        length = part_bytes(f"{self.uri}/{key}", size)
        parts = rechunk(chunks, length)
        first = next(parts, bytearray())
        if len(first) < length:
            self.put(key, bytes(first))
            return
        with self._translated_errors(key):
            created = self._request(lambda client: client.create_multipart_upload(**target, Metadata=token))
        upload = target | {"UploadId": created["UploadId"]}
        try:
            sent = self._send_parts(key, upload, chain([first], parts))
            with self._translated_errors(key):
                self._complete(target, upload, sent, token)
        except BaseException:  # KeyboardInterrupt too: parts that are left behind are invisible but billed
            with contextlib.suppress(ClientError, BotoCoreError):
                self.client.abort_multipart_upload(**upload)
            raise

    def get(self, key: str) -> bytes:
        """Return all bytes of `key`; raise `BlobNotFound` if it does not exist."""
        target = self._target(key)
        with self._translated_errors(key):
            return read_range(self.client, target, 0, None)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of `key`."""
        if length <= 0:
            self.size(key)  # raises if the key is missing; a Range header cannot request zero bytes
            return b""
        target = self._target(key)
        with self._translated_errors(key):
            return read_range(self.client, target, start, start + length)

    def get_file(self, key: str, path: Path) -> None:
        """Download `key` to `path`, in ranges of 32 MiB, several at once; nothing is left at `path` if this fails."""
        target = self._target(key)
        with self._translated_errors(key):
            for _ in range(TRIES):
                size, etag = self._head(target)
                try:
                    read_file(self.client, target, size, etag, path)
                    return
                except BlobChangedError:
                    continue
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
            path.unlink(missing_ok=True)
            raise changing(target)

    def size(self, key: str) -> int:
        """Return the length of `key` in bytes, from a HEAD request."""
        target = self._target(key)
        with self._translated_errors(key):
            return self._head(target)[0]

    def exists(self, key: str) -> bool:
        """Return True if `key` exists."""
        try:
            self.size(key)
        except BlobNotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield all keys that begin with `prefix`, sorted.

        AWS sorts keys itself. SeaweedFS walks a tree and lists `a/b` before `a-b`, so they are sorted here. Empty blobs
        whose key ends in a slash are left out: consoles make them to show a folder.
        """
        own_prefix_length = len(self._with_prefix(""))
        with self._translated_errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._with_prefix(prefix)
            )
            keys = [
                entry["Key"][own_prefix_length:]
                for page in pages
                for entry in page.get("Contents", [])
                if entry["Size"] or not entry["Key"].endswith("/")
            ]
        yield from sort_keys(keys)

    def delete(self, key: str) -> None:
        """Remove `key`; do nothing if it does not exist."""
        target = self._target(key)
        with self._translated_errors(key):
            self.client.delete_object(**target)

    def abort_uploads(self, prefix: str, older_than: timedelta) -> Sequence[str]:
        """Abort the multipart uploads below `prefix` that began that long ago, by the clock of the server."""
        own_prefix_length = len(self._with_prefix(""))
        aborted = []
        with self._translated_errors(prefix):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._with_prefix(prefix)
            )
            for page in pages:
                date = page["ResponseMetadata"]["HTTPHeaders"].get("date")
                # The date has whole seconds, and uploads may have begun later in the same second
                now = parsedate_to_datetime(date) + timedelta(seconds=1) if date else datetime.now(UTC)
                for upload in page.get("Uploads", []):
                    if now - upload["Initiated"] < older_than:
                        continue
                    with _ignored("NoSuchUpload"):  # it was completed in the meantime
                        self.client.abort_multipart_upload(
                            Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        aborted.append(upload["Key"][own_prefix_length:])
        return sort_keys(aborted)

    def _request(self, operation: Callable[[Any], Any]) -> Any:
        """Call `operation` with the client; again with a client without checksums if the server may reject them.

        Since 2025 boto3 adds checksums to requests, which some servers refuse, each with another error.
        """
        client = self.client
        try:
            return operation(client)
        except ClientError as error:
            if not self._owns_client or not sends_checksums(client) or not may_reject_checksums(error):
                raise
            first = error
        plain = new_client(self._endpoint, checksums=False)
        try:
            result = operation(plain)
        except ClientError as error:
            if code_of(error) == code_of(first):
                raise first from None
            self._use_without_checksums(plain)  # the server found something else wrong
            raise
        self._use_without_checksums(plain)
        return result

    def _use_without_checksums(self, client: Any) -> None:
        with self._lock:
            self._client, self._checksums = client, False

    def _head(self, target: dict[str, str]) -> tuple[int, str | None]:
        """Return the size and the ETag of a blob.

        The answer to a HEAD request has no body that says why it was refused, so a GET request asks again.
        """
        try:
            answer = self.client.head_object(**target)
            return int(answer["ContentLength"]), answer.get("ETag")
        except ClientError as error:
            if code_of(error) in MISSING or status_of(error) in (500, 502, 503, 504):
                raise
        answer = self.client.get_object(**target, Range="bytes=0-0")
        answer["Body"].close()
        return int(answer["ContentRange"].rpartition("/")[2]), answer.get("ETag")

    def _wrote(self, target: dict[str, str], token: dict[str, str]) -> bool:
        """Return True if a blob was written by the call with this token."""
        try:
            metadata: dict[str, str] = self.client.head_object(**target).get("Metadata", {})
        except ClientError as error:
            if code_of(error) in MISSING:  # it was deleted in the meantime
                return False
            raise
        return metadata.get(TOKEN) == token[TOKEN]

    def _complete(
        self, target: dict[str, str], upload: dict[str, str], parts: Sequence[dict[str, Any]], token: dict[str, str]
    ) -> None:
        """Complete a multipart upload.

        If the answer is lost, the repeated request may find that there is no such upload any more.
        """
        try:
            self._request(lambda client: client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}))
        except ClientError as error:
            if code_of(error) != "NoSuchUpload" or not self._wrote(target, token):
                raise

    def _send_parts(self, key: str, upload: dict[str, str], parts: Iterator[bytearray]) -> Sequence[dict[str, Any]]:
        """Upload parts, at most `CONCURRENT_PARTS` at once, and return the list that completes the upload.

        No request is in flight any more when this raises.
        """

        def send(number: int, part: bytearray) -> dict[str, Any]:
            response = self._request(lambda client: client.upload_part(**upload, PartNumber=number, Body=part))
            checksums = {name: value for name, value in response.items() if name.startswith("Checksum")}
            return {"PartNumber": number, "ETag": response["ETag"]} | checksums

        sent = []
        in_flight: deque[Future[dict[str, Any]]] = deque()

        def wait_for_oldest() -> None:
            with self._translated_errors(key):
                sent.append(in_flight.popleft().result())

        with ThreadPoolExecutor(CONCURRENT_PARTS) as pool:
            for number, part in enumerate(parts, 1):  # errors of the producer are not the server's, so not translated
                if number > MAX_PARTS:
                    raise StoreError(
                        f"{self.uri}/{key} has more than {MAX_PARTS:,} parts of {len(part):,} bytes, which S3 does not "
                        "allow: give put_stream the size of the stream"
                    )
                in_flight.append(pool.submit(send, number, part))
                if len(in_flight) == CONCURRENT_PARTS:
                    wait_for_oldest()
            while in_flight:
                wait_for_oldest()
        return sent

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._with_prefix(validate_key(key))}

    def _with_prefix(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def __reduce__(self) -> tuple[Any, ...]:
        return (S3Store, (self._bucket, self._prefix, self._endpoint, self._promise))

    @contextlib.contextmanager
    def _translated_errors(self, key: str) -> Iterator[None]:
        """Translate the errors of boto3 into store errors of one line each."""
        try:
            yield
        except S3_ERRORS as error:
            meta = getattr(self._client, "meta", None)  # there is no client if none could be created
            endpoint = meta.endpoint_url if meta else self._endpoint or "AWS"
            if self._owns_client and needs_new_credentials(error):
                with self._lock:
                    self._client = None
            raise store_error(error, f"{self.uri}/{key}", endpoint) from None


@contextlib.contextmanager
def _ignored(code: str) -> Iterator[None]:
    """Suppress the error of a server with this code."""
    try:
        yield
    except ClientError as error:
        if code_of(error) != code:
            raise
