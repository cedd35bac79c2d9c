"""The root cause of the failure of a process group is reported, not the errors that it causes on other ranks."""

import pytest
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from bam_ray.errors import LossNotFinite, StoreUnavailable
from bam_ray.on_ray.group import cause

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
OURS = LossNotFinite("step 7: the loss (nan) is not finite")
OTHER_WENT = [
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:1234: Connection reset by peer"),
    dist.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL 2.27"
    ),
]
IN_NCCL = dist.DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error: 'out of memory'")


def dead() -> Exception:
    """Return the error that Ray Train reports for a rank whose process died."""
    return WorkerHealthCheckFailedError("A worker health check failed.", RayActorError())


@pytest.mark.parametrize("symptom", OTHER_WENT, ids=["closed", "reset", "nccl"])
@pytest.mark.parametrize("own", [OUT_OF_MEMORY, IN_NCCL, OURS], ids=["memory", "collective", "ours"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_loss_of_a_peer_is_not_the_root_cause(rank: int, own: Exception, symptom: Exception) -> None:
    assert cause(WorkerGroupError("", {rank: own, 1 - rank: symptom})) is own


@pytest.mark.parametrize("symptom", [*OTHER_WENT, IN_NCCL], ids=["closed", "reset", "nccl", "collective"])
def test_ranks_whose_process_died_are_named(symptom: Exception) -> None:
    found = cause(WorkerGroupError("", {0: symptom, 1: dead(), 2: symptom, 3: dead()}))
    assert str(found) == "the process or the node of rank 1, 3 died"


@pytest.mark.parametrize("own", [OUT_OF_MEMORY, OURS], ids=["memory", "ours"])
def test_an_exception_precedes_the_death_of_a_rank(own: Exception) -> None:
    assert cause(WorkerGroupError("", {0: dead(), 1: own})) is own


def test_our_own_errors_come_first_by_lowest_rank() -> None:
    found = cause(WorkerGroupError("", {3: StoreUnavailable("down"), 2: OURS, 0: OUT_OF_MEMORY}))
    assert found is OURS
    assert any(note.startswith("on rank 2:") for note in found.__notes__)


def test_the_loss_of_a_peer_is_the_last_resort() -> None:
    assert cause(WorkerGroupError("", {1: OTHER_WENT[1], 0: OTHER_WENT[0]})) is OTHER_WENT[0]
