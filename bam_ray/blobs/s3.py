"""A blob store in an S3 bucket, on AWS or on any server that implements its protocol."""

import contextlib
import functools
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.loaders import Loader

from bam_ray.blobs.store import Promise, validate_key
from bam_ray.errors import (
    BlobExists,
    BlobNotFound,
    NoConditionalPut,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    one_line,
)

# Error codes of S3 servers, by meaning. A HEAD request has no body, so its code is the bare HTTP status.
DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "Forbidden", "ExpiredToken"}
MISSING = {"NoSuchKey", "404", "NotFound"}
CONDITION_FAILED = {"PreconditionFailed", "412"}
CONFLICT = {"ConditionalRequestConflict", "409"}  # another put of the same key is in progress, with unknown outcome
NOT_IMPLEMENTED = {"NotImplemented", "501"}  # the server has no conditional puts
CONFLICT_TRIES = 6
TOKEN = "bam-put"  # name of the metadata that identifies the conditional put which wrote a blob
TRANSFER = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=32 << 20, max_concurrency=4)
PART_BYTES = 8 << 20  # size of one part of a streamed blob; S3 allows 10,000 parts, so a blob has at most 78 GiB
CONCURRENT_PARTS = 4


@functools.cache
def _loader() -> Loader:
    """Return one loader of botocore's service descriptions per process, because they take megabytes.

    Credentials are not shared; every store has its own session.
    """
    return Loader()


def _new_client(endpoint: str | None) -> Any:
    config = Config(
        retries={"mode": "standard", "max_attempts": 4}, connect_timeout=5, read_timeout=60, max_pool_connections=16
    )
    session = boto3.session.Session()
    session._session.register_component("data_loader", _loader())
    try:
        return session.client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:  # "Invalid endpoint: ..."
        raise StoreUnavailable(f"{error}: write store.endpoint (AWS_ENDPOINT_URL) as http://HOST:PORT") from None


class S3Store:
    """A `BlobStore` under a prefix of a bucket.

    The client is created at the first operation, and a copy of a store that was pickled creates its own.

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
                self._client = _new_client(self._endpoint)
        return self._client

    def put(self, key: str, data: bytes) -> None:
        """Write `data` to `key` in one request."""
        with self._translated_errors(key):
            self.client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data)

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
        target = {"Bucket": self._bucket, "Key": self._key(key)}
        token = uuid.uuid4().hex
        with self._translated_errors(key):
            for attempt in range(CONFLICT_TRIES):
                try:
                    self.client.put_object(**target, Body=data, IfNoneMatch="*", Metadata={TOKEN: token})
                    return
                except ClientError as error:
                    code = error.response["Error"].get("Code")
                    if code in CONDITION_FAILED and self._token(target) == token:
                        return
                    if code in NOT_IMPLEMENTED:
                        raise NoConditionalPut(f"the store at {self.uri} has no conditional puts ({code})") from None
                    if code not in CONFLICT or attempt == CONFLICT_TRIES - 1:
                        raise
                    time.sleep(0.05 * 2**attempt)

    def _token(self, target: dict[str, str]) -> str | None:
        """Return the token of the conditional put that wrote a blob, if it has one."""
        try:
            token: str | None = self.client.head_object(**target).get("Metadata", {}).get(TOKEN)
        except ClientError as error:
            if error.response["Error"].get("Code") in MISSING:  # it was deleted in the meantime
                return None
            raise
        return token

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file, from 64 MiB on in several parts at once."""
        with self._translated_errors(key):
            try:
                self.client.upload_file(str(path), self._bucket, self._key(key), Config=TRANSFER)
            except S3UploadFailedError as error:  # boto3 hides the server's response behind it
                raise error.__context__ or error from None

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview]) -> None:
        """Upload a stream in parts of 8 MiB, of which at most four are in flight.

        A stream shorter than one part is a single put. A multipart upload becomes visible when it is completed; it is
        aborted if anything fails.
        """
        target = {"Bucket": self._bucket, "Key": self._key(key)}
        parts = rechunk(chunks, PART_BYTES)
        first = next(parts, bytearray())
        if len(first) < PART_BYTES:
            self.put(key, bytes(first))
            return
        with self._translated_errors(key):
            upload = self.client.create_multipart_upload(**target)["UploadId"]
        try:
            sent = self._send_parts(key, target | {"UploadId": upload}, chain([first], parts))
            with self._translated_errors(key):
                self.client.complete_multipart_upload(**target, UploadId=upload, MultipartUpload={"Parts": sent})
        except BaseException:  # KeyboardInterrupt too: parts that are left behind are invisible but billed
            with contextlib.suppress(ClientError, BotoCoreError):
                self.client.abort_multipart_upload(**target, UploadId=upload)
            raise

    def get(self, key: str) -> bytes:
        """Return all bytes of `key`; raise `BlobNotFound` if it does not exist."""
        with self._translated_errors(key):
            body: bytes = self.client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"].read()
            return body

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of `key`."""
        if length <= 0:
            self.size(key)  # raises if the key is missing; a Range header cannot request zero bytes
            return b""
        with self._translated_errors(key):
            try:
                response = self.client.get_object(
                    Bucket=self._bucket, Key=self._key(key), Range=f"bytes={start}-{start + length - 1}"
                )
            except ClientError as error:
                if error.response["Error"]["Code"] in ("InvalidRange", "416"):
                    return b""
                raise
            body: bytes = response["Body"].read()
            return body

    def get_file(self, key: str, path: Path) -> None:
        """Download `key` to `path`, from 64 MiB on in several ranges at once."""
        with self._translated_errors(key):
            self.client.download_file(self._bucket, self._key(key), str(path), Config=TRANSFER)

    def size(self, key: str) -> int:
        """Return the length of `key` in bytes, from a HEAD request."""
        with self._translated_errors(key):
            length: int = self.client.head_object(Bucket=self._bucket, Key=self._key(key))["ContentLength"]
            return length

    def exists(self, key: str) -> bool:
        """Return True if `key` exists."""
        try:
            self.size(key)
        except BlobNotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield all keys that begin with `prefix`, sorted.

        AWS sorts keys itself. SeaweedFS walks a tree and lists `a/b` before `a-b`, so they are sorted here.
        """
        own_prefix_length = len(self._with_prefix(""))
        with self._translated_errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._with_prefix(prefix)
            )
            keys = [entry["Key"][own_prefix_length:] for page in pages for entry in page.get("Contents", [])]
        yield from sorted(keys)

    def delete(self, key: str) -> None:
        """Remove `key`; do nothing if it does not exist."""
        with self._translated_errors(key):
            self.client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def _send_parts(self, key: str, upload: dict[str, str], parts: Iterator[bytearray]) -> Sequence[dict[str, Any]]:
        """Upload parts, at most `CONCURRENT_PARTS` at once, and return the list that completes the upload.

        No request is in flight any more when this raises.
        """

        def send(number: int, part: bytearray) -> dict[str, Any]:
            response = self.client.upload_part(**upload, PartNumber=number, Body=part)
            checksums = {name: value for name, value in response.items() if name.startswith("Checksum")}
            return {"PartNumber": number, "ETag": response["ETag"]} | checksums

        sent = []
        in_flight: deque[Future[dict[str, Any]]] = deque()

        def wait_for_oldest() -> None:
            with self._translated_errors(key):
                sent.append(in_flight.popleft().result())

        with ThreadPoolExecutor(CONCURRENT_PARTS) as pool:
            for number, part in enumerate(parts, 1):  # errors of the producer are not the server's, so not translated
                in_flight.append(pool.submit(send, number, part))
                if len(in_flight) == CONCURRENT_PARTS:
                    wait_for_oldest()
            while in_flight:
                wait_for_oldest()
        return sent

    def _key(self, key: str) -> str:
        return self._with_prefix(validate_key(key))

    def _with_prefix(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def __reduce__(self) -> tuple[Any, ...]:
        return (S3Store, (self._bucket, self._prefix, self._endpoint, self._promise))

    @contextlib.contextmanager
    def _translated_errors(self, key: str) -> Iterator[None]:
        """Translate botocore's errors into store errors of one line each."""
        uri = f"{self.uri}/{key}"
        try:
            yield
        except ClientError as error:
            code = error.response["Error"].get("Code", "")
            if code == "NoSuchBucket":
                raise StoreUnavailable(
                    f"bucket {self._bucket!r} does not exist: create it or correct the recipe's store.uri"
                ) from None
            if code in MISSING:
                raise BlobNotFound(f"{uri} does not exist") from None
            if code in CONDITION_FAILED:
                raise BlobExists(f"{uri} exists already") from None
            if code in DENIED:
                raise StoreDenied(
                    f"the S3 server refuses these credentials for {self.uri} ({code}): "
                    "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from None
            raise StoreUnavailable(f"{uri}: the S3 server answered {code}") from None
        except (NoCredentialsError, PartialCredentialsError):
            raise StoreDenied(
                f"no credentials for {self.uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        except (ConnectionError, HTTPClientError) as error:
            raise StoreUnavailable(
                f"no S3 server answers at {self.client.meta.endpoint_url} ({type(error).__name__}): "
                "start it or correct store.endpoint (AWS_ENDPOINT_URL)"
            ) from None
        except BotoCoreError as error:
            raise StoreError(f"{uri}: {one_line(error, all_lines=True)}") from None


def rechunk(chunks: Iterator[bytes | memoryview], size: int) -> Iterator[bytearray]:
    """Yield the bytes of `chunks` in parts of exactly `size` bytes; the last part has between 1 and `size` bytes."""
    part = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        if not view.nbytes:  # an empty view has no bytes to add and cannot be cast
            continue
        rest = view.cast("B")
        while len(rest):
            taken = rest[: size - len(part)]
            part += taken
            rest = rest[len(taken) :]
            if len(part) == size:
                yield part
                part = bytearray()
    if part:
        yield part
