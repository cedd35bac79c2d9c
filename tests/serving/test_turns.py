"""The order in which the requests of tenants have their turns."""

import asyncio

import pytest

from bam_ray.errors import Overloaded
from bam_ray.serving.turns import Turns


async def queue(turns: Turns, tenants: str, order: list[str]) -> list[asyncio.Task[None]]:
    """Let one request of each tenant in `tenants` wait."""

    async def use(tenant: str) -> None:
        async with turns.turn(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(use(tenant)) for tenant in tenants]
    await asyncio.sleep(0)
    return tasks


def test_tenants_have_turns_in_rotation() -> None:
    async def main() -> list[str]:
        turns, order = Turns(16, "here"), list[str]()
        async with turns.turn("x"):
            tasks = await queue(turns, "aaaabcb", order)
        await asyncio.gather(*tasks)
        async with asyncio.timeout(1), turns.turn("x"):  # it is free again
            return order

    assert asyncio.run(main()) == list("abcabaa")


def test_no_tenant_fills_the_queue_alone() -> None:
    async def main() -> tuple[list[str], int]:
        turns, order = Turns(4, "here"), list[str]()
        async with turns.turn("x"):
            tasks = await queue(turns, "aaaab", order)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        return order, sum(isinstance(result, Overloaded) for result in results)

    assert asyncio.run(main()) == (["a", "b", "a"], 2)


def test_the_tenant_without_a_name_may_fill_it() -> None:
    async def main() -> list[bool]:
        turns = Turns(3, "here")
        async with turns.turn(""):
            tasks = [asyncio.create_task(turns.turn("").__aenter__()) for _ in range(4)]
            await asyncio.sleep(0)
            refused = [task.done() for task in tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return refused

    assert asyncio.run(main()) == [False, False, False, True]


@pytest.mark.parametrize("late", [True, False])
def test_a_request_that_leaves_blocks_nobody(late: bool) -> None:
    async def main() -> list[str]:
        turns, order = Turns(8, "here"), list[str]()
        async with turns.turn("x"):
            first, second = await queue(turns, "ab", order)
            if not late:
                first.cancel()
        if late:  # the turn has just been given to it
            first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        async with asyncio.timeout(1), turns.turn("x"):
            return order

    assert asyncio.run(main()) == ["b"]
