"""Fixtures of the tests of checkpoints."""

from pathlib import Path

import pytest

from tests.support.artifact_files import write_artifact_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of files, one of them in a subfolder."""
    return write_artifact_files(tmp_path / "made")
