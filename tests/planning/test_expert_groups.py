"""The plan's warning about processes that share experts and are on different nodes."""

import pytest

from bam_ray.pipeline.graph import task_graph
from bam_ray.planning.cluster_file import NodeGroup
from bam_ray.planning.expert_groups import sent_bytes, straddling_warnings
from bam_ray.planning.model_size import ModelSize, seed_size
from bam_ray.settings import TrainingSettings
from tests.support.planning.night_recipe import recipe

OVERRIDES = (
    "upcycle.mixtures={bam: {method: bam}, soup: {method: soup}}",
    "mix.workers=8",
    "mix.expert_parallel=4",
    "mix.needs={gpus: 1, labels: {ray.io/accelerator-type: A100}}",
)
PAPER = ModelSize(1024, 2048, 6, 1024, 1024, 256_000, tied=True, vectors=2, experts=4, attention=4, keys=4, routers=2)
TRAINING = TrainingSettings(tokens=1 << 20, batch_tokens=1 << 15, peak_lr=1e-4)


def node(gpus: int, accelerator: str = "A100") -> NodeGroup:
    return NodeGroup(count=8, gpus=gpus, accelerator=accelerator, tflops=100)


def warnings(gpus: int, *overrides: str, accelerator: str = "A100") -> list[str]:
    settings = recipe(*OVERRIDES, *overrides)
    return straddling_warnings(task_graph(settings), settings, seed_size(settings), {"kind": node(gpus, accelerator)})


def test_the_bytes_are_those_of_the_hidden_states_that_travel() -> None:
    # The forward pass of a layer, two processes: 4096 tokens of d 1024 in bf16, to the experts of attention and back
    # (once each), and to those of the FFN and back (half of the tokens)
    layer = 4096 * 1024 * 2 * (2 + 1)
    assert sent_bytes(PAPER, TRAINING, 4096, 2, on_gpu=True) == 2 * 6 * layer
    assert sent_bytes(PAPER, TRAINING, 4096, 2, on_gpu=False) == 4 * 6 * layer
    recomputed = TRAINING.model_copy(update={"recompute": True})
    assert sent_bytes(PAPER, recomputed, 4096, 2, on_gpu=True) == 3 * 6 * layer


@pytest.mark.parametrize("gpus", [4, 8, 16])
def test_nodes_that_hold_whole_groups_are_not_warned_about(gpus: int) -> None:
    assert warnings(gpus) == []


def test_a_group_on_several_nodes_is_warned_about_with_its_traffic() -> None:
    (warning,) = warnings(5)  # and none about the soup, which has no experts
    assert warning == (
        "mixtures/bam: the 4 processes that share experts are on several nodes of kind, and each sends 2.01GB to the "
        "others in every step: let mix.needs select nodes that hold a multiple of 4 processes, or change "
        "mix.expert_parallel"
    )
    assert len(warnings(1)) == 1


def test_nodes_that_are_not_selected_and_whole_copies_are_not_warned_about() -> None:
    assert warnings(1, accelerator="L4") == []
    assert warnings(1, "mix.expert_parallel=1") == []
