"""A blob store in an S3 bucket, on AWS or any server that speaks its protocol."""

import contextlib
import functools
import time
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

from bam_ray.blobs.store import checked
from bam_ray.errors import BlobExists, BlobNotFound, NoConditionalPut, StoreDenied, StoreError, StoreUnavailable

DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "Forbidden", "ExpiredToken"}
MISSING = {"NoSuchKey", "404", "NotFound"}
LOST = {"PreconditionFailed", "412"}
RACING = {"ConditionalRequestConflict", "409"}  # another put of the same key is under way: its outcome is open
UNKNOWN = {"NotImplemented", "501"}  # how a server says that it has no conditional puts
RACE_TRIES = 6
TRANSFER = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=32 << 20, max_concurrency=4)
PART = 8 << 20  # bytes of a streamed blob that travel in one request: S3's 10,000 parts are then 78 GiB
PARTS_AT_ONCE = 4


@functools.cache
def _loader() -> Loader:
    """botocore's descriptions of services, megabytes of them, once a process; credentials are every store's own."""
    return Loader()


class S3Store:
    """A `BlobStore` under `prefix` of `bucket`. The client is made at first use, so that a store can be pickled.

    Without `conditional_puts`, `put_if_absent` is not atomic.
    """

    def __init__(self, bucket: str, prefix: str, endpoint: str | None = None, conditional_puts: bool = True) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._endpoint = endpoint
        self._conditional_puts = conditional_puts
        self._lazy_client: Any = None

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        with self._said(key):
            self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> None:
        if not self._conditional_puts:  # between the look and the put another writer may come
            if self.exists(key):
                raise BlobExists(f"{self.uri}/{key} exists already")
            self.put(key, data)
            return
        with self._said(key):
            for attempt in range(RACE_TRIES):
                try:
                    self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
                    return
                except ClientError as error:
                    code = error.response["Error"].get("Code")
                    if code in UNKNOWN:
                        raise NoConditionalPut(f"the store at {self.uri} has no conditional puts ({code})") from None
                    if code not in RACING or attempt == RACE_TRIES - 1:
                        raise
                    time.sleep(0.05 * 2**attempt)

    def put_file(self, key: str, path: Path) -> None:
        with self._said(key):
            try:
                self._client.upload_file(str(path), self._bucket, self._key(key), Config=TRANSFER)
            except S3UploadFailedError as error:  # boto3 hides the server's answer behind it
                raise error.__context__ or error from None

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview]) -> None:
        target = {"Bucket": self._bucket, "Key": self._key(key)}
        parts = in_parts(chunks, PART)
        first = next(parts, bytearray())
        if len(first) < PART:
            self.put(key, bytes(first))
            return
        with self._said(key):
            upload = self._client.create_multipart_upload(**target)["UploadId"]
        try:
            sent = self._send_parts(key, target | {"UploadId": upload}, chain([first], parts))
            with self._said(key):
                self._client.complete_multipart_upload(**target, UploadId=upload, MultipartUpload={"Parts": sent})
        except BaseException:  # Ctrl-C too: parts left behind are invisible, but paid for
            with contextlib.suppress(ClientError, BotoCoreError):
                self._client.abort_multipart_upload(**target, UploadId=upload)
            raise

    def get(self, key: str) -> bytes:
        with self._said(key):
            body: bytes = self._client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"].read()
            return body

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            self.size(key)  # raises where it is missing; a range header cannot ask for nothing
            return b""
        with self._said(key):
            try:
                response = self._client.get_object(
                    Bucket=self._bucket, Key=self._key(key), Range=f"bytes={start}-{start + length - 1}"
                )
            except ClientError as error:
                if error.response["Error"]["Code"] in ("InvalidRange", "416"):
                    return b""
                raise
            body: bytes = response["Body"].read()
            return body

    def get_file(self, key: str, path: Path) -> None:
        with self._said(key):
            self._client.download_file(self._bucket, self._key(key), str(path), Config=TRANSFER)

    def size(self, key: str) -> int:
        with self._said(key):
            length: int = self._client.head_object(Bucket=self._bucket, Key=self._key(key))["ContentLength"]
            return length

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except BlobNotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        cut = len(self._under(""))
        with self._said(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._under(prefix)
            )
            keys = [entry["Key"][cut:] for page in pages for entry in page.get("Contents", [])]
        yield from sorted(keys)  # AWS sorts them; SeaweedFS walks a tree, where a/b comes before a-b

    def delete(self, key: str) -> None:
        with self._said(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def _send_parts(self, key: str, upload: dict[str, str], parts: Iterator[bytearray]) -> Sequence[dict[str, Any]]:
        """Upload parts, a few at once; returns what completes the upload. None is under way when this raises."""

        def send(number: int, part: bytearray) -> dict[str, Any]:
            answer = self._client.upload_part(**upload, PartNumber=number, Body=part)
            checksums = {name: value for name, value in answer.items() if name.startswith("Checksum")}
            return {"PartNumber": number, "ETag": answer["ETag"]} | checksums

        sent = []
        under_way: deque[Future[dict[str, Any]]] = deque()

        def take_first() -> None:
            with self._said(key):
                sent.append(under_way.popleft().result())

        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            for number, part in enumerate(parts, 1):  # outside of _said: its errors are not the server's
                under_way.append(pool.submit(send, number, part))
                if len(under_way) == PARTS_AT_ONCE:
                    take_first()
            while under_way:
                take_first()
        return sent

    def _key(self, key: str) -> str:
        return self._under(checked(key))

    def _under(self, beginning: str) -> str:
        return f"{self._prefix}/{beginning}" if self._prefix else beginning

    @property
    def _client(self) -> Any:
        if self._lazy_client is None:
            config = Config(
                retries={"mode": "standard", "max_attempts": 4},
                connect_timeout=5,
                read_timeout=60,
                max_pool_connections=16,
            )
            session = boto3.session.Session()
            session._session.register_component("data_loader", _loader())
            try:
                self._lazy_client = session.client("s3", endpoint_url=self._endpoint, config=config)
            except ValueError as error:  # "Invalid endpoint: ..."
                raise StoreUnavailable(
                    f"{error}: write store.endpoint (AWS_ENDPOINT_URL) as http://HOST:PORT"
                ) from None
        return self._lazy_client

    def __reduce__(self) -> tuple[Any, ...]:
        return (S3Store, (self._bucket, self._prefix, self._endpoint, self._conditional_puts))

    @contextlib.contextmanager
    def _said(self, key: str) -> Iterator[None]:
        """Turn botocore's errors into the store's, one line each."""
        where = f"{self.uri}/{key}"
        try:
            yield
        except ClientError as error:
            code = error.response["Error"].get("Code", "")
            if code == "NoSuchBucket":
                raise StoreUnavailable(
                    f"bucket {self._bucket!r} does not exist: create it or mend the recipe's store.uri"
                ) from None
            if code in MISSING:
                raise BlobNotFound(f"{where} does not exist") from None
            if code in LOST:
                raise BlobExists(f"{where} exists already") from None
            if code in DENIED:
                raise StoreDenied(
                    f"the S3 server refuses these credentials for {self.uri} ({code}): "
                    "mend AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from None
            raise StoreUnavailable(f"{where}: the S3 server answered {code}") from None
        except (NoCredentialsError, PartialCredentialsError):
            raise StoreDenied(
                f"no credentials for {self.uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        except (ConnectionError, HTTPClientError) as error:
            raise StoreUnavailable(
                f"no S3 server answers at {self._client.meta.endpoint_url} ({type(error).__name__}): "
                "start it or mend store.endpoint (AWS_ENDPOINT_URL)"
            ) from None
        except BotoCoreError as error:
            raise StoreError(f"{where}: {' '.join(str(error).split())}") from None


def in_parts(chunks: Iterator[bytes | memoryview], size: int) -> Iterator[bytearray]:
    """The bytes of `chunks`, cut anew: every part has `size` bytes, the last one at least 1 and at most `size`."""
    part = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        if not view.nbytes:  # an empty view cannot be cast
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
