"""Interruption notices of spot nodes, from metadata servers that behave like those of the clouds.

The tests in `tests/faults` cover the report to Ray.
"""

import pytest

from bam_ray.on_ray.spot import CLOUDS
from tests.support.faults.metadata_server import MetadataServer


@pytest.mark.parametrize("cloud", CLOUDS)
def test_an_interruption_notice_is_detected(cloud: str) -> None:
    noticed, seconds = CLOUDS[cloud]
    assert seconds < {"aws": 120, "gcp": 30}[cloud], "the polling interval leaves time to drain"
    with MetadataServer() as metadata:
        assert not noticed(metadata.url)
        metadata.announce_termination()
        assert noticed(metadata.url)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_an_unreachable_metadata_server_gives_no_notice(cloud: str) -> None:
    with MetadataServer() as metadata:
        url = metadata.url
    assert not CLOUDS[cloud][0](url)
