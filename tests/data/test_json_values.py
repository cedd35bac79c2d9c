"""A stream of JSON values equals what `json` decodes at once, wherever the chunks end."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.data import json_values as module
from bam_ray.data.json_values import json_values

SCALARS = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
RECORDS = st.dictionaries(st.text(max_size=3), SCALARS | st.lists(SCALARS, max_size=3), max_size=4)


def decoded(text: str, most: int = 1000) -> list[object]:
    return [value for _, value in json_values(io.StringIO(text, newline=""), most)]


@given(
    records=st.lists(RECORDS, max_size=8), chunk=st.integers(1, 30), separator=st.sampled_from(["\n", "\r\n", " ", ""])
)
def test_values_do_not_depend_on_the_size_of_chunks(
    records: list[dict[str, object]], chunk: int, separator: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        assert decoded(separator.join(map(json.dumps, records))) == records
        assert decoded(json.dumps(records, indent=1)) == records


def test_lines_are_counted() -> None:
    text = '{"a":\n 1}\n\n{"b": 2} {"c": 3}\n'
    assert [line for line, _ in json_values(io.StringIO(text), 100)] == [1, 4, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": ', "line 2: not JSON"),
        ('{"a": 1}\n\n{"a": 1]', "line 3: not JSON"),
        ('[{"a": 1}\n {"a": 2}]', "line 2: expected ',' or ']'"),
        ('[{"a": 1}', "expected ',' or ']'"),
        ('[{"a": 1}]\n{"a": 2}', "line 2: text after the end of the array"),
        ('{"a": ' + "[" * 100_000, "line 1: nested too deeply"),
        ('{"a": "' + "x" * 200_000, "line 1: a value has more than 100,000 characters"),
    ],
)
def test_errors_name_the_line(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    with pytest.raises(ValueError, match="line") as raised:
        decoded(text, 100_000)
    assert message in str(raised.value)


def test_numbers_of_any_length_are_read() -> None:
    assert decoded('{"id": ' + "9" * 10_000 + ', "text": "a"}')[0] == {"id": float("inf"), "text": "a"}
