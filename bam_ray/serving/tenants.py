"""The clients of a server: who may send requests, and how many.

A tenant is the holder of one API key. A server without keys has one tenant without limits. Limits per minute are token
buckets: a tenant that has been idle may use a whole minute's worth at once, and the bucket refills continuously. Limits
hold for each server, so N replicas together allow N times as much.
"""

import hmac
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bam_ray.serving.openai_types import RateLimited, RequestError
from bam_ray.settings.api_keys import ApiKey, hash_api_key

Clock = Callable[[], float]  # returns a time in seconds
BUSY_RETRY_SECONDS = 1.0  # after which a tenant with too many requests at the same time should try again


class TokenBucket:
    """A limit of units per minute."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.capacity = per_minute
        self._clock = clock
        self._level, self._updated = float(per_minute), clock()

    @property
    def level(self) -> float:
        """The units that are left."""
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._updated) * self.capacity / 60)
        self._updated = now
        return self._level

    def seconds_until(self, level: float) -> float:
        """Return the time after which the bucket has `level` units, if nobody takes any."""
        return max(0.0, level - self.level) * 60 / self.capacity

    def add(self, units: float) -> None:
        """Change the number of units that are left, by a negative number to take some."""
        self._level = min(self.capacity, self.level + units)


class Tenant:
    """The holder of an API key, with the use that it makes of its limits."""

    def __init__(self, name: str, key: ApiKey | None = None, clock: Clock = time.monotonic) -> None:
        self.name = name
        self.active = 0  # requests
        requests = key and key.requests_per_minute
        tokens = key and key.tokens_per_minute
        self.requests = TokenBucket(requests, clock) if requests else None
        self.tokens = TokenBucket(tokens, clock) if tokens else None
        self._concurrent_requests = key.concurrent_requests if key else None

    def admit(self) -> "Admission":
        """Count one more request. Raises `RateLimited` if it exceeds a limit."""
        if self._concurrent_requests is not None and self.active >= self._concurrent_requests:
            message = (
                f"this API key may have {self._concurrent_requests} requests at the same time: wait for one to end"
            )
            raise RateLimited(message, "requests", BUSY_RETRY_SECONDS)
        if self.requests is not None:
            wait = self.requests.seconds_until(1)
            if wait > 0:
                message = f"this API key may send {self.requests.capacity} requests per minute: retry later"
                raise RateLimited(message, "requests", wait)
            self.requests.add(-1)
        return Admission(self)

    def rate_headers(self) -> dict[str, str]:
        """Return OpenAI's headers about the limits per minute."""
        headers = {}
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.capacity)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level)))
                headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(bucket.seconds_until(bucket.capacity))}s"
        return headers


@dataclass
class Admission:
    """One request of a tenant, from its admission to its end.

    The tokens that it may use at most are taken from the limit before it starts, and those that it did not use are
    given back at its end.
    """

    tenant: Tenant
    used_tokens: int = 0
    _reserved_tokens: int = 0

    def __post_init__(self) -> None:
        self.tenant.active += 1

    def reserve(self, tokens: int) -> None:
        """Take `tokens` from the limit. Raises `RateLimited` if fewer are left."""
        bucket = self.tenant.tokens
        if bucket is None:
            return
        if tokens > bucket.capacity:
            message = f"this request may use {tokens} tokens, but this API key has {bucket.capacity} per minute"
            raise RequestError(400, f"{message}: send fewer or shorter prompts, or lower max_tokens")
        wait = bucket.seconds_until(tokens)
        if wait > 0:
            message = f"this API key may use {bucket.capacity} tokens per minute, and this request may use {tokens}"
            raise RateLimited(f"{message}: retry later", "tokens", wait)
        bucket.add(-tokens)
        self._reserved_tokens = tokens

    def close(self) -> None:
        """End the request."""
        self.tenant.active -= 1
        if self.tenant.tokens is not None:
            self.tenant.tokens.add(self._reserved_tokens - self.used_tokens)


class Tenants:
    """All clients of a server, by their API keys."""

    def __init__(self, keys: Sequence[ApiKey], clock: Clock = time.monotonic) -> None:
        self._by_hash = [(key.sha256.encode(), Tenant(key.name, key, clock)) for key in keys]
        self._anybody = None if keys else Tenant("")

    def authenticate(self, authorization: str | None) -> Tenant:
        """Return the tenant of an `Authorization` header. Raises `RequestError` (401) without a valid key."""
        if self._anybody is not None:
            return self._anybody
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise RequestError(401, "no API key: send it as `Authorization: Bearer KEY`", "invalid_api_key")
        digest = hash_api_key(key.strip().encode("latin-1")).encode()
        found = None
        for known, tenant in self._by_hash:  # all of them: the time must not depend on the key
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise RequestError(
                401, "the API key is not valid: ask the operator of this server for one", "invalid_api_key"
            )
        return found
