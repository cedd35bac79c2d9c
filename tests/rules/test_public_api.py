"""The public API: the names that `bam_ray` exports, sorted, documented and imported when they are used."""

import subprocess
import sys

import pytest

import bam_ray


def test_public_names_are_sorted_and_complete() -> None:
    assert bam_ray.__all__ == sorted(bam_ray.__all__)
    assert set(bam_ray.__all__) == set(bam_ray._MODULES)
    assert set(bam_ray.__all__) <= set(dir(bam_ray))


@pytest.mark.parametrize("name", bam_ray.__all__)
def test_a_public_name_has_a_docstring(name: str) -> None:
    public = getattr(bam_ray, name)
    assert public.__doc__.strip()
    assert public.__module__.startswith(bam_ray._MODULES[name])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'downcycle'"):
        bam_ray.downcycle  # noqa: B018 (the access is what is tested)


def test_importing_the_package_imports_none_of_its_dependencies() -> None:
    code = "import sys, bam_ray; print({'torch', 'ray', 'transformers', 'pydantic'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
