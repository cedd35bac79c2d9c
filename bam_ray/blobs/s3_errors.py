"""The errors of S3 servers and of boto3, as store errors of one line that contain what the server said."""

import re
from collections.abc import Iterator
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    ConnectionError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    InvalidConfigError,
    LoginError,
    MetadataRetrievalError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    RefreshWithMFAUnsupportedError,
    ResponseStreamingError,
    SSLError,
    SSOError,
    TokenRetrievalError,
    UnknownCredentialError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from bam_ray.errors import BlobExists, BlobNotFound, StoreBusy, StoreDenied, StoreError, StoreUnavailable, one_line

# Error codes of S3 servers, by meaning. The answer to a HEAD request has no body, so its code is the HTTP status.
MISSING = {"NoSuchKey", "404", "NotFound", "Not Found"}
CONDITION_FAILED = {"PreconditionFailed", "412"}
CONFLICT = {"ConditionalRequestConflict", "409"}  # another put of the same key is in progress, with unknown outcome
BUSY_STATUS = {429, 500, 502, 503, 504}
BUSY_CODES = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestLimitExceeded", "503"}
NOT_IMPLEMENTED = {"NotImplemented", "501"}
OUT_OF_RANGE = {"InvalidRange", "416"}
PERMISSION = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem", "AccessForbidden"}
WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthFailure", "401", "Unauthorized", "NotSignedUp"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}
WRONG_CLOCK = {"RequestTimeTooSkewed"}
WRONG_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "301"}
DAMAGED = {"BadDigest", "XAmzContentChecksumMismatch"}  # the data was changed on its way
TOO_LATE_OR_LARGE = {"RequestTimeout", "EntityTooLarge", "EntityTooSmall", "InvalidPart", "KeyTooLongError"}
CHECKSUM_ADVICE = "set AWS_REQUEST_CHECKSUM_CALCULATION and AWS_RESPONSE_CHECKSUM_VALIDATION to when_required"
CONNECTION = re.compile(r"^\w+\(host=.*?\): ")  # with which messages of urllib3 begin

BODY_ERRORS = (IncompleteReadError, HTTPClientError, ConnectionError, HTTPError)
"""Errors of a connection that ended within the body of an answer."""

CREDENTIAL_ERRORS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    TokenRetrievalError,
    NoAuthTokenError,
    SSOError,
    LoginError,
    RefreshWithMFAUnsupportedError,
    UnknownCredentialError,
    ProfileNotFound,
    ConfigNotFound,
    ConfigParseError,
    InvalidConfigError,
)
"""Errors of the search for credentials on this machine."""

S3_ERRORS = (ClientError, BotoCoreError, Boto3Error, ResponseParserError, HTTPError, RecursionError)
"""All errors that a request of boto3 raises."""


def code_of(error: ClientError) -> str:
    """Return the code of a server's error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """Return the HTTP status of a server's error; 0 if it is unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def needs_new_credentials(error: BaseException) -> bool:
    """Return True if only other credentials can succeed, so that they must be looked up again."""
    if isinstance(error, ClientError):
        return code_of(error) in EXPIRED | WRONG_KEYS
    return isinstance(error, CREDENTIAL_ERRORS)


def may_reject_checksums(error: ClientError) -> bool:
    """Return True if the server may have refused a request because of the checksums that boto3 adds.

    Servers that do not know them answer 400, 411 or 501 with various codes, or find that the signature does not match.
    """
    code = code_of(error)
    if code == "SignatureDoesNotMatch" or code in NOT_IMPLEMENTED:
        return True
    other = EXPIRED | WRONG_KEYS | WRONG_REGION | DAMAGED | TOO_LATE_OR_LARGE
    return status_of(error) in (400, 405, 411, 415, 422, 501) and code not in other


def store_error(error: Exception, uri: str, endpoint: str) -> StoreError:
    """Return the store error for an error of a request.

    Args:
        error: One of `S3_ERRORS`.
        uri: The URI of the blob or of the prefix.
        endpoint: The URL of the server.
    """
    if isinstance(error, ClientError):
        return _answered(error, uri)
    if isinstance(error, CREDENTIAL_ERRORS):
        return StoreDenied(
            f"no credentials for {uri} ({_text(error)}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this "
            "machine a role or a profile that works"
        )
    if isinstance(error, SSLError):
        return StoreUnavailable(
            f"no safe connection to the S3 server at {endpoint} ({_root(error)}): correct store.endpoint "
            "(AWS_ENDPOINT_URL), or set AWS_CA_BUNDLE to the certificate of its authority"
        )
    if isinstance(error, IncompleteReadError | ResponseStreamingError | FlexibleChecksumError):
        return StoreUnavailable(f"{uri}: the S3 server sent a damaged or incomplete body ({_text(error)}): try again")
    if isinstance(error, ConnectionError | HTTPClientError | HTTPError):
        return StoreUnavailable(
            f"no S3 server answers at {endpoint} ({_root(error)}): start it or correct store.endpoint "
            "(AWS_ENDPOINT_URL)"
        )
    if isinstance(error, ResponseParserError | RecursionError):
        return StoreUnavailable(
            f"the server at {endpoint} does not answer as an S3 server ({_text(error)}): correct store.endpoint "
            "(AWS_ENDPOINT_URL)"
        )
    if isinstance(error, Boto3Error):  # a transfer that gave up
        return StoreUnavailable(f"{uri}: {_text(error)}: try again")
    return StoreError(f"{uri}: {_text(error)}")


def _answered(error: ClientError, uri: str) -> StoreError:
    """Return the store error for an answer of the server."""
    code, said = code_of(error), _said(error)
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket":
        return StoreUnavailable(f"bucket {bucket!r} does not exist: create it or correct the recipe's store.uri")
    if code in MISSING:
        return BlobNotFound(f"{uri} does not exist")
    if code in CONDITION_FAILED:
        return BlobExists(f"{uri} exists already")
    for codes, advice in DENIALS:
        if code in codes:
            return StoreDenied(f"the S3 server refuses these credentials for {uri} ({said}): {advice}")
    if code in WRONG_CLOCK:
        return StoreDenied(
            f"the S3 server refuses requests for {uri} because the clocks differ ({said}): set this machine's clock, "
            "for example with chrony"
        )
    if code in WRONG_REGION:
        return StoreDenied(
            f"the S3 server expects another region for {uri} ({said}): set AWS_REGION and AWS_DEFAULT_REGION to the "
            f"region of the bucket {bucket!r}"
        )
    if code in DAMAGED:
        return StoreUnavailable(
            f"{uri}: the S3 server received damaged data ({said}): try again; if it always says so, {CHECKSUM_ADVICE}"
        )
    if may_reject_checksums(error):
        said += f"; if it rejects checksums: {CHECKSUM_ADVICE}"
    kind = StoreBusy if status_of(error) in BUSY_STATUS or code in BUSY_CODES else StoreUnavailable
    return kind(f"{uri}: the S3 server answered {said}")


DENIALS = (
    (WRONG_KEYS, "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    (EXPIRED, "get a new session token, and set AWS_SESSION_TOKEN together with its keys"),
    (
        PERMISSION,
        "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or allow s3:GetObject, s3:PutObject, s3:DeleteObject "
        "and s3:ListBucket in the policies of the user and of the bucket",
    ),
)
"""The meaning of codes for the user, by group."""


def _said(error: ClientError) -> str:
    """Return the code of the server and the details that explain it."""
    details: dict[str, Any] = dict(error.response.get("Error", {}))
    code = code_of(error) or f"HTTP {status_of(error)}"
    parts = [code]
    message = " ".join(str(details.get("Message") or "").split())
    if message and message != code:
        parts.append(message)
    names = {"RequestTime": "this machine's time", "ServerTime": "the server's time", "Region": "its region"}
    names |= {"Endpoint": "its endpoint"}
    parts += [f"{text} {details[name]}" for name, text in names.items() if details.get(name)]
    if code in WRONG_CLOCK and "ServerTime" not in details:
        parts.append(f"the server's time {_headers(error).get('date', 'unknown')}")
    return ", ".join(parts).rstrip(".")


def _headers(error: ClientError) -> dict[str, str]:
    return dict(error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}))


def _text(error: Exception) -> str:
    return one_line(error, all_lines=True).rstrip(".")


def _root(error: Exception) -> str:
    """Return the type of an error and the reason at the end of its chain, without its type."""
    reasons = [CONNECTION.sub("", " ".join(str(each).split())) for each in _causes(error)]
    return f"{type(error).__name__}: {reasons[-1]}" if reasons else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors that botocore and urllib3 wrapped in `error`, the first cause last."""
    while True:
        inner = getattr(error, "kwargs", {}).get("error") or getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            return
        yield inner
        error = inner
