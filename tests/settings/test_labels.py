"""Label selectors are refused with the recipe, not by Ray when the first worker is placed."""

import pytest
from pydantic import ValidationError
from ray._private.label_utils import validate_label_selector

from bam_ray.settings import Demand

SELECTORS = [
    {"kind": "large"},
    {"kind": "!large"},
    {"ray.io/accelerator-type": "in(A100,H100)"},
    {"ray.io/accelerator-type": "!in(A100, H100)"},
    {"a_b.c-d": "v1.2_x-y", "x.example/" + "k" * 63: "w" * 63},
]


@pytest.mark.parametrize("labels", SELECTORS)
def test_what_is_let_through_ray_takes(labels: dict[str, str]) -> None:
    assert Demand(labels=labels).labels == labels
    assert validate_label_selector(labels) is None


@pytest.mark.parametrize(
    "condition",
    ["", "!", "!in(", "in()", "in(a", "in(a,)", "in(!a)", "(a)", "!!a", "a b", "a,b", "-a", "a-", "a\n", "w" * 64],
)
def test_a_condition_that_is_none_is_refused(condition: str) -> None:
    with pytest.raises(ValidationError, match=r"is no condition on label kind: write value, !value, in\(a,b\)"):
        Demand(labels={"kind": condition})


@pytest.mark.parametrize("key", ["", "-a", "a b", "a/", "/a", "a/b/c", "a..b/c", "k" * 64, "a." * 127 + "a/k"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="is no label: write a name like kind"):
        Demand(labels={key: "large"})
