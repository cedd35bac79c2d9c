"""API keys and their limits, called with the `openai` client."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from bam_ray.serving import AppOptions, DecodeEngine, Scheduler, create_app
from bam_ray.serving.openai_types import RateLimited, RequestError
from bam_ray.serving.tenants import Tenant, Tenants, TokenBucket
from bam_ray.settings.api_keys import ApiKey, hash_api_key
from tests.support.http_server import running_server

ALICE, BOB = "bam-alice", "bam-bob"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "the", "max_tokens": 2}


def key(secret: str, name: str, **limits: int) -> ApiKey:
    return ApiKey(sha256=hash_api_key(secret.encode()), name=name, **limits)


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def serving(engine: DecodeEngine, *keys: ApiKey, **options: Any) -> Iterator[TestClient]:
    app = create_app(Scheduler(engine), "tiny", AppOptions(api_keys=keys, **options))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
    ],
)
def test_everything_but_health_needs_a_key(engine: DecodeEngine, method: str, path: str) -> None:
    with serving(engine, key(ALICE, "alice"), key(BOB, "bob")) as client:
        wrong = [{}, bearer("wrong"), bearer(""), bearer(ALICE.upper()), {"Authorization": ALICE}]
        wrong += [{"Authorization": f"Basic {ALICE}"}, bearer(key(ALICE, "alice").sha256), bearer(f"{ALICE} {BOB}")]
        for headers in (*wrong, {"Authorization": b"Bearer \xff\xfe"}):
            response = client.request(method, path, headers=headers)  # type: ignore[arg-type]
            error = response.json()["error"]
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert response.headers["x-request-id"]
        for secret in (ALICE, BOB):
            assert client.request(method, path, headers=bearer(secret)).status_code != 401
        assert client.get("/health").status_code == 200


def test_a_body_without_a_key_is_not_read(engine: DecodeEngine) -> None:
    with serving(engine, key(ALICE, "alice")) as client:
        assert client.post("/v1/completions", content=b"x" * (5 << 20)).status_code == 401


def test_the_openai_client_sends_the_key(engine: DecodeEngine) -> None:
    app = create_app(Scheduler(engine), "tiny", AppOptions(api_keys=[key(ALICE, "alice", requests_per_minute=2)]))
    with running_server(app) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=ALICE, max_retries=0) as client:
            answers = client.completions.with_raw_response
            remaining = [answers.create(**BODY).headers["x-ratelimit-remaining-requests"] for _ in range(2)]
            assert remaining == ["1", "0"]
            with pytest.raises(openai.RateLimitError, match="2 requests per minute") as refused:
                client.completions.create(**BODY)
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key=BOB, max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="not valid"),
        ):
            client.models.list()
    assert refused.value.code == "rate_limit_exceeded"
    headers = refused.value.response.headers
    assert 0 < int(headers["retry-after-ms"]) <= 30_000
    assert int(headers["retry-after"]) == -(-int(headers["retry-after-ms"]) // 1000)
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "0")
    assert headers["x-ratelimit-reset-requests"] in ("59s", "60s")


@pytest.mark.parametrize("stream", [True, False])
def test_tokens_that_were_not_used_are_given_back(
    engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("bam_ray.serving.app.Tenants", functools.partial(Tenants, clock=Clock()))
    fields: dict[str, Any] = {"model": "tiny", "temperature": 0}
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    with serving(engine, key(ALICE, "alice", tokens_per_minute=1000)) as client:
        spent = 0
        for prompt, max_tokens, most in (([5], 1, 2), ([5] * 9, 40, 49), ([[5] * 3, [6] * 30], 30, 93), ([5], 1, 2)):
            body = {**fields, "prompt": prompt, "max_tokens": max_tokens, "stop": "a" if most == 49 else None}
            response = client.post("/v1/completions", json=body, headers=bearer(ALICE))
            remaining = int(response.headers["x-ratelimit-remaining-tokens"])
            assert remaining == 1000 - spent - most, "all that the request may use is taken until it ends"
            last = response.text.split("data: ")[-2] if stream else response.text
            spent += json.loads(last)["usage"]["total_tokens"]
        assert 0 < spent < 150


def test_too_many_tokens_are_refused_until_some_are_left(engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_ray.serving.app.Tenants", functools.partial(Tenants, clock=Clock()))
    with serving(engine, key(ALICE, "alice", tokens_per_minute=60)) as client:

        def ask(max_tokens: int) -> Any:
            body = {**BODY, "prompt": [5] * 10, "max_tokens": max_tokens}
            return client.post("/v1/completions", json=body, headers=bearer(ALICE))

        assert ask(30).status_code == 200
        refused = ask(40)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        assert 0 < int(refused.headers["retry-after-ms"]) <= 30_000
        assert ask(1).status_code == 200
        never = client.post("/v1/completions", json={**BODY, "prompt": [[5] * 30] * 3}, headers=bearer(ALICE))
        assert (never.status_code, "96 tokens" in never.json()["error"]["message"]) == (400, True)


def test_a_bucket_refills_continuously() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.add(-60)
    assert (bucket.level, bucket.seconds_until(1)) == (0, 1)
    clock.now += 0.5
    assert (bucket.level, bucket.seconds_until(1)) == (0.5, 0.5)
    clock.now += 1000
    assert (bucket.level, bucket.seconds_until(60)) == (60, 0)
    bucket.add(10)
    assert bucket.level == 60


def test_requests_at_the_same_time_are_limited() -> None:
    tenant = Tenant("alice", key(ALICE, "alice", concurrent_requests=2))
    first, second = tenant.admit(), tenant.admit()
    with pytest.raises(RateLimited, match="2 requests at the same time"):
        tenant.admit()
    first.close()
    third = tenant.admit()
    second.close()
    third.close()
    assert tenant.active == 0


def test_a_request_that_fails_costs_no_tokens() -> None:
    clock = Clock()
    tenant = Tenant("alice", key(ALICE, "alice", tokens_per_minute=100), clock)
    admission = tenant.admit()
    admission.reserve(80)
    assert tenant.rate_headers()["x-ratelimit-remaining-tokens"] == "20"
    with pytest.raises(RateLimited, match="this request may use 30") as refused:
        tenant.admit().reserve(30)
    assert refused.value.retry_after == pytest.approx(6)
    with pytest.raises(RequestError, match="fewer or shorter prompts") as never:
        tenant.admit().reserve(101)
    assert never.value.status == 400
    admission.close()
    assert tenant.rate_headers()["x-ratelimit-remaining-tokens"] == "100"


def test_one_tenant_does_not_use_the_limits_of_another() -> None:
    tenants = Tenants([key(ALICE, "alice", requests_per_minute=1), key(BOB, "bob", requests_per_minute=1)])
    alice, bob = (tenants.authenticate(f"bearer {secret}") for secret in (ALICE, BOB))
    assert [alice.name, bob.name] == ["alice", "bob"]
    assert tenants.authenticate(f"Bearer  {ALICE} ") is alice
    alice.admit()
    bob.admit()
    with pytest.raises(RateLimited):
        alice.admit()


def test_every_end_of_a_request_frees_its_place(engine: DecodeEngine) -> None:
    with serving(engine, key(ALICE, "alice", concurrent_requests=1)) as client:
        changes: tuple[dict[str, Any], ...] = ({}, {"stream": True}, {"model": "other"}, {"prompt": []}, {"n": 2})
        for fields in changes:
            response = client.post("/v1/completions", json={**BODY, **fields}, headers=bearer(ALICE))
            assert response.status_code in (200, 400, 404)
        assert client.post("/v1/completions", json=BODY, headers=bearer(ALICE)).status_code == 200


def test_the_scheduler_gets_the_name_of_the_tenant(engine: DecodeEngine) -> None:
    names = []

    class RecordingScheduler(Scheduler):
        def generate(self, *arguments: Any, **settings: Any) -> Any:
            names.append(settings["tenant"])
            return super().generate(*arguments, **settings)

    for keys in ([key(ALICE, "alice")], []):
        app = create_app(RecordingScheduler(engine), "tiny", AppOptions(api_keys=keys))
        with TestClient(app) as client:
            assert client.post("/v1/completions", json=BODY, headers=bearer(ALICE)).status_code == 200
    assert names == ["alice", ""]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_a_local_server_answers_to_its_own_names(engine: DecodeEngine, host: str) -> None:
    with serving(engine, allowed_hosts={"localhost", "127.0.0.1", "[::1]"}) as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "localhost@evil", "x y"]
)
def test_a_local_server_refuses_other_names(engine: DecodeEngine, host: str) -> None:
    with serving(engine, allowed_hosts={"localhost", "127.0.0.1", "[::1]"}) as client:
        response = client.post("/v1/completions", json=BODY, headers={"Host": host})
        assert response.status_code == 400
        assert "names of its own machine" in response.json()["error"]["message"]
