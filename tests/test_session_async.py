"""Sessions in event loops."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from session_cases import SECONDS, SHAPE, alone, exact, gated, maker

from ddpm_fast.sessions import SessionClosed

pytestmark = pytest.mark.usefixtures("one_thread")
MAKE = maker(exact, num_steps=4)


def run(main):
    return asyncio.run(asyncio.wait_for(main, SECONDS))


def expected(handle):
    return alone(MAKE, SHAPE, sample_id=handle.sample_id, num_steps=handle.num_steps)


async def is_right(handle):
    return torch.equal(await handle, expected(handle))


def test_awaited():
    async def main():
        async with MAKE().session(SHAPE, max_batch=3) as session:
            handle = session.submit(sample_id=2)
            assert await handle is await handle
            assert await is_right(handle)
            handles = [session.submit(sample_id=i, num_steps=1 + i % 3) for i in range(9)]
            found = await asyncio.gather(*handles)
            for handle, x in zip(handles, found, strict=True):
                assert torch.equal(x, expected(handle))
            handles = [session.submit(sample_id=i) for i in range(5)]
            for each in asyncio.as_completed(handles):
                assert (await each).shape == SHAPE
            assert [handle async for handle in session] == []
            later = [session.submit(sample_id=i) for i in range(5)]
        assert all(handle.done() for handle in later)
        return later

    for handle in run(main()):
        assert torch.equal(handle.result(), expected(handle))


def test_the_loop_goes_on_meanwhile():
    gate, session = gated(max_batch=1)

    async def main():
        async with session:
            handle = session.submit(sample_id=1)
            waiting = asyncio.create_task(is_right(handle))
            await asyncio.to_thread(gate.reached)
            assert not waiting.done()
            gate.open()
            assert await waiting
            last = session.submit(sample_id=2)
        assert last.done()  # the end of the block waited for it

    run(main())


def test_a_task_that_is_cancelled_cancels_its_sample():
    gate, session = gated(max_batch=1)

    async def main():
        async with session:
            first, second, third = (session.submit(sample_id=i) for i in range(3))
            waiting = [asyncio.ensure_future(each) for each in (first, second)]
            await asyncio.to_thread(gate.reached)
            for task in waiting:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.sleep(0)  # the news takes a turn of the loop
            assert first.cancelled()
            assert second.cancelled()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(third, 0.01)
            await asyncio.sleep(0)
            assert third.cancelled()
            assert (session.running, session.waiting) == (0, 0)
            gate.open()
            assert await is_right(session.submit(sample_id=3))
            shielded = session.submit(sample_id=4)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(shielded)), 0)
            assert await is_right(shielded)

    run(main())


def test_a_sample_that_is_cancelled_cancels_those_who_await_it():
    gate, session = gated(max_batch=1)

    async def main():
        async with session:
            handle = session.submit()
            waiting = asyncio.ensure_future(handle)
            await asyncio.to_thread(gate.reached)
            assert handle.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(asyncio.CancelledError):
                await handle
            gate.open()

    run(main())


def test_failures():
    gate, session = gated(max_batch=2)
    gate.model = lambda x, t: None
    gate.open()

    async def main():
        async with session:
            handles = [session.submit(sample_id=i) for i in range(3)]
            with pytest.raises(TypeError, match="NoneType"):
                await handles[1]
            found = await asyncio.gather(*handles, return_exceptions=True)
            assert [type(each) for each in found] == [TypeError] * 3

    run(main())


def test_iterated():
    async def main():
        async with MAKE().session(SHAPE, max_batch=3) as session:
            assert [handle async for handle in session] == []
            handles = [session.submit(sample_id=i, num_steps=1 + i % 4) for i in range(20)]
            handles[7].cancel()
            await handles[3]
            seen = []
            async for handle in session:
                assert handle.done()
                seen.append(handle.sample_id)
                if len(seen) == 5:
                    handles.append(session.submit(sample_id=20))
            assert sorted(seen) == sorted(set(range(21)) - {3, 7})

    run(main())


def test_iterated_by_many_plainly_and_not():
    async def collected(session):
        return [handle async for handle in session]

    async def main():
        async with MAKE().session(SHAPE, max_batch=3) as session:
            handles = [session.submit(sample_id=i, num_steps=1 + i % 4) for i in range(80)]
            parts = await asyncio.gather(
                collected(session),
                asyncio.to_thread(list, session),
                collected(session),
                asyncio.to_thread(list, session),
            )
        found = [handle for part in parts for handle in part]
        assert len(found) == len(handles)
        assert set(found) == set(handles)

    run(main())


def test_iterators_that_are_cancelled_lose_nothing():
    chance = random.Random(0)

    async def collect(session, found):
        async for handle in session:
            found.append(handle)

    async def main():
        found = []
        async with MAKE().session(SHAPE, max_batch=3) as session:
            handles = [session.submit(sample_id=i, num_steps=1 + i % 4) for i in range(300)]
            while session.running or session.waiting:
                tasks = [asyncio.create_task(collect(session, found)) for _ in range(3)]
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(chance.choice([0, 1e-3]))
                for task in tasks[:2]:
                    task.cancel()
                await asyncio.wait(tasks[:2])
                tasks[2].cancel()
                await asyncio.wait(tasks)
            await collect(session, found)
        assert len(found) == len(handles)
        assert set(found) == set(handles)
        for handle in handles[::17]:
            assert torch.equal(handle.result(), expected(handle))

    run(main())


@pytest.mark.parametrize("error", [KeyError, asyncio.CancelledError])
def test_a_block_that_fails_gives_up(error):
    gate, session = gated(max_batch=1)
    handles = []

    async def main():
        async with session:
            handles.extend(session.submit(sample_id=i) for i in range(3))
            await asyncio.to_thread(gate.reached)
            handles[0].add_done_callback(lambda _: gate.open())
            raise error

    with pytest.raises(error):
        run(main())
    for handle in handles:
        assert isinstance(handle.exception(SECONDS), SessionClosed)


def test_cancelled_while_the_block_s_end_waits():
    gate, session = gated(max_batch=1)
    handles = []

    async def block():
        async with session:
            handles.extend(session.submit(sample_id=i) for i in range(3))

    async def main():
        task = asyncio.create_task(block())
        await asyncio.to_thread(gate.reached)
        await asyncio.sleep(0.01)
        assert not task.done()
        handles[0].add_done_callback(lambda _: gate.open())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    for handle in handles:
        assert isinstance(handle.exception(SECONDS), SessionClosed)


def test_two_event_loops():
    session = MAKE().session(SHAPE, max_batch=4)

    async def ask(who):
        handles = [session.submit(sample_id=100 * who + i, num_steps=1 + i % 5) for i in range(30)]
        for cancelled in handles[::7]:
            cancelled.cancel()
        kept = [handle for handle in handles if not handle.cancelled()]
        found = await asyncio.gather(*kept)
        for handle, x in zip(kept, found, strict=True):
            assert torch.equal(x, expected(handle))
        return len(kept)

    with session, ThreadPoolExecutor(2) as pool:
        assert min(pool.map(lambda who: run(ask(who)), range(2))) >= 25
        shared = session.submit(sample_id=5)
        both = [pool.submit(run, is_right(shared)) for _ in range(2)]
        assert [each.result(SECONDS) for each in both] == [True, True]


def test_a_loop_that_is_gone_harms_nobody():
    gate, session = gated(max_batch=1)

    async def main():
        handle = session.submit(sample_id=1)
        task = asyncio.ensure_future(handle)
        await asyncio.to_thread(gate.reached)
        session.submit(sample_id=2)
        return handle, task

    first, _ = run(main())  # asyncio.run cancels what is left in it
    gate.open()
    (second,) = session
    assert first.cancelled()
    assert torch.equal(second.result(SECONDS), expected(second))
    session.close()
