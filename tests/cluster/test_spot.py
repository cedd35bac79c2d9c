"""The ear of a spot node, against metadata servers that ask for what the clouds' do. `tests/faults` has it tell Ray."""

import pytest

from bam_ray.on_ray.spot import CLOUDS
from tests.support.faults.metadata_server import MetadataServer


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_is_heard_when_it_is_given(cloud: str) -> None:
    noticed, seconds = CLOUDS[cloud]
    assert seconds < {"aws": 120, "gcp": 30}[cloud], "what is left when it is heard late"
    with MetadataServer() as metadata:
        assert not noticed(metadata.url)
        metadata.announce_termination()
        assert noticed(metadata.url)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_metadata_server_that_does_not_answer_says_nothing(cloud: str) -> None:
    with MetadataServer() as metadata:
        url = metadata.url
    assert not CLOUDS[cloud][0](url)
