"""Cloud Storage when calls fail. `tests/test_blobs.py` tests what every adapter must do."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
import time
from collections.abc import Awaitable
from typing import Any

import pytest
from helpers.gcs import CREATE, DELETE, GET, LIST, POLICY, TRANSIENT_FAULTS, google_client, until
from standins.gcs import BUCKET, HANG, NO_FAULT, Fault, Gcs

from ccrun.backends.gcp.blobs import GcsBlobs, open_blobs
from ccrun.blobs import Blob
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, StorageError
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.log_writer import FlushPolicy, LogWriter

# --- successful calls ------------------------------------------------------------------------------------------------


async def test_each_operation_costs_one_call(gcs: Gcs, blobs: GcsBlobs) -> None:
    """Each operation costs one call, except that `delete` first gets the generation that it deletes."""
    generation = await blobs.create("name", b"")
    assert {CREATE: 1} == gcs.calls
    await blobs.replace("name", b"", generation=generation)
    assert {CREATE: 2} == gcs.calls
    await blobs.read("name")
    assert {CREATE: 2, GET: 1} == gcs.calls
    await blobs.entries("name", limit=1000)
    await blobs.check()
    assert {CREATE: 2, GET: 1, LIST: 2} == gcs.calls
    await blobs.delete("name")
    assert {CREATE: 2, GET: 2, LIST: 2, DELETE: 1} == gcs.calls


async def test_listing_gets_no_more_pages_than_needed(gcs: Gcs) -> None:
    """A listing over several pages is complete and sorted, and stops at the page with the last name that is needed."""
    names = [f"name-{number:02}" for number in range(11)]
    async with open_blobs(BUCKET, emulator=gcs.url, page_names=3) as blobs:
        for name in names:
            await blobs.create(name, b"")
        assert names == [entry.name for entry in await blobs.entries("", limit=1000)]
        assert 4 == gcs.calls.pop(LIST)
        assert names[1:6] == [entry.name for entry in await blobs.entries("", after="name-00", limit=5)]
        assert 2 == gcs.calls.pop(LIST)


async def test_listing_gets_no_more_data_than_needed(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A listing requests neither more names nor more metadata than it needs."""
    await blobs.entries("prefix", limit=3)
    assert gcs.latest is not None
    expected = {"prefix": "prefix", "maxResults": "4", "fields": "items(name,generation,updated,size),nextPageToken"}
    assert expected == dict(gcs.latest.query)


async def test_empty_page_is_not_the_last(gcs: Gcs, blobs: GcsBlobs, other_blobs: GcsBlobs) -> None:
    """Cloud Storage may return a page without names but with a token for the next one."""
    await other_blobs.create("name", b"")
    gcs.fail(LIST, Fault(status=200, body='{"nextPageToken": "name"}'))
    assert ["name"] == [entry.name for entry in await blobs.entries("", limit=10)]


async def test_emulator_gets_no_credentials(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an emulator, no credentials are looked up or sent."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")
    async with open_blobs(BUCKET, emulator=gcs.url) as blobs:
        await blobs.create("name", b"")
    assert gcs.latest is not None
    assert "Authorization" not in gcs.latest.headers


@pytest.mark.parametrize(
    "name",
    [
        "ünï/\U0001f600",
        "100%/%2F/%252e",
        "a+b c",
        "?query=1",
        "#fragment",
        "a&b=c;d",
        "'\"<>|*",
        "x" * 1024,
        "~",
        "a:b@c",
    ],
)
async def test_name_is_not_changed(blobs: GcsBlobs, name: str) -> None:
    """Special characters in a name do not change which object is written, read, listed and deleted."""
    generation = await blobs.create(name, b"content")
    assert Blob(b"content", generation) == await blobs.read(name)
    assert [name] == [entry.name for entry in await blobs.entries("", limit=10)]
    await blobs.delete(name)
    assert [] == await blobs.entries("", limit=10)


async def test_large_content_is_complete() -> None:
    """64 MiB are written and read with the default timeouts."""
    content = bytes(range(256)) * (64 * 1024 * 4)
    async with Gcs() as gcs, open_blobs(BUCKET, emulator=gcs.url) as blobs:
        generation = await blobs.create("large", content)
        read = await blobs.read("large")
    assert generation == read.generation
    assert content == read.content


# --- failing calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", TRANSIENT_FAULTS.values(), ids=TRANSIENT_FAULTS)
async def test_transient_fault_is_retried(gcs: Gcs, blobs: GcsBlobs, fault: Fault) -> None:
    """A transient fault, before or after the call took effect, does not change the result of any operation."""
    for method in (CREATE, GET, LIST, DELETE):
        gcs.fail(method, fault)
    first = await blobs.create("name", b"first")
    assert Blob(b"first", first) == await blobs.read("name")
    assert [("name", first)] == [(entry.name, entry.generation) for entry in await blobs.entries("", limit=10)]
    gcs.fail(CREATE, fault)
    second = await blobs.replace("name", b"second", generation=first)
    assert Blob(b"second", second) == await blobs.read("name")
    gcs.fail(GET, fault)
    await blobs.delete("name")
    with pytest.raises(BlobNotFound):
        await blobs.read("name")


async def test_three_faults_in_a_row_are_retried(gcs: Gcs, blobs: GcsBlobs) -> None:
    """An operation succeeds if one of its four attempts does."""
    gcs.fail(CREATE, Fault(status=503), times=3)
    generation = await blobs.create("name", b"content")
    assert Blob(b"content", generation) == await blobs.read("name")
    assert 4 == gcs.calls[CREATE]


async def test_slow_call_is_not_retried(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A call that takes long, but less than its timeout, is not retried."""
    gcs.fail(CREATE, Fault(response_delay_seconds=0.1))
    await blobs.create("name", b"")
    assert {CREATE: 1} == gcs.calls


async def test_slow_download_is_completed(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A response whose body arrives slowly but steadily is read to its end, even if that takes longer than `attempt_seconds`."""
    await blobs.create("name", b"0123456789")
    gcs.fail(GET, Fault(part_delay_seconds=POLICY.attempt_seconds / 5))
    assert b"0123456789" == (await blobs.read("name")).content
    assert 1 == gcs.calls[GET]


def every_operation(blobs: GcsBlobs) -> list[Awaitable[object]]:
    """Return a coroutine for each operation."""
    return [
        blobs.create("new", b""),
        blobs.replace("name", b"", generation=1),
        blobs.read("name"),
        blobs.delete("name"),
        blobs.entries("", limit=1),
        blobs.check(),
    ]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=503), "Cloud Storage is temporarily unavailable (503): try again later."),
        (Fault(status=429), "Cloud Storage limits the rate of calls: check the quotas of the project."),
        (HANG, "Cloud Storage did not respond in time: check the network."),
        (Fault(reset="before"), "Cloud Storage cannot be reached: check the network."),
    ],
    ids=["503", "429", "hang", "reset"],
)
async def test_permanent_fault_is_an_error_in_bounded_time(
    gcs: Gcs, blobs: GcsBlobs, fault: Fault, message: str
) -> None:
    """A fault that persists makes each operation raise a `StorageError` within the total timeout."""
    for method in (CREATE, GET, LIST, DELETE):
        gcs.fail_always(method, fault)
    started = time.monotonic()
    outcomes = await asyncio.gather(*every_operation(blobs), return_exceptions=True)
    assert [StorageError] * 6 == [type(outcome) for outcome in outcomes]
    assert {message} == {str(outcome) for outcome in outcomes}
    assert POLICY.total_seconds + POLICY.attempt_seconds + 30.0 > time.monotonic() - started


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, f"Cloud Storage rejected the call (400): check the bucket {BUCKET}."),
        (401, "Cloud Storage rejected the credentials: check the service account."),
        (403, f"Cloud Storage denied access: check that the service account has PERMISSION on the bucket {BUCKET}."),
    ],
)
async def test_rejected_call_is_not_retried(gcs: Gcs, blobs: GcsBlobs, status: int, message: str) -> None:
    """A call that was rejected is not retried, and the error says what to check."""
    for method in (CREATE, GET, LIST, DELETE):
        gcs.fail_always(method, Fault(status=status))
    permissions = [CREATE, f"{CREATE} and {DELETE}", GET, GET, LIST, LIST]
    outcomes = await asyncio.gather(*every_operation(blobs), return_exceptions=True)
    assert [StorageError] * 6 == [type(outcome) for outcome in outcomes]
    assert [message.replace("PERMISSION", permission) for permission in permissions] == list(map(str, outcomes))
    assert 6 == gcs.calls.total()


async def test_denied_deletion_names_the_permission(gcs: Gcs, blobs: GcsBlobs) -> None:
    """The error of a denied deletion names the permission to delete, not the one to read."""
    await blobs.create("name", b"")
    gcs.fail_always(DELETE, Fault(status=403))
    with pytest.raises(StorageError, match=re.escape(f"has {DELETE} on the bucket {BUCKET}")):
        await blobs.delete("name")


async def test_missing_bucket_names_the_setting(gcs: Gcs) -> None:
    """If the bucket does not exist, the error names the setting to check."""
    async with open_blobs("no-such-bucket", emulator=gcs.url) as blobs:
        for run in (blobs.create("name", b""), blobs.entries("", limit=1), blobs.check()):
            with pytest.raises(StorageError) as caught:
                await run
            assert "Cloud Storage cannot find the bucket no-such-bucket: check GCS_LOGS_BUCKET." == str(caught.value)


@pytest.mark.parametrize("body", ["<html>Log in first</html>", '{"items": [{}]}'])
async def test_response_of_another_server_is_an_error(gcs: Gcs, blobs: GcsBlobs, body: str) -> None:
    """A response that is not from Cloud Storage, such as one of a captive portal, is not a success."""
    for method in (CREATE, GET, LIST):
        gcs.fail_always(method, Fault(status=200, body=body))
    for run in every_operation(blobs):
        with pytest.raises(StorageError, match=r"The response is not from Cloud Storage: check the network\."):
            await run


async def test_unreachable_storage_is_a_storage_error() -> None:
    """If nothing listens at the address, the operation raises a `StorageError`."""
    async with open_blobs(BUCKET, emulator="http://127.0.0.1:9", policy=POLICY) as blobs:
        with pytest.raises(StorageError, match="Cloud Storage cannot be reached"):
            await blobs.check()


async def test_call_can_be_cancelled(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A cancelled operation returns immediately, and its call is not retried."""
    gcs.fail_always(GET, HANG)
    reading = asyncio.create_task(blobs.read("name"))
    await until(lambda: gcs.active_calls == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reading, POLICY.attempt_seconds / 2)
    assert {GET: 1} == gcs.calls


# --- lost responses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [Fault(reset="after"), Fault(response_delay_seconds=3600.0)], ids=["reset", "silence"]
)
async def test_write_with_a_lost_response_takes_effect_once(
    gcs: Gcs, blobs: GcsBlobs, other_blobs: GcsBlobs, fault: Fault
) -> None:
    """Such a write returns the generation of its first attempt, and writes nothing a second time."""
    gcs.fail(CREATE, fault)
    generation = await blobs.create("name", b"one")
    assert (2, 1) == (gcs.calls[CREATE], gcs.calls[GET])
    assert Blob(b"one", generation) == await other_blobs.read("name")
    gcs.fail(CREATE, fault)
    generation = await blobs.replace("name", b"two", generation=generation)
    assert (4, 2) == (gcs.calls[CREATE], gcs.calls[GET])
    assert Blob(b"two", generation) == await other_blobs.read("name")


async def test_same_content_of_another_client_is_a_conflict(gcs: Gcs, blobs: GcsBlobs, other_blobs: GcsBlobs) -> None:
    """After a lost request, an object that another client wrote with the same content is not mistaken for this write."""
    gcs.fail(CREATE, Fault(delay_seconds=0.1, reset="before"))
    creating = asyncio.create_task(blobs.create("name", b"same"))
    await until(lambda: gcs.active_calls == 1)
    generation = await other_blobs.create("name", b"same")
    with pytest.raises(BlobExists):
        await creating
    gcs.fail(CREATE, Fault(delay_seconds=0.1, reset="before"))
    replacing = asyncio.create_task(blobs.replace("name", b"same again", generation=generation))
    await until(lambda: gcs.active_calls == 1)
    await other_blobs.replace("name", b"same again", generation=generation)
    with pytest.raises(BlobChanged):
        await replacing


async def test_one_of_many_creates_succeeds_despite_faults(gcs: Gcs, blobs: GcsBlobs) -> None:
    """Of twenty concurrent creates with the same content, exactly one succeeds, even if requests and responses are lost."""
    gcs.fail(CREATE, Fault(reset="after"), Fault(reset="before"), NO_FAULT, Fault(status=503), times=5)
    outcomes = await asyncio.gather(*(blobs.create("name", b"") for _ in range(20)), return_exceptions=True)
    winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert 19 == sum(isinstance(outcome, BlobExists) for outcome in outcomes)
    assert [(await blobs.read("name")).generation] == winners


async def test_write_that_was_replaced_is_a_conflict(gcs: Gcs, blobs: GcsBlobs, other_blobs: GcsBlobs) -> None:
    """A replacement whose response was lost, and that another client replaced meanwhile, raises `BlobChanged`."""
    first = await blobs.create("name", b"first")
    gcs.fail(CREATE, Fault(response_delay_seconds=0.1, reset="after"))
    replacing = asyncio.create_task(blobs.replace("name", b"second", generation=first))

    async def second() -> int:
        while (blob := await other_blobs.read("name")).generation == first:
            await asyncio.sleep(0.005)
        return blob.generation

    await other_blobs.replace("name", b"third", generation=await asyncio.wait_for(second(), 10))
    with pytest.raises(BlobChanged):
        await replacing


async def test_late_deletion_keeps_a_newer_object(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A deletion that takes effect after its timeout does not delete an object that was created since."""
    await blobs.create("name", b"old")
    gcs.fail(DELETE, Fault(delay_seconds=POLICY.attempt_seconds + 2.0))
    await blobs.delete("name")
    await blobs.create("name", b"new")
    assert 1 == gcs.active_calls
    await until(lambda: gcs.active_calls == 0)
    assert b"new" == (await blobs.read("name")).content


async def test_object_that_is_replaced_during_deletion_is_deleted(
    gcs: Gcs, blobs: GcsBlobs, other_blobs: GcsBlobs
) -> None:
    """A version that is written while `delete` is in progress is deleted too."""
    generation = await blobs.create("name", b"old")
    gcs.fail(DELETE, Fault(delay_seconds=0.1))
    deleting = asyncio.create_task(blobs.delete("name"))
    await until(lambda: gcs.calls[DELETE] == 1)
    await other_blobs.replace("name", b"new", generation=generation)
    await deleting
    assert 2 == gcs.calls[DELETE]
    with pytest.raises(BlobNotFound):
        await other_blobs.read("name")


# --- as other_blobs read it ------------------------------------------------------------------------------------------


async def test_google_client_reads_the_log(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A client that lists the log directory, sorts the names and reads each object as text gets all lines in order."""
    store, task_id = Store(blobs), TaskId("a-task")
    written = [{"number": number, "text": "schön \U0001f600\u2028"} for number in range(250)]
    async with LogWriter(store, task_id, FlushPolicy(flush_lines=100)) as log:
        for line in written:
            await log.write(json.dumps(line, ensure_ascii=False).encode())
    bucket_name, _, prefix = store.logs_path(task_id).removeprefix("gs://").partition("/")

    def fetch_logs() -> list[dict[str, Any]]:
        client = google_client(gcs)
        found = client.bucket(bucket_name).list_blobs(prefix=prefix)
        chunks = sorted((blob for blob in found if blob.name.endswith(".jsonl")), key=lambda blob: blob.name)
        logs = [json.loads(line) for blob in chunks for line in blob.download_as_text().strip().split("\n") if line]
        client.close()
        return logs

    assert (BUCKET, "sessions/a-task/") == (bucket_name, prefix)
    assert written == await asyncio.to_thread(fetch_logs)


async def test_entry_has_the_time_of_the_service(blobs: GcsBlobs) -> None:
    """The time of an entry is that of Cloud Storage, with its time zone."""
    await blobs.create("name", b"")
    (entry,) = await blobs.entries("", limit=1)
    assert abs(dt.datetime.now(dt.UTC) - entry.updated) < dt.timedelta(minutes=1)


@pytest.mark.parametrize("prefix", ["../", "name/../../", ".scratch/", "a//"])
async def test_listing_rejects_an_invalid_prefix(gcs: Gcs, blobs: GcsBlobs, prefix: str) -> None:
    """A prefix that is not valid in a name is rejected before any call."""
    with pytest.raises(ValueError, match="not an object name"):
        await blobs.entries(prefix, limit=10)
    assert {} == gcs.calls


async def test_empty_range_costs_no_call(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A listing whose range is empty returns nothing without a call."""
    await blobs.create("b", b"")
    assert [] == await blobs.entries("", after="c", before="a", limit=10)
    assert [] == await blobs.entries("", before="", limit=10)
    assert 0 == gcs.calls[LIST]


async def test_url_is_a_gs_url(blobs: GcsBlobs) -> None:
    """The URL of an object, or of a directory, has the form that Google's tools accept."""
    assert f"gs://{BUCKET}/sessions/a-task/" == blobs.url("sessions/a-task/")
