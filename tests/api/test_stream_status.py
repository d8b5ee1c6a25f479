from __future__ import annotations

from helpers.api import Api
from helpers.service import Event, read_events


async def test_stream_of_a_pending_task_says_when_it_starts(api: Api) -> None:
    """It has an event for each place in the queue, and one when the task runs, before the first line."""
    task_id = await api.submit()
    api.jobs.positions[task_id] = 2
    async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
        events = read_events(response)
        assert "pending" == (await anext(events)).data["status"]
        assert status_event("pending", 2) == await anext(events)
        assert "caught_up" == (await anext(events)).name
        api.jobs.positions[task_id] = 1
        assert status_event("pending", 1) == await anext(events)
        await api.start(task_id)
        await api.add_chunk(task_id, 1, b'{"n":1}')
        assert status_event("running", None) == await anext(events)
        assert {"n": 1} == (await anext(events)).data


async def test_stream_of_a_running_task_has_no_status(api: Api) -> None:
    """The first event has it already."""
    task_id = await api.submit_finished()
    assert ["task", "caught_up", "done"] == [event.name for event in await api.events(f"/tasks/{task_id}/events")]


def status_event(status: str, position: int | None) -> Event:
    """Return the event at the start of a log."""
    return Event(name="status", data={"status": status, "queuePosition": position}, id="1:0")
