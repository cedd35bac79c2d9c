"""DiLoCo: two processes compute what a loop over two copies computes, and resume exactly."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import CheckpointError
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.training.engine import EngineSpec
from bam_ray.training.torch_engine import TorchEngine
from tests.support.distributed.diloco import OUTER, batch, diloco_engine, run_in_group, train_copies
from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.stage_run import make_artifacts, small_recipe
from tests.support.training_run import DENSE, SETTINGS

pytestmark = pytest.mark.slow
STEPS = 12  # all of them


def copy_of_the_model() -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(EngineSpec(AutoModelForCausalLM.from_config(DENSE), SETTINGS))


def reference() -> tuple[list[list[Tensor]], list[float]]:
    """Return the weights of two copies after each step, and the mean NLL, with torch's own Nesterov SGD."""
    copies = [copy_of_the_model() for _ in range(2)]
    shared = [torch.nn.Parameter(each.detach().clone()) for each in copies[0].parameters.values()]
    outer = torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)
    weights: list[list[Tensor]] = [[], []]
    losses = []
    for step in range(STEPS):
        nll = [copy.step(batch(step)[rank::2], 0.01).nll for rank, copy in enumerate(copies)]
        losses.append(sum(nll) / 2)
        if (step + 1) % 3 == 0:
            with torch.no_grad():
                for each, *now in zip(shared, *(copy.parameters.values() for copy in copies), strict=True):
                    each.grad = each.detach() - (now[0] + now[1]) / 2
                outer.step()
                for copy in copies:
                    for parameter, each in zip(copy.parameters.values(), shared, strict=True):
                        parameter.copy_(each)
        for rank, copy in enumerate(copies):
            weights[rank].append(torch.cat([each.detach().flatten() for each in copy.parameters.values()]))
    return weights, losses


def test_two_processes_compute_what_a_loop_computes(tmp_path: Path) -> None:
    wanted, wanted_losses = reference()
    results = run_on_ranks(2, train_copies, str(tmp_path), STEPS, None)
    for rank, (weights, losses) in enumerate(results):
        assert losses == pytest.approx(wanted_losses, rel=1e-4)
        for found, expected in zip(weights, wanted[rank], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    (first, _), (other, _) = results
    equal = [torch.equal(one, two) for one, two in zip(first, other, strict=True)]
    assert equal == [(step + 1) % OUTER.every == 0 for step in range(STEPS)]


@pytest.mark.parametrize("step", [0, 4, 6])
def test_processes_resume_exactly(tmp_path: Path, step: int) -> None:
    whole = run_on_ranks(2, train_copies, str(tmp_path), 8, None)
    resumed = run_on_ranks(2, train_copies, str(tmp_path), 8, step)
    for (weights, losses), (others, other_losses) in zip(whole, resumed, strict=True):
        assert losses == other_losses
        assert all(torch.equal(one, two) for one, two in zip(weights, others, strict=True))
    with pytest.raises(CheckpointError, match="of 2 processes, but there are 1: use as many processes"):
        diloco_engine().load(tmp_path)


def test_a_stopped_control_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    weights = []
    for number, stops in enumerate(([None], [7, None])):
        uri = {"uri": str(tmp_path / f"store-{number}")}
        run = small_recipe(tmp_path, store=uri, compare={"diloco": {"workers": 2, "every": 4}})
        store = open_store(run.store.uri)
        make_artifacts(run, store, ("corpora", "seeds"))
        task = find_task(task_graph(run), ArtifactKind.CONTROLS, "dense-diloco")
        tasks = [(ArtifactKind.CONTROLS, task.name, stop) for stop in stops]
        first, other = run_on_ranks(2, run_in_group, run, tasks, str(tmp_path / "of-ranks"))
        stopped = ["stopped at step 7 of 20: run the same command to resume"] * (len(stops) - 1)
        assert (first, other) == ([*stopped, task.id], [*stopped, "nothing"])
        manifest = Artifact(store, task.kind, task.id).manifest()
        assert manifest is not None and manifest.tokens == 2560
        assert manifest.facts["computed_on"][0]["processes"] == 2
        weights.append((Artifact(store, task.kind, task.id).fetch() / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
