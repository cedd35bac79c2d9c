"""Manifests survive serialization, and identities depend on exactly what determines the content."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.checkpoint.manifest import ComputeCost, FileEntry, Manifest, identity
from bam_ray.errors import CheckpointError
from bam_ray.settings import TrainingSettings

NAMES = st.text(min_size=1, max_size=20)
SETTINGS = st.dictionaries(NAMES, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES)
PARENTS = st.lists(NAMES, max_size=3).map(tuple)


@given(
    settings=SETTINGS,
    parents=PARENTS,
    metrics=st.dictionaries(NAMES, st.floats(allow_nan=False)),
    files=st.dictionaries(NAMES, st.builds(FileEntry, size=st.integers(0, 1 << 60), sha256=st.just("ab" * 32))),
    compute=st.builds(ComputeCost, flops=st.floats(0, 1e30), device_seconds=st.floats(0, 1e9)),
    step=st.integers(0, 1 << 40),
)
def test_a_manifest_survives_serialization(**fields: object) -> None:
    manifest = Manifest.model_validate({"id": "code-1", "kind": "branches", "name": "code", **fields})
    assert Manifest.from_bytes(manifest.to_bytes(), "here") == manifest


def test_nan_and_infinity_survive_serialization() -> None:
    manifest = Manifest(id="a", kind="mixtures", name="b", metrics={"nll": math.nan, "perplexity": math.inf})
    metrics = Manifest.from_bytes(manifest.to_bytes(), "here").metrics
    assert math.isnan(metrics["nll"])
    assert metrics["perplexity"] == math.inf


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"id": "a", "name": "b"}', b'{"id": "a", "name": "b", "kind": "models"}'],
)
def test_bytes_that_are_not_a_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="s3://bam/x is not a manifest: ") as caught:
        Manifest.from_bytes(data, "s3://bam/x")
    assert "\n" not in str(caught.value)


def test_a_manifest_with_unknown_fields_is_refused() -> None:
    data = Manifest(id="a", kind="seeds", name="b").to_bytes().replace(b'"step"', b'"stop"')
    with pytest.raises(CheckpointError, match="is not a manifest"):
        Manifest.from_bytes(data, "here")


def test_identities_do_not_change_between_versions() -> None:
    # If these values change, no run finds the artifacts that it made before, so a change must be intended
    assert identity("code", {"tokens": 100, "betas": [0.9, 0.95]}, ("seed-1",)) == "code-dfc5eb0e2ae9"
    training = TrainingSettings(tokens=100, peak_lr=0.001)
    assert identity("seed", training.model_dump(mode="json")) == identity("seed", training)


@given(name=NAMES, settings=SETTINGS, parents=PARENTS)
def test_an_identity_depends_on_all_arguments(name: str, settings: dict[str, object], parents: tuple[str, ...]) -> None:
    id = identity(name, settings, parents)
    assert id == identity(name, dict(reversed(settings.items())), parents)
    assert id.startswith(f"{name}-")
    assert len(id) == len(name) + 13
    others = {
        identity(f"{name}x", settings, parents),
        identity(name, {**settings, "another": 1} if "another" not in settings else {}, parents),
        identity(name, settings, (*parents, "seed-1")),
        id,
    }
    assert len(others) == 4


def test_an_identity_depends_on_the_order_of_parents() -> None:
    assert identity("mix", {}, ("a", "b")) != identity("mix", {}, ("b", "a"))
