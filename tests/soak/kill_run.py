"""One run with kills: tasks are submitted and cancelled while the service and workers are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from typing import Any, Final

import attrs
from aiohttp import web
from aiohttp.test_utils import TestServer
from soak.agent import Plan
from soak.conftest import SoakOptions
from soak.deployments import SoakService
from soak.oracle import Evidence, faults, read_starts, stored_log

from ccrun.lifecycle import MAX_CALLBACK_LEASE
from ccrun.store import Store
from ccrun.task import CallbackState, TaskId, TaskRecord

#: Seconds for all tasks to become final and all callbacks to be delivered after the last kill. A worker that is killed during a
#: delivery delays the callback by the whole lease.
SETTLE_SECONDS: Final = MAX_CALLBACK_LEASE.total_seconds()
#: Seconds after that until nothing is left. A submission that was killed halfway is removed after 30.
CLEAN_SECONDS: Final = 60.0
#: Seconds between two looks at the store.
POLL_SECONDS: Final = 0.2
#: The share of tasks with an Idempotency-Key, which are submitted until the service accepts them.
KEYED_SHARE: Final = 0.8
CANCELLED_SHARE: Final = 0.25
#: The share of kills that are for workers; the others are for the service.
WORKER_SHARE: Final = 0.6
#: Seconds for which such a kill waits for a worker.
WORKER_SECONDS: Final = 5.0
#: Seconds after its acceptance in which a task is cancelled.
CANCEL_WITHIN_SECONDS: Final = 3.0


@attrs.define
class Receiver:
    """A receiver of callbacks, and the bodies that it got for each task."""

    url: str
    bodies: defaultdict[str, list[bytes]] = attrs.field(factory=lambda: defaultdict(list))


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Start a receiver."""
    receiver = Receiver("")

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        receiver.bodies[json.loads(body)["taskId"]].append(body)
        return web.Response()

    app = web.Application()
    app.router.add_post("/", receive)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/"))
        yield receiver


def random_plan(rng: random.Random, key: str, oracle: str) -> Plan:
    """Return what one agent does."""
    lines = rng.choice((1, 20, 200, 2_000, 20_000))
    batch = max(1, lines // rng.choice((1, 10, 50)))
    seconds = rng.choice((0.0, 0.5, 2.0, 5.0))
    return Plan(
        key=key,
        oracle=oracle,
        lines=lines,
        batch=batch,
        interval=seconds * batch / lines,
        # Now and then, lines that are longer than a pipe or a chunk.
        padding=rng.choice((70_000, 1_500_000)) if lines <= 20 and rng.random() < 0.3 else 40,
        ignores_sigterm=rng.random() < 0.2,
        fails=rng.random() < 0.1,
        background=rng.choice((0, 0, 1, 3)),
        detaches=rng.choice(("no", "session", "environment")),
        keeps_pipe=rng.random() < 0.3,
    )


@attrs.define
class KillRun:
    """The run and what it has seen."""

    service: SoakService
    receiver: Receiver
    options: SoakOptions
    rng: random.Random
    plans: dict[TaskId, Plan] = attrs.field(factory=dict)
    #: Tasks whose cancellation was accepted.
    cancelled: set[TaskId] = attrs.field(factory=set)
    #: Tasks whose worker got SIGKILL.
    killed: set[TaskId] = attrs.field(factory=set)
    first_final: dict[TaskId, TaskRecord] = attrs.field(factory=dict)
    kills: Counter[str] = attrs.field(factory=Counter)
    _gate: asyncio.Semaphore = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._gate = asyncio.Semaphore(self.service.platform.max_unfinished)

    @property
    def store(self) -> Store:
        """The store of the service."""
        return self.service.platform.store

    async def run(self) -> list[str]:
        """Submit, cancel and kill, wait until everything has settled, and return all faults."""
        watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._kill())
                for number in range(self.options.tasks):
                    # All choices are made here, so that they depend on the seed alone.
                    plan = random_plan(self.rng, str(number), str(self.service.directories.oracle))
                    cancel_after = self.rng.random() * CANCEL_WITHIN_SECONDS
                    group.create_task(
                        self._submit(
                            plan,
                            after=self.rng.random() * self.options.seconds,
                            key=f"soak-{number}" if self.rng.random() < KEYED_SHARE else None,
                            cancel_after=cancel_after if self.rng.random() < CANCELLED_SHARE else None,
                        )
                    )
            unsettled = await self._until_settled()
        finally:
            watching.cancel()
        return [*unsettled, *await self._faults(), *await self._until_clean()]

    async def _submit(self, plan: Plan, *, after: float, key: str | None, cancel_after: float | None) -> None:
        await asyncio.sleep(after)
        async with self._gate:
            task_id = await self.service.submit(key=key, prompt=json.dumps(plan), callbackUrl=self.receiver.url)
            if task_id is None:
                return
            self.plans[task_id] = plan
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                if await self.service.cancel(task_id):
                    self.cancelled.add(task_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_SECONDS):
                    while task_id not in self.first_final:
                        await asyncio.sleep(POLL_SECONDS)

    async def _kill(self) -> None:
        rng = random.Random(self.rng.random())
        loop = asyncio.get_running_loop()
        started = loop.time()
        for at in sorted(rng.random() * self.options.seconds for _ in range(self.options.kills)):
            await asyncio.sleep(max(0.0, started + at - loop.time()))
            number = rng.choice((signal.SIGKILL, signal.SIGTERM))
            if rng.random() < WORKER_SHARE and (workers := await self._until_workers()):
                # Several, as when memory is exhausted.
                for task_id in rng.sample(workers, rng.randint(1, len(workers))):
                    self.service.platform.kill_worker(task_id, number)
                    self.kills[f"worker {number.name}"] += 1
                    if number is signal.SIGKILL:
                        self.killed.add(task_id)
            else:
                await self.service.stop(number)
                self.kills[f"service {number.name}"] += 1
                await asyncio.sleep(rng.choice((0.0, 0.0, 1.0)))
                await self.service.start()

    async def _until_workers(self) -> list[TaskId]:
        """Wait for workers, which start slowly in the cloud; return none if there are none after `WORKER_SECONDS`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WORKER_SECONDS):
                while not (workers := self.service.platform.workers()):
                    await asyncio.sleep(POLL_SECONDS)
                return workers
        return []

    async def _watch(self) -> None:
        """Note the first final record of each task."""
        while True:
            for task_id in self.plans.keys() - self.first_final.keys():
                record = await self.store.record(task_id)
                if record.status.is_final:
                    self.first_final[task_id] = record
            await asyncio.sleep(POLL_SECONDS)

    async def _until_settled(self) -> list[str]:
        """Wait until all tasks are final and all callbacks delivered; return those that are not in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                while (await self._unsettled()) or self.plans.keys() - self.first_final.keys():
                    await asyncio.sleep(POLL_SECONDS)
        return [f"task {record.task_id} is {record.status}, {record.webhook}" for record in await self._unsettled()]

    async def _unsettled(self) -> list[TaskRecord]:
        return [
            record
            for record in await self.all_records()
            if not record.status.is_final
            or (record.webhook is not None and record.webhook.state is not CallbackState.DELIVERED)
        ]

    async def all_records(self) -> list[TaskRecord]:
        """Return all tasks of the store, also those whose submission was not answered."""
        records: list[TaskRecord] = []
        cursor: str | None = None
        while True:
            page = await self.store.page(limit=100, cursor=cursor)
            records += page.tasks
            cursor = page.next_cursor
            if cursor is None:
                return records

    async def _faults(self) -> list[str]:
        listed = Counter(record.task_id for record in await self.all_records())
        found = [f"task {task_id} is listed {listed[task_id]} times" for task_id in self.plans if listed[task_id] != 1]
        for task_id, plan in self.plans.items():
            record = await self.store.record(task_id)
            evidence = Evidence(
                plan=plan,
                starts=read_starts(self.service.directories.oracle, plan["key"]),
                record=record,
                first_final=self.first_final.get(task_id, record),
                log=await stored_log(self.store, task_id),
                callbacks=self.receiver.bodies[task_id],
                was_cancelled=task_id in self.cancelled,
                worker_was_killed=task_id in self.killed,
            )
            found += faults(evidence)
        return found

    async def _until_clean(self) -> list[str]:
        """Wait until nothing is left of the tasks; return what is left after that time."""
        task_ids = [record.task_id for record in await self.all_records()]
        leftovers = await self.service.leftovers(task_ids)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_SECONDS):
                while leftovers:
                    await asyncio.sleep(POLL_SECONDS)
                    leftovers = await self.service.leftovers(task_ids)
        return [f"left: {leftover}" for leftover in leftovers]

    async def figures(self) -> dict[str, Any]:
        """Return what has happened."""
        records = await self.all_records()
        return {
            "tasks": len(records),
            "accepted": len(self.plans),
            "cancelled": len(self.cancelled),
            "kills": dict(self.kills),
            "reasons": dict(Counter(str(record.reason) for record in records)),
            "callbacks": sum(len(bodies) for bodies in self.receiver.bodies.values()),
        }
