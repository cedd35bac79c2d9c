"""API keys of the endpoint: how they are made, and the list of their hashes that a server reads.

A list has one key per line: the SHA-256 hash of the key in hexadecimal digits, and NAME=VALUE pairs of `ApiKey`. Blank
lines and lines that begin with `#` are skipped. The keys themselves are known to the clients alone.

    # made by `bam serve-key`
    5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5 name=alice requests_per_minute=60
"""

import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from bam_ray.errors import SettingsError
from bam_ray.settings.strict import Count, Strict

ENVIRONMENT = "env:"  # the prefix of a list in an environment variable
SECRET_BYTES = 32  # of a new key


class ApiKey(Strict):
    """A key as the server knows it: by its hash, with the limits of the client that has it."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 hash of the key, in hexadecimal digits."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]
    """Name of the client. By default the first 8 digits of the hash."""
    requests_per_minute: Count | None = None
    """Number of requests per minute. `null` means no limit."""
    tokens_per_minute: Count | None = None
    """Number of tokens per minute, prompts and completions together. `null` means no limit."""
    concurrent_requests: Count | None = None
    """Number of requests at the same time. `null` means no limit."""


def new_api_key() -> str:
    """Return a new random key with 256 bits of entropy."""
    return f"bam-{secrets.token_urlsafe(SECRET_BYTES)}"


def hash_api_key(key: bytes) -> str:
    """Return the SHA-256 hash of a key, in hexadecimal digits.

    A fast hash is enough, because keys are random: a slow one protects passwords, which can be guessed.
    """
    return hashlib.sha256(key).hexdigest()


def read_api_keys(source: str) -> list[ApiKey]:
    """Return the keys of a list. Its form is described at the top of this module.

    Args:
        source: `env:NAME` for the value of an environment variable, or the path of a file.

    Raises:
        SettingsError: The list is missing, empty or wrong.
    """
    text = _read_list(source)
    keys = [_parse_line(line, f"line {number} of {source}") for number, line in _entries(text)]
    if not keys:
        raise SettingsError(f"serve.api_keys: {source} has no key: add the line that `bam serve-key` prints")
    for field, values in (("key", [key.sha256 for key in keys]), ("name", [key.name for key in keys])):
        if repeated := _first_repeated(values):
            raise SettingsError(f"serve.api_keys: {source} has the {field} {repeated} twice: remove one")
    return keys


def _read_list(source: str) -> str:
    if source.startswith(ENVIRONMENT):
        name = source.removeprefix(ENVIRONMENT)
        if name not in os.environ:
            raise SettingsError(
                f"serve.api_keys is {source}, but the variable {name} is not set where the endpoint is deployed from: "
                "set it, or name a file"
            )
        return os.environ[name]
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SettingsError(f"serve.api_keys: {source} cannot be read ({reason}): name a readable file") from None


def _entries(text: str) -> list[tuple[int, str]]:
    """Return the lines that describe a key, with their numbers."""
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def _parse_line(line: str, place: str) -> ApiKey:
    digest, *pairs = line.split()
    plain = {"sha256": digest, "name": digest[:8]}
    plain |= {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
    try:
        return ApiKey.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        # The wrong value is not repeated: it may be a key in place of its hash
        raise SettingsError(f"serve.api_keys: {place}: {first['loc'][0]}: {first['msg']}: correct the line") from None


def _first_repeated(values: Sequence[str]) -> str | None:
    return next((value for i, value in enumerate(values) if value in values[:i]), None)
