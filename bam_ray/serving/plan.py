"""The plan of a step: the requests that start, the rows that decode and the chunks of prompts that are computed.

`plan_step` is a pure function. It plans one step of the engine:

1. Requests that wait start if the memory of the keys and values of their whole text is free, prompt and completion
   together. A request that has started can therefore always finish.
2. Every request whose prompt is complete decodes one token. They count against the budget of the step.
3. The rest of the budget goes to chunks of prompts, in the order in which their requests started.

Requests of one tenant start in the order of arrival. Among tenants, the next request is that of the tenant that has
received the fewest tokens (`ServedTokens`). If its memory is not free, no other request starts before it, so a large
request waits only for those that have started.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bam_ray.serving.blocks import BlockCounts


class ServedTokens:
    """The number of tokens that each tenant has received: the virtual token counter (VTC, arXiv 2401.00588).

    A tenant that has had nothing to do gets no credit for that time: its counter begins at the lowest one of the
    tenants that have requests. Counters are forgotten when no tenant has any.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, float] = {}
        self._requests: dict[str, int] = {}

    def arrive(self, tenant: str) -> None:
        """Note that a request of a tenant begins to wait."""
        if tenant not in self._requests:
            lowest = min((self.tokens[each] for each in self._requests), default=0.0)
            self.tokens[tenant] = max(self.tokens.get(tenant, 0.0), lowest)
        self._requests[tenant] = self._requests.get(tenant, 0) + 1

    def add(self, tenant: str, tokens: int) -> None:
        """Count tokens of a request: those of its prompt when it starts, and each token that it generates."""
        self.tokens[tenant] += tokens

    def leave(self, tenant: str) -> None:
        """Note that a request of a tenant has ended or left."""
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            del self._requests[tenant]
        if not self._requests:
            self.tokens.clear()


@dataclass(frozen=True)
class WaitingRequest:
    """A request that has no memory yet.

    Attributes:
        id: A number that identifies it among all requests of a state.
        tenant: The client that it belongs to.
        prompt: The number of tokens of its prompt.
        reserved: The number of tokens of its prompt and its longest completion.
        copies: The number of completions, each of which takes a block and a row.
    """

    id: int
    tenant: str
    prompt: int
    reserved: int
    copies: int = 1


@dataclass(frozen=True)
class RunningRequest:
    """A request that has memory.

    Attributes:
        id: A number that identifies it among all requests of a state.
        left: The number of tokens of its prompt that are not computed yet.
        rows: The number of completions that are decoded once the prompt is complete.
    """

    id: int
    left: int
    rows: int = 1


@dataclass(frozen=True)
class PlanState:
    """All that a plan depends on."""

    waiting: Sequence[WaitingRequest]  # in the order of arrival
    running: Sequence[RunningRequest]  # in the order in which they started
    free_rows: int  # the number of rows that no running request holds
    memory: BlockCounts
    served: Mapping[str, float] = field(default_factory=dict)  # tokens that each tenant has received


@dataclass(frozen=True)
class PromptChunk:
    """The next `tokens` tokens of the prompt of a request."""

    id: int
    tokens: int


@dataclass(frozen=True)
class StepPlan:
    """The work of one step."""

    start: tuple[int, ...] = ()  # ids of requests that take their memory, in order
    decode: tuple[int, ...] = ()  # ids of requests of which each row generates one token
    chunks: tuple[PromptChunk, ...] = ()  # computed in this order


def plan_step(state: PlanState, budget: int) -> StepPlan:
    """Return the work of the next step.

    Args:
        state: The requests and the free memory.
        budget: The number of tokens that a step computes. Rows that decode are never held back, so a step has at least
            as many tokens as rows. Prompts receive at least one token of each step, so that they advance.
    """
    started = _start(state)
    decode = [request for request in state.running if not request.left]
    prompts = [(request.id, request.left) for request in state.running if request.left]
    prompts += [(request.id, request.prompt) for request in started]
    left = max(1, budget - sum(request.rows for request in decode))
    chunks = []
    for id_, tokens in prompts:
        if not left:
            break
        chunks.append(PromptChunk(id_, min(tokens, left)))
        left -= chunks[-1].tokens
    return StepPlan(tuple(request.id for request in started), tuple(request.id for request in decode), tuple(chunks))


def _start(state: PlanState) -> list[WaitingRequest]:
    """Return the waiting requests that start now, in order."""
    queues: dict[str, list[WaitingRequest]] = {}
    for request in state.waiting:
        queues.setdefault(request.tenant, []).append(request)
    for queue in queues.values():
        queue.reverse()  # the next one is the last
    served = {tenant: state.served.get(tenant, 0.0) for tenant in queues}
    started, rows, memory = [], state.free_rows, state.memory
    while queues:
        tenant = min(queues, key=lambda each: (served[each], queues[each][-1].id))
        request = queues[tenant][-1]
        left = memory.without(request.reserved, request.copies)
        if left is None or request.copies > rows:
            break
        started.append(queues[tenant].pop())
        rows, memory = rows - request.copies, left
        served[tenant] += request.prompt  # those that start together are counted like those that started before
        if not queues[tenant]:
            del queues[tenant]
    return started
