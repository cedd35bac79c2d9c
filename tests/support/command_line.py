"""The command line `bam`, run in the test's own process."""

import sys

import pytest

from bam_ray import cli


def bam(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `bam` with `arguments` and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["bam", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `bam` with `arguments`, which must fail, and return the one line that it prints to stderr."""
    assert bam(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    return line
