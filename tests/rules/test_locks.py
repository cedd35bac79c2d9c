"""The lock files in requirements/ cover what pyproject.toml asks for, with hashes and without CUDA packages."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"development.txt": ["dev", "demo", "docs", "local"], "image.txt": ["demo"]}
PINNED = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;]+)(?P<rest>[^\n]*(?:\n {4}--hash=[^\n]*)*)", re.MULTILINE)
TORCH = (ROOT / "requirements/torch.txt").read_text()


def pins(text: str) -> dict[str, list[str]]:
    """Return the pinned versions by package; platforms may differ in the version."""
    found: dict[str, list[str]] = {}
    for match in PINNED.finditer(text):
        found.setdefault(canonicalize_name(match["name"]), []).append(match["version"])
    return found


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_file_satisfies_every_requirement(name: str) -> None:
    locked = pins((ROOT / "requirements" / name).read_text()) | pins(TORCH)
    asked = [
        *PROJECT["dependencies"],
        *(each for extra in EXTRAS[name] for each in PROJECT["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, asked):
        if requirement.name != PROJECT["name"]:
            versions = locked[canonicalize_name(requirement.name)]
            assert all(requirement.specifier.contains(version) for version in versions), requirement


@pytest.mark.parametrize("name", EXTRAS)
def test_every_pin_of_a_lock_file_has_hashes(name: str) -> None:
    matches = list(PINNED.finditer((ROOT / "requirements" / name).read_text()))
    assert len(matches) > 100
    assert [match["name"] for match in matches if "--hash=sha256:" not in match["rest"]] == []


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_file_installs_no_cuda_package(name: str) -> None:
    locked = pins((ROOT / "requirements" / name).read_text())
    assert [each for each in locked if each in {"torch", "triton"} or each.startswith(("nvidia-", "cuda-"))] == []


def test_both_lock_files_pin_the_same_versions() -> None:
    image, development = (pins((ROOT / "requirements" / name).read_text()) for name in ("image.txt", "development.txt"))
    assert {name: versions for name, versions in image.items() if development.get(name) != versions} == {}


def test_the_image_has_no_binary_of_a_third_party() -> None:
    (local,) = PROJECT["optional-dependencies"]["local"]
    name = Requirement(local).name
    assert name in pins((ROOT / "requirements/development.txt").read_text())
    assert name not in pins((ROOT / "requirements/image.txt").read_text())
