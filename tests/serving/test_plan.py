"""The plan of a step: budget, memory, order, fairness and progress, for random requests."""

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.serving.blocks import Block, Blocks
from bam_ray.serving.plan import (
    PlanState,
    PromptChunk,
    RunningRequest,
    ServedTokens,
    StepPlan,
    WaitingRequest,
    plan_step,
)

ROWS, BUDGET, LONGEST, MEMORY = 6, 10, 40, 160


@dataclass
class Request:
    """A request of the simulated engine."""

    id: int
    tenant: str
    prompt: int
    completion: int  # tokens that it generates; the request reserves as many
    copies: int = 1
    blocks: list[Block] = field(default_factory=list)

    @property
    def reserved(self) -> int:
        """The number of tokens that the request reserves."""
        return self.prompt + self.completion


class Simulation:
    """An engine that computes nothing: it counts the tokens of the plans that it gets."""

    def __init__(self) -> None:
        self.memory = Blocks(MEMORY, LONGEST, unit=5)
        self.served = ServedTokens()
        self.waiting: dict[int, Request] = {}
        self.left: dict[int, int] = {}  # tokens of the prompt, of running requests
        self.running: dict[int, Request] = {}
        self.generated: dict[int, int] = {}
        self.started: list[Request] = []
        self.received: dict[str, int] = {}

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting[request.id] = request
        self.served.arrive(request.tenant)

    def end(self, id_: int) -> None:
        """End a request that waits or runs."""
        request = self.waiting.pop(id_, None) or self.running.pop(id_)
        for block in request.blocks:
            self.memory.release(block)
        self.served.leave(request.tenant)

    @property
    def state(self) -> PlanState:
        """The state from which the next step is planned."""
        return PlanState(
            [WaitingRequest(r.id, r.tenant, r.prompt, r.reserved, r.copies) for r in self.waiting.values()],
            [RunningRequest(r.id, self.left[r.id], r.copies) for r in self.running.values()],
            ROWS - sum(request.copies for request in self.running.values()),
            self.memory.counts,
            self.served.tokens,
        )

    def step(self) -> StepPlan:
        """Plan and run one step."""
        plan = plan_step(self.state, BUDGET)
        for id_ in plan.start:
            request = self.running[id_] = self.waiting.pop(id_)
            request.blocks = [self.memory.take(request.reserved) for _ in range(request.copies)]
            self.left[id_], self.generated[id_] = request.prompt, 0
            self.served.add(request.tenant, request.prompt)
            self.count(request, request.prompt)
            self.started.append(request)
        for chunk in plan.chunks:
            self.left[chunk.id] -= chunk.tokens
            assert self.left[chunk.id] >= 0
            if not self.left[chunk.id]:
                self.generate(chunk.id)
        for id_ in plan.decode:
            self.generate(id_)
        return plan

    def generate(self, id_: int) -> None:
        """Generate one token in each row of a request."""
        request = self.running[id_]
        self.generated[id_] += 1
        self.served.add(request.tenant, request.copies)
        self.count(request, request.copies)
        if self.generated[id_] == request.completion:
            self.end(id_)

    def count(self, request: Request, tokens: int) -> None:
        """Count tokens that a tenant receives."""
        self.received[request.tenant] = self.received.get(request.tenant, 0) + tokens


@st.composite
def requests(draw: st.DrawFn, tenants: str = "abc") -> list[Request]:
    """Return up to 12 requests that fit the memory."""
    count = draw(st.integers(1, 12))
    made = []
    for id_ in range(count):
        prompt = draw(st.integers(1, LONGEST - 1))
        completion = draw(st.integers(1, LONGEST - prompt))
        made.append(Request(id_, draw(st.sampled_from(tenants)), prompt, completion, draw(st.integers(1, 3))))
    return made


@given(requests(), st.data())
def test_plans_keep_all_rules(arrivals: list[Request], data: Any) -> None:
    """Requests arrive and are cancelled at any step. Every step keeps to its limits, and all end."""
    simulation, arriving, gone = Simulation(), list(arrivals), set()
    total = sum(request.prompt + request.completion for request in arrivals)
    for _ in range(total + len(arrivals)):
        if arriving and (data.draw(st.booleans()) or not (simulation.waiting or simulation.running)):
            simulation.add(arriving.pop(0))
        present = [*simulation.waiting, *simulation.running]
        if present and data.draw(st.integers(0, 9)) == 0:
            gone.add(id_ := data.draw(st.sampled_from(present)))
            simulation.end(id_)
        before = simulation.state
        plan = simulation.step()
        check(before, plan)
        if not (arriving or simulation.waiting or simulation.running):
            break
    assert not arriving and not simulation.waiting and not simulation.running  # no starvation
    assert simulation.memory.used == 0
    assert simulation.memory.counts == Blocks(MEMORY, LONGEST, unit=5).counts
    for tenant in "abc":
        order = [request.id for request in simulation.started if request.tenant == tenant]
        assert order == sorted(order)  # FIFO
        assert {request.id for request in arrivals if request.tenant == tenant} <= {*order} | gone


def check(state: PlanState, plan: StepPlan) -> None:
    """Check one plan: the budget, and that nothing rests that could be computed."""
    rows = {request.id: request.rows for request in state.running}
    decoding = [request.id for request in state.running if not request.left]
    assert list(plan.decode) == decoding  # a stream is never held back
    tokens = sum(rows[id_] for id_ in decoding) + sum(chunk.tokens for chunk in plan.chunks)
    assert tokens <= BUDGET
    left = {request.id: request.left for request in state.running if request.left}
    left |= {request.id: request.prompt for request in state.waiting if request.id in plan.start}
    if sum(left.values()) > sum(chunk.tokens for chunk in plan.chunks):
        assert tokens == BUDGET
    if state.waiting and not state.running:
        assert plan.start


def test_a_long_prompt_is_divided_beside_streams() -> None:
    running = [RunningRequest(0, 0), RunningRequest(1, 0, rows=2), RunningRequest(2, 25), RunningRequest(3, 4)]
    state = PlanState([], running, 0, Blocks(MEMORY, LONGEST, 5).counts)
    assert plan_step(state, 10) == StepPlan((), (0, 1), (PromptChunk(2, 7),))
    assert plan_step(state, 30) == StepPlan((), (0, 1), (PromptChunk(2, 25), PromptChunk(3, 2)))


def test_a_request_without_memory_is_not_overtaken() -> None:
    memory = Blocks(2 * LONGEST, LONGEST, 5)
    memory.take(LONGEST)
    waiting = [WaitingRequest(0, "", 10, 40, copies=2), WaitingRequest(1, "", 1, 2)]
    assert plan_step(PlanState(waiting, [], 6, memory.counts), 10) == StepPlan()
    assert plan_step(PlanState(waiting[1:], [], 6, memory.counts), 10).start == (1,)


@pytest.mark.parametrize("sizes", [(1, 1), (30, 2), (2, 30)])
def test_two_tenants_receive_alike(sizes: tuple[int, int]) -> None:
    """A tenant that sends ten times as many requests, or longer ones, receives at most twice as much."""
    simulation, rng = Simulation(), random.Random(0)
    for number in range(2000):
        tenant = "b" if number % 11 == 0 else "a"
        size = sizes[tenant == "b"]
        simulation.add(Request(number, tenant, rng.randint(1, size), rng.randint(1, 9)))
    while {request.tenant for request in simulation.waiting.values()} == {"a", "b"}:
        simulation.step()
    assert 0.5 < simulation.received["a"] / simulation.received["b"] < 2


def test_a_tenant_gets_no_credit_for_idle_time() -> None:
    served = ServedTokens()
    served.arrive("a")
    served.add("a", 100)
    served.arrive("b")
    assert served.tokens == {"a": 100, "b": 100}
    served.leave("a")
    served.add("b", 50)
    served.arrive("a")
    assert served.tokens["a"] == 150
    served.leave("a")
    served.leave("b")
    assert not served.tokens


@given(st.lists(st.integers(1, 48), max_size=40), st.randoms(use_true_random=False), st.integers(1, 16))
def test_blocks_never_overlap_and_join_again(sizes: list[int], rng: random.Random, unit: int) -> None:
    memory = Blocks(100, 48, unit)
    whole = memory.counts
    taken: list[Block] = []
    for size in sizes:
        counts = memory.counts.without(size)
        if counts is None:
            memory.release(taken.pop(rng.randrange(len(taken))))
            continue
        taken.append(memory.take(size))
        assert memory.counts == counts
        assert size <= taken[-1].length < 4 * max(size, unit)
        ranges = sorted((block.start, block.start + block.length) for block in taken)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(ranges))
        assert ranges[-1][1] <= memory.size
        assert memory.used == sum(block.length for block in taken)
    for block in taken:
        memory.release(block)
    assert memory.counts == whole
