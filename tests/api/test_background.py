from __future__ import annotations

import asyncio

import pytest

from ccrun.api.background import BackgroundTasks


async def test_work_is_completed_though_its_request_is_cancelled() -> None:
    """A client that disconnects does not stop it."""
    background, gate, done = BackgroundTasks(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.set()

    request = asyncio.create_task(background.finish(work()))
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    gate.set()
    async with asyncio.timeout(30):
        await done.wait()


async def test_result_and_error_reach_the_request() -> None:
    """The request gets what the work returns, or raises."""
    background = BackgroundTasks()
    assert 7 == await background.finish(asyncio.sleep(0, 7))

    async def fail() -> None:
        raise ValueError("made up")

    with pytest.raises(ValueError, match="made up"):
        await background.finish(fail())


async def test_close_cancels_what_still_runs() -> None:
    """It waits until the work has ended."""
    background, ended = BackgroundTasks(), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    background.spawn(work())
    await asyncio.sleep(0)
    await background.close()
    assert [True] == ended
