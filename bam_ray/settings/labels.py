"""Label selectors in Ray's grammar.

They are checked here because Ray rejects a bad selector only when it places the first worker. Keys and values follow
Kubernetes' rules: letters and digits with `-`, `_` and `.` between them, at most 63 characters. A domain and a slash
may precede the name of a key.
"""

import re
from typing import Annotated

from pydantic import AfterValidator

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
