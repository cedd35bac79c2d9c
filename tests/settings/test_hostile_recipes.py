"""Recipes, overrides and cluster files that no person would write are refused in one line, within moments."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bam_ray.errors import BamError, SettingsError
from bam_ray.planning.cluster_file import load_cluster
from bam_ray.planning.planner import make_plan
from bam_ray.settings import load_recipe, mixture_settings, parse_recipe

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [*{name}, *{name}, *{name}, *{name}]\n"
    for name, after in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
)
HOSTILE_YAML = {
    "deep list": "[" * 3000,
    "deeper list": "a: " + "[" * 100_000,
    "deep mapping": "".join(f"{' ' * depth}a:\n" for depth in range(2000)),
    "many references": LAUGHS,
    "itself": "name: &a [*a]",
    "itself as a mapping": "&a {name: x, data: *a}",
    "5,000 digits": "name: " + "9" * 5000,
    "no date": "name: 2024-13-45",
    "no boolean": "name: !!bool maybe",
    "empty integer": 'name: !!int ""',
    "sexagesimal": "name: !!int ':'",
    "no float": "name: !!float x",
    "list as a key": "? [a]\n: b",
    "mapping as a key": "? {a: b}\n: c",
    "no merge": "<<: 1",
    "unknown tag": "name: !!python/object/apply:os.system [true]",
    "unknown alias": "name: *nowhere",
    "two documents": "name: a\n---\nname: b",
    "tab": "a:\n\t- b",
    "control characters": "name: \x07",
    "NUL": 'name: "a\\0b"',
    "half a character": 'name: "\\ud83d"',
    "long value": "name: " + "x" * 500_000,
    "long key": "x" * 1000 + ": 1",
    "numbers as keys": "1: 2\n2.5: x\nnull: y\ntrue: z",
    "set": "name: !!set {a, b}",
    "binary": "name: !!binary aGVsbG8=",
    "too many values": "name: [" + "1," * 200_000 + "]",
    "nothing": "",
    "text": "just text",
}


def refused(text: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(SettingsError) as raised:
        parse_recipe(text, "here.yaml", overrides)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_hostile_yaml_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    assert refused(text).startswith("recipe here.yaml")
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(SettingsError) as raised:
        load_cluster(tmp_path / "cluster.yaml")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "override",
    [
        "mix.training.tokens=" + "9" * 5000,
        "mix.training.tokens=" + "9" * 4000,
        "mix.training.tokens=" + "[" * 3000,
        "mix.training.peak_lr=" + "9" * 400,
        "seed.training.peak_lr=.inf",
        "name=2024-13-45",
        "name=!!bool maybe",
        'store.uri="a\\0b"',
        ".".join(["branch"] * 2000) + "=1",
        "data.domains." + "x" * 1000 + "=1",
        "data=" + "x" * 100_000,
        "upcycle.mixtures={bam: {method: [1, 2]}}",
        "upcycle.mixtures={bam: {method: {bam: bam}}}",
        "upcycle.mixtures=[]",
        "branch=[1]",
        "branch.training=null",
        "data.seed=-1",
        "mix.training.seed=-1",
        "mix.training.batch_tokens=9223372036854775807",
        "=1",
        "a..b=1",
    ],
)
def test_hostile_overrides_are_refused_in_one_line(override: str) -> None:
    refused(DEMO.read_text(), [override])


def test_settings_of_one_mixture_are_checked_alike() -> None:
    with pytest.raises(SettingsError, match="64 bits"):
        mixture_settings({"method": "bam", "num_experts": 1 << 70})


@pytest.mark.parametrize(
    ("data", "words"), [(b"\xff\xfe\x00a", "not UTF-8"), (b"#" * (2 << 20), "more than 1,048,576")]
)
def test_files_that_are_no_recipes_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with pytest.raises(SettingsError, match=words):
        load_recipe(path)
    with pytest.raises(SettingsError, match="Is a directory"):
        load_recipe(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + DEMO.read_bytes())
    assert load_recipe(path) == load_recipe(DEMO)


def places(plain: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting and group of a recipe."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield f"{prefix}{key}"
            yield from places(value, f"{prefix}{key}.")


PLACES = sorted(places(yaml.safe_load(DEMO.read_text())))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.sampled_from([0, 1, 2, 3, 5, 7, 1 << 20, (1 << 63) - 1, 10**9])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["code", "general", "bam", "btx", "split", "soup", "auto", "~x", "s3://", "[/usr]", "package:"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(PLACES) | st.builds("{}.{}".format, st.sampled_from(PLACES), st.text(max_size=5))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3))
@example(changes=[("mix.training.tokens", 1 << 62)])
@example(changes=[("branch.training.batch_tokens", 1 << 62), ("data.sequence_length", 1)])
def test_changed_recipes_are_loaded_or_refused_in_one_line(changes: list[tuple[str, Any]]) -> None:
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes]
    with contextlib.suppress(BamError):  # any other error fails the test
        make_plan(load_recipe(DEMO, overrides), None)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(), max_size=60) | st.text("[]{}:,-&*!?|>%@`\"'#\n ab1~", max_size=60))
def test_any_text_is_refused_as_a_recipe(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_recipe(text, "here.yaml")
