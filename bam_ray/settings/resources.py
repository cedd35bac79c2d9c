"""Resources that a worker requests from its node, with label selectors in Ray's grammar.

Label selectors are checked here because Ray rejects a bad one only when it places the first worker. Keys and values
follow Kubernetes' rules: letters and digits with `-`, `_` and `.` between them, at most 63 characters. A domain and a
slash may precede the name of a key.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from bam_ray.settings.strict import NotNegative, Strict

WORD = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?"
KEY = re.compile(rf"(?:(?=[^/]{{1,253}}/){LABEL}(?:\.{LABEL})*/)?{WORD}")
CONDITION = re.compile(rf"!?(?:{WORD}|in\({WORD}(?:, ?{WORD})*\))")


def _checked(selector: dict[str, str]) -> dict[str, str]:
    for key, condition in selector.items():
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a label: use a name like kind or ray.io/accelerator-type")
        if not CONDITION.fullmatch(condition):
            raise ValueError(
                f"{condition!r} is not a condition on label {key}: use value, !value, in(a,b) or !in(a,b), with values "
                "of letters and digits with - _ . between them"
            )
    return selector


LabelSelector = Annotated[dict[str, str], AfterValidator(_checked)]
"""Conditions on a node's labels. Each key maps to `value`, `!value`, `in(a,b)` or `!in(a,b)`."""


class Demand(Strict):
    """The resources of one worker."""

    cpus: NotNegative = 1.0
    """Number of CPUs. The worker computes with as many threads."""
    gpus: NotNegative = 0.0
    """Number of GPUs: 0, 1, or a fraction, so that several tasks share a GPU. With 0 the worker computes on the CPU and
    sees no GPU of its node."""
    memory_gib: NotNegative | None = None
    """Host memory in GiB. `null` means the estimate of `bam plan`. 0 means that nothing is reserved: the worker takes
    its share of the free memory."""
    labels: LabelSelector = Field(default={})
    """Ray's label selector for the node, for example `{"ray.io/accelerator-type": "in(A100,H100)"}`."""

    @field_validator("gpus")
    @classmethod
    def _are_all_used(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError(
                f"a worker computes on one GPU, so it would leave the others of {gpus:g} idle: use 1, and more workers "
                "or replicas"
            )
        return gpus


class Needs(Demand):
    """The resources of one worker, with alternatives."""

    fallback: tuple[Demand, ...] = ()
    """Alternatives, in order. Each is used only if no node of the cluster can ever satisfy those before it."""
