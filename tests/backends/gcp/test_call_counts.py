"""How many calls of Google's services an operation makes. Each call costs money and time."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import Counter
from collections.abc import AsyncIterator

import attrs
import pytest
from helpers.cloud import Receiver
from helpers.recording import Call, RecordedService, RecordingProxy, recorded_service, recording_proxy
from helpers.service import WAIT_SECONDS
from standins.gcs import BUCKET, Gcs
from standins.kms import Kms

from ccrun.api.feed import Feed
from ccrun.api.poller import PollPolicy, TaskPoller
from ccrun.api.sse import Cursor
from ccrun.backends.gcp.blobs import open_blobs
from ccrun.lifecycle import finish, start
from ccrun.store import Store
from ccrun.task import Outcome, Reason, Status, TaskId, TaskRecord, TaskType
from ccrun.testing.model import Say, sequence

TASK = TaskId("t-1")
NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)
#: Only the test polls.
NEVER = PollPolicy(min_seconds=3600.0, max_seconds=3600.0)
LISTING = Counter({"objects.list": 1})


@attrs.frozen(kw_only=True)
class Bucket:
    """A task in a bucket."""

    #: For the worker. Its calls are not counted.
    store: Store
    #: For readers. Its calls are counted.
    read: Store
    door: RecordingProxy

    def take_calls(self) -> Counter[str]:
        """Return the numbers of calls since the last time, by method."""
        calls: Counter[str] = Counter()
        for call, count in self.door.calls.items():
            calls[call.method] += count
        self.door.calls.clear()
        return calls

    async def add_chunks(self, first: int, last: int) -> None:
        """Write chunks of the task."""
        for number in range(first, last + 1):
            await self.store.logs.add_chunk(TASK, number, [b"{}"], NOW)

    async def finish(self) -> None:
        """Write the final record of the task."""
        await self.store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))


@pytest.fixture
async def bucket() -> AsyncIterator[Bucket]:
    """Return a running task whose log has three chunks."""
    async with (
        Gcs() as gcs,
        Kms() as kms,
        recording_proxy(gcs, kms) as door,
        open_blobs(BUCKET, emulator=gcs.direct) as direct,
        open_blobs(BUCKET, emulator=door.environment["STORAGE_EMULATOR_HOST"]) as counted,
    ):
        bucket = Bucket(store=Store(direct), read=Store(counted), door=door)
        record = TaskRecord(
            task_id=TASK, type=TaskType.ASYNC, status=Status.PENDING, created_at=NOW, logs_path="gs://logs/"
        )
        await bucket.store.add(start(record, at=NOW))
        await bucket.add_chunks(1, 3)
        yield bucket


@pytest.fixture
async def tail(bucket: Bucket) -> AsyncIterator[TaskPoller]:
    """Return a tail that has polled once. Only later calls are counted."""
    tail = TaskPoller(bucket.read, TASK, NEVER, None, window_bytes=1024)
    await tail.ready()
    assert Counter({"objects.list": 1, "objects.get": 1}) == bucket.take_calls()
    yield tail
    await tail.close()


@pytest.fixture
async def recorded() -> AsyncIterator[RecordedService]:
    """Return a service whose model always replies `Done.`."""
    async with recorded_service(sequence(Say("Done."))) as recorded:
        yield recorded


async def test_submission_makes_four_writes_one_encryption_and_one_launch(recorded: RecordedService) -> None:
    """`/run-async` writes payload, record, index entry and active marker, wraps one key, and launches once."""
    await recorded.service.submit(taskId="t")
    assert {
        Call("cryptoKeys.encrypt", "payload-encryption"): 1,
        Call("objects.insert", "active/{taskId}"): 1,
        Call("objects.insert", "index/{time}-{taskId}"): 1,
        Call("objects.insert", "sessions/{taskId}/encrypted-payload.bin"): 1,
        Call("objects.insert", "sessions/{taskId}/metadata.json"): 1,
        Call("Jobs.RunJob", "claude-code-job"): 1,
    } == recorded.api.calls


async def test_calls_grow_linearly_with_submissions(recorded: RecordedService) -> None:
    """Ten concurrent submissions make ten times the calls of one."""
    recorded.deployment.cloud_run.launch_seconds = float("inf")
    await asyncio.gather(*(recorded.service.submit() for _ in range(10)))
    assert (40, 10, 10) == tuple(recorded.api.count(method) for method in ("objects.", "cryptoKeys.", "Jobs."))


async def test_payload_is_deleted_once(recorded: RecordedService, receiver: Receiver) -> None:
    """Only the worker that opens the payload deletes it, not the end of the task or the delivery of its callback."""
    await recorded.service.submit(taskId="t", callbackUrl=receiver.url)
    await recorded.service.until("t", lambda record: record.status.is_final and not record.owes_callback)
    payload = Call("objects.delete", "sessions/{taskId}/encrypted-payload.bin")
    assert (1, 0) == (recorded.worker.calls[payload], recorded.api.calls[payload])


async def test_poll_without_changes_is_one_call(bucket: Bucket, tail: TaskPoller) -> None:
    """A poll of a task that writes nothing makes one listing and no read."""
    for _ in range(5):
        assert not await tail.poll()
        assert LISTING == bucket.take_calls()


async def test_poll_with_new_chunks_reads_each_chunk_once(bucket: Bucket, tail: TaskPoller) -> None:
    """One listing shows all new chunks. Each is read once, for any number of readers."""
    await bucket.add_chunks(4, 8)
    assert await tail.poll()
    assert LISTING == bucket.take_calls()
    await asyncio.gather(*(tail.events(number) for number in range(4, 9) for _ in range(20)))
    assert Counter({"objects.get": 5}) == bucket.take_calls()


async def test_changed_record_is_read_once(bucket: Bucket, tail: TaskPoller) -> None:
    """A poll's listing shows that the record changed, so it is read. After the last change the log is listed again."""
    await bucket.store.update(TASK, lambda record: attrs.evolve(record, cancelled_at=NOW))
    assert await tail.poll()
    assert Counter({"objects.list": 1, "objects.get": 1}) == bucket.take_calls()
    await bucket.finish()
    assert await tail.poll()
    assert tail.is_finished
    assert Counter({"objects.list": 2, "objects.get": 1}) == bucket.take_calls()


async def test_concurrent_replays_cost_as_much_as_one(bucket: Bucket) -> None:
    """Concurrent readers of a finished task share one read of the record, one listing and one read of each chunk."""
    await bucket.finish()
    feed = Feed(bucket.read, NEVER)

    async def replay() -> None:
        async with feed.follow(TASK, after=Cursor()) as reader, asyncio.timeout(WAIT_SECONDS):
            async for _ in reader.items(idle_seconds=WAIT_SECONDS):
                pass

    await asyncio.gather(*(replay() for _ in range(20)))
    assert Counter({"objects.list": 1, "objects.get": 1 + 3}) == bucket.take_calls()


async def test_page_of_tasks_is_one_listing_and_one_read_per_task(bucket: Bucket) -> None:
    """`GET /tasks` makes calls for the tasks that it returns, not for all tasks that exist."""
    for number in range(30):
        task_id = TaskId(f"other-{number}")
        created_at = NOW - dt.timedelta(days=number)
        await bucket.store.add(
            TaskRecord(
                task_id=task_id,
                type=TaskType.SYNC,
                status=Status.PENDING,
                created_at=created_at,
                logs_path="gs://logs/",
            )
        )
    assert 10 == len((await bucket.read.page(limit=10)).tasks)
    assert Counter({"objects.list": 1, "objects.get": 10}) == bucket.take_calls()
