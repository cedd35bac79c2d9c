"""The environment of workers with and without a GPU."""

import pytest

from bam_ray.on_ray.worker_env import device_environment

ALLOCATOR, LAUNCH_ORDER = "PYTORCH_CUDA_ALLOC_CONF", "NCCL_LAUNCH_ORDER_IMPLICIT"


@pytest.fixture(autouse=True)
def _no_settings_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ALLOCATOR, "PYTORCH_ALLOC_CONF", LAUNCH_ORDER):
        monkeypatch.delenv(name, raising=False)


def test_a_worker_without_a_gpu_sees_none() -> None:
    assert device_environment(0.0) == {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def test_a_gpu_worker_orders_the_kernels_of_communicators() -> None:
    assert device_environment(1.0) == {
        "DS_ACCELERATOR": "cuda",
        ALLOCATOR: "expandable_segments:True",
        LAUNCH_ORDER: "1",
    }


def test_settings_of_the_node_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_ORDER, "0")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    assert device_environment(0.5) == {"DS_ACCELERATOR": "cuda", LAUNCH_ORDER: "0"}
