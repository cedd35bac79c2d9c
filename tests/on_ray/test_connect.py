"""A job that is started by hand with a wrong address ends with one line."""

import pytest

from bam_ray.errors import PlacementError
from bam_ray.on_ray.run import connect


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ftp://x", "[/x]", "a:b:c", "ray://"])
def test_wrong_addresses_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PlacementError, match="no Ray cluster answers at RAY_ADDRESS=") as raised:
        connect()
    assert len(str(raised.value).splitlines()) == 1
