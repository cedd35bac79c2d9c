"""Temporary folders of killed processes are deleted by the next process, and those of living ones are not."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bam_ray.checkpoint.scratch import new_scratch_folder, remove_scratch_folder, scratch_folder

WRITER = """
from bam_ray.checkpoint.scratch import new_scratch_folder
folder = new_scratch_folder("step")
(folder / "below").mkdir()
(folder / "below" / "model.safetensors").write_bytes(bytes(1000))
print(folder, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def writer() -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Start another process that writes to a folder; yield the folder and the process."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip()), process
        process.kill()


def test_a_folder_is_deleted_at_the_end_of_its_block(tmpdir: Path) -> None:
    with scratch_folder("model") as folder:
        (folder / "file").write_text("content")
        assert folder.parent == tmpdir
    assert list(tmpdir.iterdir()) == []


def test_a_killed_process_leaves_nothing_for_ever(tmpdir: Path) -> None:
    with writer() as (folder, process):
        assert (folder / "below" / "model.safetensors").stat().st_size == 1000
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert folder.is_dir(), "nobody has made a folder since"
    with scratch_folder("model") as ours:
        assert list(tmpdir.iterdir()) == [ours]


def test_the_folder_of_a_living_process_stays() -> None:
    with writer() as (folder, _):
        remove_scratch_folder(new_scratch_folder("model"))
        assert (folder / "below" / "model.safetensors").is_file()


def test_several_folders_of_one_process_stay() -> None:
    folders = [new_scratch_folder("step") for _ in range(3)]
    assert all(folder.is_dir() for folder in folders)
    for folder in folders:
        remove_scratch_folder(folder)


def test_other_files_and_links_are_left_alone(tmpdir: Path) -> None:
    elsewhere = tmpdir / "data"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("content")
    (tmpdir / "bam-scratch-step-link0000").symlink_to(elsewhere)
    (tmpdir / "bam-scratch-step-file0000").write_text("content")
    (tmpdir / "bam-run").mkdir()
    before = sorted(tmpdir.rglob("*"))
    remove_scratch_folder(new_scratch_folder("step"))
    assert sorted(tmpdir.rglob("*")) == before


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_folder_that_is_swept_at_once_is_made_again(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, lock = tempfile.mkdtemp, fcntl.flock
    swept: list[str] = []

    def make_and_sweep(prefix: str) -> str:
        folder = make(prefix=prefix)
        if not swept and "opened" in moment:
            swept.append(folder)
            os.rmdir(folder)
        return folder

    def sweep_and_lock(descriptor: int, operation: int) -> None:
        if not swept and "locked" in moment:
            swept.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            os.rmdir(swept[0])
        lock(descriptor, operation)

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    monkeypatch.setattr(fcntl, "flock", sweep_and_lock)
    with scratch_folder("step") as folder:
        assert folder.is_dir()
        assert [str(folder)] != swept
    assert len(swept) == 1
