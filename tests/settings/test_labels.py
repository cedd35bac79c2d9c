"""Bad label selectors are refused when the recipe is loaded, not when Ray places the first worker."""

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
def test_ray_accepts_valid_selectors(labels: dict[str, str]) -> None:
    assert Demand(labels=labels).labels == labels
    assert validate_label_selector(labels) is None


@pytest.mark.parametrize(
    "condition",
    ["", "!", "!in(", "in()", "in(a", "in(a,)", "in(!a)", "(a)", "!!a", "a b", "a,b", "-a", "a-", "a\n", "w" * 64],
)
def test_malformed_conditions_are_refused(condition: str) -> None:
    with pytest.raises(ValidationError, match=r"is not a condition on label kind: use value, !value, in\(a,b\)"):
        Demand(labels={"kind": condition})


@pytest.mark.parametrize("key", ["", "-a", "a b", "a/", "/a", "a/b/c", "a..b/c", "k" * 64, "a." * 127 + "a/k"])
def test_malformed_keys_are_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="is not a label: use a name like kind"):
        Demand(labels={key: "large"})
