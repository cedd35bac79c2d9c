"""Committed artifacts that turn out to be damaged are made again, and attempts that hang are replaced."""

import pytest

from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.control.observations import Alive, Crashed, Done
from bam_ray.control.policies import HANG_TIMEOUT, START_TIMEOUT
from bam_ray.control.transitions import Launch
from bam_ray.errors import DigestMismatch, SettingsError
from bam_ray.pipeline.states import Committed, Failed, Node, Placing, Retrying, Running, Waiting
from bam_ray.pipeline.tasks import Progress
from tests.support.control.scripted_launcher import ControllerHarness, make_measurable_task, make_task

NODE = Node("1", "one")


def damaged(id: str) -> Crashed:
    """Return the status of an attempt that found the files of another task damaged."""
    return Crashed(str(DigestMismatch("a file is damaged", id)), NODE, damaged=id)


def test_the_producer_of_a_damaged_artifact_runs_again() -> None:
    harness = ControllerHarness(make_task("a"), make_task("b", "a"), committed=("a",))
    harness.step()
    transitions = harness.step(b=damaged("a"))
    assert [(each.task_id, each.state.label) for each in transitions] == [
        ("a", "waiting"),
        ("b", "retrying"),
        ("a", "placing"),
    ]
    assert transitions[0].reason.startswith("branches/b found its files damaged")
    launch = transitions[2].action
    assert isinstance(launch, Launch)
    assert launch.placed.suspect, "the attempt checks the files first, because the reader's node may be at fault"
    assert harness.controller.history("a").message == transitions[0].reason, "the status shows it"

    harness.now = 60.0
    harness.step(a=Alive(NODE, Progress(1, 10)))
    assert isinstance(harness.controller.states["b"], Retrying), "it waits for its parent"
    harness.finish("a")
    assert not harness.controller.history("a").suspect
    harness.step()
    assert isinstance(harness.controller.states["b"], Placing)
    assert harness.launcher.numbers["a"] == AttemptNumber(1, 1)


def test_a_reader_that_finds_damage_again_and_again_fails() -> None:
    harness = ControllerHarness(make_task("a"), make_task("b", "a", attempts=3), committed=("a",))
    harness.step()
    for _ in range(3):
        harness.step(b=damaged("a"))
        harness.step(a=Done(NODE, Progress(10, 10)))  # the files are intact
        harness.now += 100.0
        harness.step()
    assert isinstance(harness.controller.states["b"], Failed)
    assert isinstance(harness.controller.states["a"], Committed)


def test_a_reader_is_blocked_if_its_parent_cannot_be_made_again() -> None:
    harness = ControllerHarness(make_task("a"), make_task("b", "a"), committed=("a",))
    harness.step()
    harness.step(b=damaged("a"))
    harness.store.delete("branches/a/manifest.json")
    harness.step(a=Crashed(str(SettingsError("no")), NODE, final=True))
    assert harness.controller.outcome() == "failed"


def test_damage_of_an_unknown_artifact_is_an_ordinary_failure() -> None:
    harness = ControllerHarness(make_task("a"))
    harness.step()
    harness.step(a=damaged("evaluation-of-another-run"))
    assert isinstance(harness.controller.states["a"], Retrying)


def training_harness(first_step: int = 5) -> ControllerHarness:
    """Return a controller whose task trains a step per second."""
    harness = ControllerHarness(make_measurable_task("a", steps=1000))
    harness.step()
    for step in range(first_step, first_step + 10):
        harness.now += 1.0
        harness.step(a=Alive(NODE, Progress(step, 1000), signs=step))
    assert isinstance(harness.controller.states["a"], Running)
    return harness


def test_a_hung_attempt_is_replaced() -> None:
    harness = training_harness()
    harness.now += 2 * HANG_TIMEOUT
    harness.step()
    state = harness.controller.states["a"]
    assert isinstance(state, Running)
    assert harness.now - state.last_sign_at > harness.controller.silence_limit("a", state), "it is reported"
    harness.now += 2.0
    harness.step()
    retrying = harness.controller.states["a"]
    assert isinstance(retrying, Retrying)
    assert retrying.error == "no sign of progress for 30m 02s: the attempt was replaced"
    assert harness.controller.history("a").failures == 1
    assert "1" in harness.controller.history("a").avoid


def test_slow_steps_are_not_taken_for_a_hang() -> None:
    harness = ControllerHarness(make_measurable_task("a", steps=1000))
    harness.step()
    for step in range(1, 5):
        harness.now += 400.0
        harness.step(a=Alive(NODE, Progress(step, 1000), signs=step))
    harness.now += 19 * 400.0
    harness.step()
    assert isinstance(harness.controller.states["a"], Running)


@pytest.mark.parametrize("sign", ["a stage that reports", "a stage that asks whether to stop"])
def test_signs_of_life_are_enough(sign: str) -> None:
    harness = ControllerHarness(make_task("a"))  # it has no steps
    harness.step()
    for number in range(20):
        harness.now += START_TIMEOUT
        note = f"part {number}" if "reports" in sign else ""
        harness.step(a=Alive(NODE, Progress(0, 0, note=note), signs=0 if note else number))
        assert isinstance(harness.controller.states["a"], Running)


def test_a_start_may_take_an_hour() -> None:
    harness = ControllerHarness(make_measurable_task("a", steps=1000))
    harness.step()
    harness.step(a=Alive(NODE, None))
    harness.now += START_TIMEOUT
    harness.step()
    assert isinstance(harness.controller.states["a"], Running)
    harness.now += 1.1 * START_TIMEOUT
    harness.step()
    assert not isinstance(harness.controller.states["a"], Running | Waiting)
