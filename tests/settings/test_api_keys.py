"""The list of API keys, and the addresses that need one."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bam_ray.errors import SettingsError
from bam_ray.settings import ServeSettings
from bam_ray.settings.api_keys import ApiKey, hash_api_key, new_api_key, read_api_keys

KEY = "bam-secret"
HASH = hash_api_key(KEY.encode())
OTHER = "0" * 64


@pytest.fixture
def listed(tmp_path: Path) -> Any:
    """Return a function that reads the keys of a file with the given text."""

    def read(text: str) -> list[ApiKey]:
        (tmp_path / "keys").write_text(text)
        return read_api_keys(str(tmp_path / "keys"))

    return read


def test_a_list_has_a_key_per_line(listed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        f"# staff\n{HASH} name=alice requests_per_minute=60 tokens_per_minute=1000 concurrent_requests=2\n\n  {OTHER}\n"
    )
    expected = [
        ApiKey(sha256=HASH, name="alice", requests_per_minute=60, tokens_per_minute=1000, concurrent_requests=2),
        ApiKey(sha256=OTHER, name="00000000"),
    ]
    assert listed(text) == expected
    monkeypatch.setenv("TEST_KEYS", text)
    assert read_api_keys("env:TEST_KEYS") == expected


def test_new_keys_are_random() -> None:
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("bam-") and len(key) == 47 for key in keys)
    assert hash_api_key(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# nothing\n", "has no key"),
        (KEY, "line 1 .*sha256: String should match"),
        (f"{HASH}\n{HASH[:-1]}", "line 2 .*sha256"),
        (f"{HASH} limit=5", "limit: Extra inputs are not permitted"),
        (f"{HASH} requests_per_minute=0", "requests_per_minute: .*greater than or equal to 1"),
        (f"{HASH} requests_per_minute=many", "requests_per_minute: .*integer"),
        (f"{HASH} name=", "name: String should match"),
        (f"{HASH} name=a\n{HASH} name=b", f"has the key {HASH} twice"),
        (f"{HASH} name=a\n{OTHER} name=a", "has the name a twice"),
    ],
)
def test_wrong_lists_are_refused(listed: Any, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        listed(text)
    assert KEY not in str(refused.value), "a key that was listed in place of its hash is not printed"


def test_missing_lists_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_LIST", raising=False)
    with pytest.raises(SettingsError, match="NO_SUCH_LIST is not set"):
        read_api_keys("env:NO_SUCH_LIST")
    with pytest.raises(SettingsError, match="No such file"):
        read_api_keys(str(tmp_path / "keys"))
    (tmp_path / "keys").write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_api_keys(str(tmp_path / "keys"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServeSettings(host=host).is_local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.com", "localhost.example.com", ""])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(ValidationError, match=r"set serve\.api_keys .* or serve\.open to true"):
        ServeSettings(host=host)
    assert not ServeSettings(host=host, open=True).is_local
    assert ServeSettings(host=host, api_keys="env:KEYS").api_keys == "env:KEYS"


@pytest.mark.parametrize("settings", [{"max_queued_prompts": 63}, {"max_queued_tokens": 511}])
def test_a_request_must_fit_into_the_queue(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="a request has to fit into the queue"):
        ServeSettings(**settings)
