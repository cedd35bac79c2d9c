"""The container file, validated without a container engine: its grammar, and the files that it copies."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.specifiers import SpecifierSet

from tests.support.cluster.manifests import ROOT

KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Return the instructions in order, with continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "cluster/Containerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def copied() -> list[str]:
    """Return the paths that are copied from the repository to the same path in the working folder."""
    sources = []
    for word, rest in instructions():
        if word == "COPY":
            *names, target = rest.split()
            assert target in ("./", names[0])
            sources += names
    return sources


def ignored(path: str) -> bool:
    """Return True if .dockerignore excludes a path. The last matching line decides."""
    excluded = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/") if line.startswith("**/") else [path.split("/")[0]]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(part, pattern) for part in parts):
            excluded = not line.startswith("!")
    return excluded


def test_the_instructions_are_valid() -> None:
    argument, first, *others = instructions()
    base = re.fullmatch(r"BASE=docker\.io/library/python:(\d+\.\d+)-slim-bookworm", argument[1])
    assert base
    assert (argument[0], first) == ("ARG", ("FROM", "${BASE}"))  # a build may name a digest
    assert base[1] in SpecifierSet(PROJECT["requires-python"])
    for word, rest in others:
        assert word in KNOWN - {"FROM"}
        if word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
    user, group = dict(others)["USER"].split(":")  # Kubernetes needs numbers to check that the user is not root
    assert int(user) > 0
    created = " ".join(rest for word, rest in others if word == "RUN")
    assert (
        f"groupadd --gid {group} ray" in created and f"useradd --create-home --uid {user} --gid {group} ray" in created
    )
    assert "RAY_AUTH_MODE=token" in dict(others)["ENV"].split()
    locked = [path for word, rest in others if word == "RUN" for path in re.findall(r" -r (\S+)", rest)]
    assert locked == ["requirements/image.txt", "requirements/torch.txt"]
    assert all((ROOT / path).exists() for path in locked)


def test_dockerignore_admits_copied_files_and_no_secrets() -> None:
    for name in copied():
        assert (ROOT / name).exists()
        assert not ignored(name)
    for name in (
        ".bam/env",
        ".bam/ray_token",
        ".venv/bin/python",
        ".git/config",
        "bam_ray/__pycache__/x.pyc",
        "tests/x",
    ):
        assert ignored(name)


def test_the_copied_files_build_the_complete_package(tmp_path: Path) -> None:
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, str(tmp_path / "wheels"), str(tmp_path)], check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith(f"bam_ray-{PROJECT['version']}-")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "bam_ray").rglob("*.py")}
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert modules | {"bam_ray/py.typed"} <= packed
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in packed)
