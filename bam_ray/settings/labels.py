"""Label selectors in Ray's grammar, checked here: Ray would refuse one only when the first worker is placed.

Keys and values are like Kubernetes': letters and digits, `-`, `_` and `.` between them, 63 characters at most; before a
key's name may stand a domain and a slash.
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
            raise ValueError(f"{key!r} is no label: write a name like kind or ray.io/accelerator-type")
        if not CONDITION.fullmatch(condition):
            raise ValueError(
                f"{condition!r} is no condition on label {key}: write value, !value, in(a,b) or !in(a,b), values of "
                "letters, digits and - _ . between them"
            )
    return selector


LabelSelector = Annotated[dict[str, str], AfterValidator(_checked)]
"""What a node's labels must be: for each key `value`, `!value`, `in(a,b)` or `!in(a,b)`."""
