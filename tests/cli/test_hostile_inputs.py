"""Whatever a user, a file or a server gives: one error line, exit code 1 and no traceback."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control import status
from bam_ray.on_ray import submit
from tests.support.command_line import bam, refusal

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "recipes" / "demo.yaml")
HOSTILE_NAME = "[/usr] \x1b[31m\x07"
STATUS: dict[str, Any] = {
    "updated": "2026-01-01T00:00:00Z",
    "run": HOSTILE_NAME,
    "state": "failed",
    "rows": [
        {
            "kind": "branches",
            "name": HOSTILE_NAME,
            "id": "b-1",
            "state": "failed",
            "node": HOSTILE_NAME,
            "error": HOSTILE_NAME,
            "log": [HOSTILE_NAME],
            "past": [
                {"node": HOSTILE_NAME, "began": "2026-01-01T00:00:00Z", "seconds": 1, "step": 1, "cause": HOSTILE_NAME}
            ],
        }
    ],
}


@pytest.mark.parametrize(
    "address",
    [
        "ray://127.0.0.1:10001",
        "127.0.0.1:6379",
        "localhost:8265",
        "auto",
        "ftp://127.0.0.1:8265",
        "os://127.0.0.1:8265",
        "http://",
        "http://127.0.0.1:notaport",
        "http://127.0.0.1:99999",
        "http://[::1",
        "http://127.0.0.1:8265\n",
        "[/usr]",
        " ",
    ],
)
def test_addresses_that_are_no_dashboard_are_refused(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = refusal(monkeypatch, capsys, "run", DEMO)
    assert "RAY_ADDRESS is " in line and "http://127.0.0.1:8265" in line


@contextmanager
def answering(code: int, body: bytes) -> Iterator[str]:
    """Run an HTTP server that gives one answer to everything, and yield its URL. Code 0 means that it never answers."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not code:
                ended.wait(30)
                return
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (200, b"<html>A router's page</html>", "does not answer as the dashboard of a Ray cluster"),
        (200, b"{}", "does not answer as the dashboard of a Ray cluster"),
        (200, b'{"ray_version": "0.1"}', "does not answer as the dashboard of a Ray cluster"),
        (200, b'{"ray_version": "[/x] no version"}', "does not answer as the dashboard of a Ray cluster"),
        (404, b"", "does not answer as the dashboard of a Ray cluster"),
        (500, b"Traceback (most recent call last)", "does not answer as the dashboard of a Ray cluster"),
        (401, b"", "token"),
        (0, b"", "no Ray cluster answers at"),
    ],
)
@pytest.mark.parametrize("path", ["", "/", "/some/path"])
def test_servers_that_are_no_dashboard_are_refused(
    code: int, body: bytes, words: str, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(submit, "ANSWER_SECONDS", 0.5)
    with answering(code, body) as url:
        monkeypatch.setenv("RAY_ADDRESS", url + path)
        assert words in refusal(monkeypatch, capsys, "run", DEMO)


def test_a_run_must_start_in_the_root_of_the_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copy(DEMO, tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    line = refusal(monkeypatch, capsys, "run", "recipe.yaml")
    assert "run this command in the root folder of the repository" in line
    monkeypatch.chdir(ROOT)
    line = refusal(monkeypatch, capsys, "run", str(tmp_path / "recipe.yaml"))
    assert f"{tmp_path}/recipe.yaml is not below {ROOT}" in line and "copy the recipe to it" in line


@pytest.mark.parametrize(
    "store", ["s3://", "ftp://x/y", "~nobody-of-that-name/x", "memory://", "/dev/null/x", "x" * 300]
)
def test_commands_refuse_impossible_places(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["status", store],
        ["report", store],
        ["export-step", store, "seeds/seed", "--out", str(tmp_path / "out")],
        ["inspect", store],
        ["verify", store],
        ["export", store, "--out", str(tmp_path / "out")],
        ["remove", store, "--expert", "x", "--out", str(tmp_path / "out")],
        ["absorb", store, "--branch", f"x={store}", "--out", str(tmp_path / "out")],
        ["upcycle", "--seed", store, "--branch", f"x={store}", "--out", str(tmp_path / "out")],
        ["init", str(tmp_path / "new.yaml"), "--seed", store, "--text", "general=a", "--text", f"b={store}"],
    ):
        refusal(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", HOSTILE_NAME],
        ["plan", DEMO, HOSTILE_NAME],
        ["plan", DEMO, f"name={HOSTILE_NAME}"],
        ["plan", DEMO, "--cluster", HOSTILE_NAME],
        ["plan", "/proc/self/mem"],
        ["plan", "/"],
        ["status", HOSTILE_NAME],
        ["inspect", HOSTILE_NAME],
        ["export-step", "x", HOSTILE_NAME, "--out", "y"],
        ["export", "x", "--format", HOSTILE_NAME, "--out", "y"],
        ["upcycle", "--seed", "x", "--branch", HOSTILE_NAME, "--out", "y"],
        ["upcycle", "--seed", "x", "--branch", "a=b", "--set", f"{HOSTILE_NAME}=1", "--out", "y"],
        ["upcycle", "--seed", "x", "--branch", "a=b", "--set", "num_experts=" + "9" * 5000, "--out", "y"],
        ["init", DEMO, "--seed", "x", "--text", "a=b"],
        ["init", "/nowhere/at/all.yaml", "--seed", HOSTILE_NAME, "--text", "general=b", "--text", "a=b"],
    ],
    ids=lambda arguments: " ".join(arguments[:4])[:40],
)
def test_hostile_arguments_are_printed_as_they_are(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(monkeypatch, capsys, *arguments)
    assert "\x1b[3" not in line.removeprefix("\x1b[31m") and "\x07" not in line


def test_a_hostile_status_is_shown_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    monkeypatch.setenv("COLUMNS", "200")
    assert bam(monkeypatch, "status", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.count("[/usr] [31m") >= 5
    assert "\x1b" not in out and "\x07" not in out


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["failed", "1e999"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROW: dict[str, Any] = STATUS["rows"][0]
CHANGED = st.one_of(
    st.binary(max_size=30),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.tuples(st.sampled_from(sorted(STATUS)), JSON).map(lambda pair: json.dumps(STATUS | dict([pair])).encode()),
    st.tuples(st.sampled_from(sorted(ROW)), JSON).map(
        lambda pair: json.dumps(STATUS | {"rows": [ROW | dict([pair])]}).encode()
    ),
    st.just(b'{"rows": ' + b"[" * 100_000),
)
ODD_ROWS = [
    {"eta_seconds": float("nan")},
    {"eta_seconds": float("inf")},
    {"eta_seconds": 1e308},
    {"step": 10**4000},
    {"tokens_per_second": float("inf")},
    {"past": [ROW["past"][0] | {"began": "2026-01-01T00:00:00"}]},
    {"past": [ROW["past"][0] | {"began": "0001-01-01T00:00:00Z"}]},
    {"past": [ROW["past"][0] | {"began": "9999-12-31T23:59:59Z", "seconds": float("nan")}]},
    {"error": "half \ud83d"},
    {"log": ["x" * 100_000] * 100},
]


@pytest.mark.parametrize("row", ODD_ROWS, ids=lambda row: str(row)[:40])
def test_odd_rows_of_a_status_are_shown_or_refused(
    row: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    for changed in ({"rows": [ROW | row]}, {"updated": "2026-01-01T00:00:00"}, {"updated": "0001-01-01T00:00:00Z"}):
        (tmp_path / status.STATUS).write_text(json.dumps(STATUS | {"state": "running"} | changed))
        assert bam(monkeypatch, "status", str(tmp_path)) in (0, 1)


def test_a_report_of_any_content_is_shown_or_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = FolderStore(str(tmp_path / "run"))
    artifact = Artifact(store, ArtifactKind.REPORTS, "report-1")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "results.json").write_text('{"run": "[/usr]", "models": 7}')
    manifest = Manifest(id="report-1", kind=ArtifactKind.REPORTS, name="report")
    artifact.publish(tmp_path / "files", manifest)
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    line = refusal(monkeypatch, capsys, "report", store.uri, "--out", str(tmp_path / "out"))
    assert "results.json is not the result of an evaluation" in line
    store.put("reports/report-1/manifest.json", b'{"id": [' * 1000)
    assert "is not a manifest" in refusal(monkeypatch, capsys, "report", store.uri)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=CHANGED)
def test_a_status_of_any_content_is_shown_or_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / status.STATUS).write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        assert bam(patch, "status", str(tmp_path)) in (0, 1)
