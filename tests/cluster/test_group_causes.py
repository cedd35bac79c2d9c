"""The error of a process group is its root cause, not an error that the end of one rank caused on others."""

import pytest
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from bam_ray.errors import LossNotFinite, StoreUnavailable
from bam_ray.on_ray.group import root_cause

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
OURS = LossNotFinite("step 7: the loss (nan) is not finite")
PEER_LOST = [
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:1234: Connection reset by peer"),
    dist.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL 2.27"
    ),
]
IN_NCCL = dist.DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error: 'out of memory'")


def dead() -> Exception:
    """Return what Ray Train reports of a rank whose process is gone."""
    return WorkerHealthCheckFailedError("A worker health check failed.", RayActorError())


@pytest.mark.parametrize("symptom", PEER_LOST, ids=["closed", "reset", "nccl"])
@pytest.mark.parametrize("own", [OUT_OF_MEMORY, IN_NCCL, OURS], ids=["memory", "collective", "ours"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_lost_its_peer_is_not_the_root_cause(rank: int, own: Exception, symptom: Exception) -> None:
    assert root_cause(WorkerGroupError("", {rank: own, 1 - rank: symptom})) is own


@pytest.mark.parametrize("symptom", [*PEER_LOST, IN_NCCL], ids=["closed", "reset", "nccl", "collective"])
def test_ranks_that_died_without_an_error_are_named(symptom: Exception) -> None:
    found = root_cause(WorkerGroupError("", {0: symptom, 1: dead(), 2: symptom, 3: dead()}))
    assert str(found) == "the process or the node of rank 1, 3 died"


@pytest.mark.parametrize("own", [OUT_OF_MEMORY, OURS], ids=["memory", "ours"])
def test_an_error_of_a_rank_comes_before_dead_processes(own: Exception) -> None:
    assert root_cause(WorkerGroupError("", {0: dead(), 1: own})) is own


def test_errors_of_this_package_come_first() -> None:
    found = root_cause(WorkerGroupError("", {3: StoreUnavailable("down"), 2: OURS, 0: OUT_OF_MEMORY}))
    assert found is OURS
    assert any(note.startswith("on rank 2:") for note in found.__notes__)


def test_a_lost_peer_is_reported_if_there_is_no_other_error() -> None:
    assert root_cause(WorkerGroupError("", {1: PEER_LOST[1], 0: PEER_LOST[0]})) is PEER_LOST[0]
