"""The watcher of a spot node with metadata servers that behave like those of the clouds.

`tests/faults` checks that it makes Ray drain the node.
"""

import pytest

from bam_ray.on_ray.spot import CLOUDS
from tests.support.faults.metadata_server import MetadataServer


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_is_found_when_the_cloud_gives_it(cloud: str) -> None:
    has_notice, seconds = CLOUDS[cloud]
    assert seconds < {"aws": 120, "gcp": 30}[cloud], "the time that is left if the notice is read late"
    with MetadataServer() as metadata:
        assert not has_notice(metadata.url)
        metadata.announce_termination()
        assert has_notice(metadata.url)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_server_that_does_not_answer_gives_no_notice(cloud: str) -> None:
    with MetadataServer() as metadata:
        url = metadata.url
    assert not CLOUDS[cloud][0](url)
