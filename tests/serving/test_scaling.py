"""The load of a replica, and the number of replicas for it."""

import asyncio
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve.config import AutoscalingContext

from bam_ray.on_ray.scaling import LOAD, replicas_for_load
from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler
from bam_ray.serving.engine import Generation, Output
from bam_ray.serving.plan import StepPlan
from bam_ray.settings import ReplicaRange, ServeSettings


def context(loads: list[float]) -> AutoscalingContext:
    """Return what Ray Serve passes to a policy, with three replicas wanted at present."""
    fields: dict[str, Any] = dict.fromkeys(
        ("deployment_id", "last_scale_up_time", "last_scale_down_time", "current_time", "config", "raw_metrics")
    )
    return AutoscalingContext(
        deployment_name="endpoint",
        app_name="bam",
        current_num_replicas=3,
        target_num_replicas=3,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={LOAD: dict(enumerate(loads))} if loads else {},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        **fields,
    )


@pytest.mark.parametrize(
    ("loads", "replicas"), [([], 3), ([0.0, 0.0, 0.0], 1), ([0.8, 0.8], 2), ([0.8, 0.9], 3), ([5.0, 0.0, 0.6], 7)]
)
def test_replicas_are_enough_for_the_load(loads: list[float], replicas: int) -> None:
    assert replicas_for_load(context(loads)) == (replicas, {})


def test_load_counts_slots_or_memory(engine: DecodeEngine) -> None:
    scheduler = Scheduler(engine)
    assert scheduler.load == 0.0
    assert engine.slots == 3
    assert engine.memory.size == 3 * 64

    async def load_of(requests: list[tuple[int, int, int]]) -> list[float]:
        """Return the load when all requests have arrived, and when all have ended."""
        streams = []
        for prompt, max_tokens, n in requests:
            params = SamplingParams(max_tokens=max_tokens, temperature=0, n=n, ignore_eos=True)
            streams.append(scheduler.generate([[5] * prompt], params))
        readers = [asyncio.create_task(anext(stream)) for stream in streams]
        await asyncio.sleep(0)  # all have joined the queue, and no step is computed yet
        arrived = scheduler.load
        await asyncio.gather(*readers)
        for stream in streams:
            async for _ in stream:
                pass
        return [arrived, scheduler.load]

    async def check() -> None:
        assert await load_of([(1, 2, 1)]) == [pytest.approx(1 / 3), 0.0]
        assert await load_of([(1, 2, 1)] * 7) == [pytest.approx(7 / 3), 0.0]
        assert await load_of([(1, 2, 2), (1, 2, 1)]) == [pytest.approx(3 / 3), 0.0]
        assert await load_of([(40, 60, 1)]) == [pytest.approx(64 / 192), 0.0]
        await scheduler.close()

    asyncio.run(check())


def test_a_long_request_counts_by_its_memory(models_by_family: Any, tokenizer: Any) -> None:
    scheduler = Scheduler(DecodeEngine(models_by_family["llama"], tokenizer, slots=8, max_length=64, kv_tokens=128))

    async def load() -> float:
        params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
        stream = scheduler.generate([[5] * 4], params)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        arrived = scheduler.load
        await reader
        await stream.aclose()
        await scheduler.close()
        return arrived

    assert asyncio.run(load()) == 64 / 128


def test_a_request_that_starts_counts_once(engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, loads, step = Scheduler(engine), list[float](), engine.step

    def observed(plan: StepPlan | None = None) -> list[tuple[Generation, Output]]:
        loads.append(scheduler.load)
        return step(plan)

    async def generate() -> None:
        params = SamplingParams(max_tokens=3, temperature=0, n=2, ignore_eos=True)
        async for _ in scheduler.generate([[5] * 4], params):
            pass
        await scheduler.close()

    monkeypatch.setattr(engine, "step", observed)
    asyncio.run(generate())
    assert loads[0] == pytest.approx(2 / 3), "the step that starts it"
    assert loads == [pytest.approx(2 / 3)] * len(loads)
    assert len(loads) >= 3


def test_a_range_of_replicas_is_checked() -> None:
    fixed = ServeSettings(replicas=3)
    assert (fixed.least_replicas, fixed.most_replicas) == (3, 3)
    scaled = ServeSettings.model_validate({"replicas": {"min": 2, "max": 4}})
    assert (scaled.least_replicas, scaled.most_replicas) == (2, 4)
    with pytest.raises(ValidationError, match="min is 3, which is more than max"):
        ReplicaRange(min=3, max=2)
