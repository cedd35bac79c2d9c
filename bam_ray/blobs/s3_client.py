"""Clients of S3 servers: their timeouts, their search for credentials, and servers that redirect."""

import functools
import os
from typing import Any

import boto3
from botocore.config import Config
from botocore.loaders import Loader

from bam_ray.errors import StoreUnavailable

# botocore asks the metadata server of a machine once and waits for a second. Many processes that start at the same
# moment on one machine are often refused once.
METADATA_SETTINGS = {"metadata_service_num_attempts": 5, "metadata_service_timeout": 2}
METADATA_DEFAULT = 1


@functools.cache
def _loader() -> Loader:
    """Return one loader of botocore's service descriptions per process, because they take megabytes.

    Credentials are not shared; every store has its own session.
    """
    return Loader()


def new_client(endpoint: str | None, checksums: bool = True) -> Any:
    """Return a client of boto3 for the server at `endpoint`; None: the one of the environment, or AWS.

    Args:
        endpoint: The URL of the server.
        checksums: False leaves out the checksums that boto3 adds to requests, and asks the server for none.

    Raises:
        StoreUnavailable: The endpoint is not a URL.
    """
    config = Config(
        retries={"mode": "standard", "max_attempts": 4}, connect_timeout=5, read_timeout=60, max_pool_connections=16
    )
    if not checksums:
        config = config.merge(
            Config(request_checksum_calculation="when_required", response_checksum_validation="when_required")
        )
    session = boto3.session.Session()
    core = session._session
    core.register_component("data_loader", _loader())
    for name, value in METADATA_SETTINGS.items():
        if core.get_config_variable(name) == METADATA_DEFAULT:
            core.set_config_variable(name, value)
    # boto3 reads AWS_DEFAULT_REGION alone; the SDKs of other languages, and users of them, set AWS_REGION
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or None
    try:
        client = session.client("s3", region, endpoint_url=endpoint, config=config)
    except ValueError as error:  # "Invalid endpoint: ..."
        raise StoreUnavailable(f"{error}: write store.endpoint (AWS_ENDPOINT_URL) as http://HOST:PORT") from None
    client.meta.events.register_first("needs-retry.s3", _refuse_redirects)
    return client


def sends_checksums(client: Any) -> bool:
    """Return True if a client adds checksums to requests that do not require them."""
    return bool(client.meta.config.request_checksum_calculation != "when_required")


def _refuse_redirects(response: Any, request_dict: dict[str, Any], **_: Any) -> None:
    """Raise `StoreUnavailable` if a server redirects to another URL, as a web server does from http to https.

    A signed request cannot follow a redirect. boto3 takes it for one of AWS to another region, and looks for that
    region by requests that are redirected too. AWS names the region in a header.
    """
    if response is None:  # the connection failed
        return
    headers = {name.lower(): value for name, value in response[0].headers.items()}
    if 300 <= response[0].status_code < 400 and "location" in headers and "x-amz-bucket-region" not in headers:
        raise StoreUnavailable(
            f"the server at {request_dict['url']} redirects to {headers['location']}: write store.endpoint "
            "(AWS_ENDPOINT_URL) as the URL of the S3 server itself"
        )
