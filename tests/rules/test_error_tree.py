"""The tree of errors is documented completely, and every error is rendered as one line."""

import inspect

import pytest

from bam_ray import errors
from bam_ray.errors import BamError, SettingsError, one_line


def test_the_module_docstring_lists_every_error() -> None:
    classes = [item for item in vars(errors).values() if inspect.isclass(item) and issubclass(item, BamError)]
    documented = [line.strip("│├└─ ").partition(" ")[0] for line in (errors.__doc__ or "").splitlines()]
    assert [error.__name__ for error in classes] == [name for name in documented if name in vars(errors)]


@pytest.mark.parametrize(
    ("error", "whole", "first_line"),
    [
        (SettingsError("mix.workers is 3: use 2"), "mix.workers is 3: use 2", "mix.workers is 3: use 2"),
        (ValueError("\n  bad value\n\n    in line 3\n"), "ValueError: bad value in line 3", "ValueError: bad value"),
        (OSError(), "OSError", "OSError"),
    ],
)
def test_one_line_keeps_the_message_and_names_foreign_types(error: BaseException, whole: str, first_line: str) -> None:
    assert one_line(error) == first_line
    assert one_line(error, all_lines=True) == whole
