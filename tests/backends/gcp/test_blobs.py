"""Objects in a bucket, when calls go wrong. What every place for objects owes is in `test_blobs.py` above this folder."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import pytest
from google.cloud import storage  # type: ignore[attr-defined]
from standins.gcs import BUCKET, FINE, HANG, Fault, Gcs, Method

from ccrun.backends.gcp.blobs import GcsBlobs, open_blobs
from ccrun.backends.gcp.calls import CallPolicy
from ccrun.blobs import Blob
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, FileUnreadable, StorageError
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.log_writer import FlushPolicy, LogWriter

CREATE: Method = "storage.objects.create"
GET: Method = "storage.objects.get"
LIST: Method = "storage.objects.list"
#: A part of an upload, or the question how far one has come.
PART: Method = "part"
DELETE: Method = "storage.objects.delete"

#: Bytes of a part.
GRAIN = 256 * 1024
#: Three parts and a bit.
CONTENT = bytes(range(256)) * (3 * 1024) + b"and the end"

HASTY = CallPolicy(attempt_seconds=0.4, attempts=4, total_seconds=2.0, first_delay_seconds=0.001)
PASSING = {
    **{str(status): Fault(status=status) for status in (408, 429, 500, 502, 503, 504)},
    "reset before": Fault(reset="before"),
    "reset after": Fault(reset="after"),
    "reset in the middle": Fault(reset="middle"),
    "hang before": HANG,
    "hang after": Fault(silence_seconds=3600.0),
}


@pytest.fixture
async def gcs() -> AsyncIterator[Gcs]:
    """Return a Cloud Storage with one bucket, whose calls can be made to go wrong."""
    async with Gcs() as running:
        yield running


@pytest.fixture
async def blobs(gcs: Gcs) -> AsyncIterator[GcsBlobs]:
    """Return the bucket as ccrun sees it, with little patience."""
    async with open_blobs(BUCKET, emulator=gcs.url, policy=HASTY, part_bytes=GRAIN) as opened:
        yield opened


@pytest.fixture
async def others(gcs: Gcs) -> AsyncIterator[GcsBlobs]:
    """Return the bucket as somebody else sees it, for whom nothing goes wrong."""
    async with open_blobs(BUCKET, emulator=gcs.direct) as opened:
        yield opened


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


# --- what calls are made ---------------------------------------------------------------------------------------------


async def test_each_act_costs_one_call(gcs: Gcs, blobs: GcsBlobs) -> None:
    """All is done in one call, but a deletion: that looks first which generation it removes."""
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


async def test_listing_takes_no_more_pages_than_it_needs(gcs: Gcs) -> None:
    """A listing over several calls is complete and in order, and ends with the page that has the last wanted name."""
    names = [f"name-{number:02}" for number in range(11)]
    async with open_blobs(BUCKET, emulator=gcs.url, page_names=3) as blobs:
        for name in names:
            await blobs.create(name, b"")
        assert names == [entry.name for entry in await blobs.entries("", limit=1000)]
        assert 4 == gcs.calls.pop(LIST)
        assert names[1:6] == [entry.name for entry in await blobs.entries("", after="name-00", limit=5)]
        assert 2 == gcs.calls.pop(LIST)


async def test_listing_asks_for_no_more_than_it_needs(gcs: Gcs, blobs: GcsBlobs) -> None:
    """What is not wanted is not sent: neither further names nor what else Cloud Storage knows of an object."""
    await blobs.entries("prefix", limit=3)
    assert gcs.latest is not None
    wanted = {"prefix": "prefix", "maxResults": "4", "fields": "items(name,generation,updated),nextPageToken"}
    assert wanted == dict(gcs.latest.query)


async def test_empty_page_is_not_the_end(gcs: Gcs, blobs: GcsBlobs, others: GcsBlobs) -> None:
    """A page without names but with a token for the next one, which Cloud Storage may give, is passed over."""
    await others.create("name", b"")
    gcs.fail(LIST, Fault(status=200, body='{"nextPageToken": "name"}'))
    assert ["name"] == [entry.name for entry in await blobs.entries("", limit=10)]


async def test_emulator_gets_no_credentials(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an emulator nobody looks for credentials, and none are sent."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/there/is/no/such/file")
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
async def test_name_arrives_as_it_is(blobs: GcsBlobs, name: str) -> None:
    """Whatever characters a name has, the object of that very name is written, read, listed and deleted."""
    generation = await blobs.create(name, b"content")
    assert Blob(b"content", generation) == await blobs.read(name)
    assert [name] == [entry.name for entry in await blobs.entries("", limit=10)]
    await blobs.delete(name)
    assert [] == await blobs.entries("", limit=10)


async def test_large_content_is_whole() -> None:
    """64 MiB are written and read back in the usual patience."""
    content = bytes(range(256)) * (64 * 1024 * 4)
    async with Gcs() as gcs, open_blobs(BUCKET, emulator=gcs.url) as blobs:
        generation = await blobs.create("large", content)
        read = await blobs.read("large")
    assert generation == read.generation
    assert content == read.content


@pytest.mark.parametrize(
    ("name", "kind", "disposition"),
    [
        ("001-20250101-000000.jsonl", "application/x-ndjson", "inline"),
        ("metadata.json", "application/json", "inline"),
        ("video-1.webm", "video/webm", "inline"),
        ("screen.PNG", "image/png", "inline"),
        ("out.log", "text/plain", "inline"),
        ("notes.md", "text/markdown", "attachment"),
        ("report.html", "text/html", "attachment"),
        ("picture.svg", "image/svg+xml", "attachment"),
        ("feed.xml", "text/xml", "attachment"),
        ("page.xhtml", "application/xhtml+xml", "attachment"),
        ("archive.tar.gz", "application/octet-stream", "attachment"),
        ("page.html.gz", "application/octet-stream", "attachment"),
        ("encrypted-payload.bin", "application/octet-stream", "attachment"),
        ("none", "application/octet-stream", "attachment"),
    ],
)
@pytest.mark.parametrize("size", [1, 3 * GRAIN])
async def test_object_says_what_it_is(
    gcs: Gcs, blobs: GcsBlobs, name: str, kind: str, disposition: str, size: int
) -> None:
    """A browser, and Google's client, is told what an object is, and to run nothing of it: what could is downloaded."""
    await blobs.create_from(name, io.BytesIO(bytes(size)), size=size)

    def look() -> Any:
        client = _google_client(gcs)
        blob = client.bucket(BUCKET).get_blob(name)
        client.close()
        return blob.content_type, blob.content_disposition

    # RFC 7303 makes the two names of XML one.
    expected = (kind, disposition)
    assert expected == tuple(text.replace("application/xml", "text/xml") for text in await asyncio.to_thread(look))


# --- when calls go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
async def test_passing_fault_is_not_noticed(gcs: Gcs, blobs: GcsBlobs, fault: Fault) -> None:
    """What passes by itself, before or after the effect, changes no outcome of any call."""
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


async def test_three_faults_in_a_row_are_not_noticed(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A service that mends itself within the tries that a call has does not fail it."""
    gcs.fail(CREATE, Fault(status=503), times=3)
    generation = await blobs.create("name", b"content")
    assert Blob(b"content", generation) == await blobs.read("name")
    assert 4 == gcs.calls[CREATE]


async def test_slow_answer_is_an_answer(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A call that takes long, but not too long, is not made again."""
    gcs.fail(CREATE, Fault(silence_seconds=0.1))
    await blobs.create("name", b"")
    assert {CREATE: 1} == gcs.calls


async def test_steady_answer_may_take_long(gcs: Gcs, blobs: GcsBlobs) -> None:
    """Content that comes slowly but steadily is read to its end, however long a try usually is."""
    await blobs.create("name", b"0123456789")
    gcs.fail(GET, Fault(piece_seconds=HASTY.attempt_seconds / 5))
    assert b"0123456789" == (await blobs.read("name")).content
    assert 1 == gcs.calls[GET]


def every_act(blobs: GcsBlobs) -> list[Awaitable[object]]:
    """Return one of each act."""
    return [
        blobs.create("new", b""),
        blobs.replace("name", b"", generation=1),
        blobs.read("name"),
        blobs.delete("name"),
        blobs.entries("", limit=1),
        blobs.check(),
    ]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault(status=503), "Cloud Storage is temporarily unavailable (503): try again later."),
        (Fault(status=429), "Cloud Storage limits the rate of calls: check the quotas of the project."),
        (HANG, "Cloud Storage did not respond in time: check the network."),
        (Fault(reset="before"), "Cloud Storage cannot be reached: check the network."),
    ],
    ids=["503", "429", "hang", "reset"],
)
async def test_lasting_fault_is_told_in_bounded_time(gcs: Gcs, blobs: GcsBlobs, fault: Fault, sentence: str) -> None:
    """What does not pass ends each act with a `StorageError` when its patience is used up."""
    for method in (CREATE, GET, LIST, DELETE):
        gcs.fail_always(method, fault)
    began = time.monotonic()
    outcomes = await asyncio.gather(*every_act(blobs), return_exceptions=True)
    assert [StorageError] * 6 == [type(outcome) for outcome in outcomes]
    assert {sentence} == {str(outcome) for outcome in outcomes}
    assert HASTY.total_seconds + HASTY.attempt_seconds + 1.0 > time.monotonic() - began


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (400, f"Cloud Storage rejected the call (400): check the bucket {BUCKET}."),
        (401, "Cloud Storage rejected the credentials: check the service account."),
        (403, f"Cloud Storage denied access: check that the service account has PERMISSION on the bucket {BUCKET}."),
    ],
)
async def test_refusal_is_told_at_once(gcs: Gcs, blobs: GcsBlobs, status: int, sentence: str) -> None:
    """What does not pass by itself is not tried again; the sentence says what to check."""
    for method in (CREATE, GET, LIST, DELETE):
        gcs.fail_always(method, Fault(status=status))
    permissions = [CREATE, f"{CREATE} and {DELETE}", GET, GET, LIST, LIST]
    outcomes = await asyncio.gather(*every_act(blobs), return_exceptions=True)
    assert [StorageError] * 6 == [type(outcome) for outcome in outcomes]
    assert [sentence.replace("PERMISSION", permission) for permission in permissions] == list(map(str, outcomes))
    assert 6 == gcs.calls.total()


async def test_refused_deletion_names_its_permission(gcs: Gcs, blobs: GcsBlobs) -> None:
    """Who may read but not delete is told so."""
    await blobs.create("name", b"")
    gcs.fail_always(DELETE, Fault(status=403))
    with pytest.raises(StorageError, match=re.escape(f"has {DELETE} on the bucket {BUCKET}")):
        await blobs.delete("name")


async def test_missing_bucket_is_told(gcs: Gcs) -> None:
    """Where the bucket is not there, writes, listings and the check say which setting to look at."""
    async with open_blobs("no-such-bucket", emulator=gcs.url) as blobs:
        for run in (blobs.create("name", b""), blobs.entries("", limit=1), blobs.check()):
            with pytest.raises(StorageError) as caught:
                await run
            assert "Cloud Storage cannot find the bucket no-such-bucket: check GCS_LOGS_BUCKET." == str(caught.value)


@pytest.mark.parametrize("body", ["<html>Log in first</html>", '{"items": [{}]}'])
async def test_another_server_is_not_cloud_storage(gcs: Gcs, blobs: GcsBlobs, body: str) -> None:
    """An answer of something else, a captive portal say, is no success."""
    for method in (CREATE, GET, LIST):
        gcs.fail_always(method, Fault(status=200, body=body))
    for run in every_act(blobs):
        with pytest.raises(StorageError, match=r"The response is not from Cloud Storage: check the network\."):
            await run


async def test_nobody_there_is_a_storage_error() -> None:
    """Where nothing listens, the call fails with a sentence."""
    async with open_blobs(BUCKET, emulator="http://127.0.0.1:9", policy=HASTY) as blobs:
        with pytest.raises(StorageError, match="Cloud Storage cannot be reached"):
            await blobs.check()


async def test_call_can_be_cancelled(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A caller that goes away while a call hangs is not held up, and the call is not made again."""
    gcs.fail_always(GET, HANG)
    reading = asyncio.create_task(blobs.read("name"))
    await until(lambda: gcs.under_way == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reading, 0.1)
    assert {GET: 1} == gcs.calls


# --- when an answer is lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault(reset="after"), Fault(silence_seconds=3600.0)], ids=["reset", "silence"])
async def test_write_whose_answer_is_lost_is_made_once(
    gcs: Gcs, blobs: GcsBlobs, others: GcsBlobs, fault: Fault
) -> None:
    """Such a write succeeds with the generation that it made the first time: nothing is written twice."""
    gcs.fail(CREATE, fault)
    generation = await blobs.create("name", b"one")
    assert (2, 1) == (gcs.calls[CREATE], gcs.calls[GET])
    assert Blob(b"one", generation) == await others.read("name")
    gcs.fail(CREATE, fault)
    generation = await blobs.replace("name", b"two", generation=generation)
    assert (4, 2) == (gcs.calls[CREATE], gcs.calls[GET])
    assert Blob(b"two", generation) == await others.read("name")


async def test_the_same_words_of_somebody_else_are_not_ours(gcs: Gcs, blobs: GcsBlobs, others: GcsBlobs) -> None:
    """A creator whose first try was lost before its effect does not take another one's object of the same content for its own."""
    gcs.fail(CREATE, Fault(delay_seconds=0.1, reset="before"))
    creating = asyncio.create_task(blobs.create("name", b"same"))
    await until(lambda: gcs.under_way == 1)
    generation = await others.create("name", b"same")
    with pytest.raises(BlobExists):
        await creating
    gcs.fail(CREATE, Fault(delay_seconds=0.1, reset="before"))
    replacing = asyncio.create_task(blobs.replace("name", b"same again", generation=generation))
    await until(lambda: gcs.under_way == 1)
    await others.replace("name", b"same again", generation=generation)
    with pytest.raises(BlobChanged):
        await replacing


async def test_one_of_many_creators_wins_though_answers_are_lost(gcs: Gcs, blobs: GcsBlobs) -> None:
    """Of twenty who create one name with the same content over a bad network, exactly one succeeds."""
    gcs.fail(CREATE, Fault(reset="after"), Fault(reset="before"), FINE, Fault(status=503), times=5)
    outcomes = await asyncio.gather(*(blobs.create("name", b"") for _ in range(20)), return_exceptions=True)
    winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert 19 == sum(isinstance(outcome, BlobExists) for outcome in outcomes)
    assert [(await blobs.read("name")).generation] == winners


async def test_lost_write_that_was_overwritten_is_not_ours_any_more(
    gcs: Gcs, blobs: GcsBlobs, others: GcsBlobs
) -> None:
    """Who replaced, lost the answer, and was then replaced by somebody else is told that the object was changed."""
    first = await blobs.create("name", b"first")
    gcs.fail(CREATE, Fault(silence_seconds=0.1, reset="after"))
    replacing = asyncio.create_task(blobs.replace("name", b"second", generation=first))

    async def second() -> int:
        while (blob := await others.read("name")).generation == first:
            await asyncio.sleep(0.005)
        return blob.generation

    await others.replace("name", b"third", generation=await asyncio.wait_for(second(), 10))
    with pytest.raises(BlobChanged):
        await replacing


async def test_late_deletion_leaves_what_is_new(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A deletion that was given up and comes through after all does not remove what was created since."""
    await blobs.create("name", b"old")
    gcs.fail(DELETE, Fault(delay_seconds=HASTY.attempt_seconds + 0.2))
    await blobs.delete("name")
    await blobs.create("name", b"new")
    assert 1 == gcs.under_way
    await until(lambda: gcs.under_way == 0)
    assert b"new" == (await blobs.read("name")).content


async def test_deletion_of_what_is_being_replaced_wins(gcs: Gcs, blobs: GcsBlobs, others: GcsBlobs) -> None:
    """What is written between the look of a deletion and the deletion itself is deleted too."""
    generation = await blobs.create("name", b"old")
    gcs.fail(DELETE, Fault(delay_seconds=0.1))
    deleting = asyncio.create_task(blobs.delete("name"))
    await until(lambda: gcs.calls[DELETE] == 1)
    await others.replace("name", b"new", generation=generation)
    await deleting
    assert 2 == gcs.calls[DELETE]
    with pytest.raises(BlobNotFound):
        await others.read("name")


# --- files in parts --------------------------------------------------------------------------------------------------


async def create_content(blobs: GcsBlobs, name: str = "name") -> int:
    """Make an object of a file of several parts."""
    return await blobs.create_from(name, io.BytesIO(CONTENT), size=len(CONTENT))


async def test_large_file_goes_part_by_part(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A file costs one call to begin and one a part; one that fits a part costs one call in all."""
    await create_content(blobs)
    assert {CREATE: 1, PART: 4} == gcs.calls
    gcs.calls.clear()
    await blobs.create_from("small", io.BytesIO(bytes(GRAIN)), size=GRAIN)
    assert {CREATE: 1} == gcs.calls


@pytest.mark.parametrize("number", [1, 3], ids=["second", "last"])
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
async def test_passing_fault_of_a_part_is_not_noticed(gcs: Gcs, blobs: GcsBlobs, fault: Fault, number: int) -> None:
    """Whatever goes wrong with a part, before or after it arrived, the upload goes on where the service says that it stands."""
    gcs.fail(PART, *[FINE] * number, fault)
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await blobs.read("name")
    # Begun once, and nothing sent twice: the service would have refused a part that it has.
    assert 1 == gcs.calls[CREATE]
    assert gcs.calls[PART] in (4, 5, 6)


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
async def test_passing_fault_of_the_beginning_is_not_noticed(gcs: Gcs, blobs: GcsBlobs, fault: Fault) -> None:
    """An upload that may or may not have begun is begun again."""
    gcs.fail(CREATE, fault)
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await blobs.read("name")


async def test_question_may_fail_too(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A part that is lost, and then the question for it, cost no more than another question."""
    gcs.fail(PART, FINE, Fault(status=503), Fault(reset="before"), Fault(status=500))
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await blobs.read("name")


@pytest.mark.parametrize("fault", [Fault(kept_bytes=GRAIN, reset="before"), Fault(kept_bytes=GRAIN, status=503)])
async def test_part_that_arrived_by_half_is_not_sent_again(gcs: Gcs, fault: Fault) -> None:
    """Only what the service does not hold yet is sent after a part broke off."""
    gcs.fail(PART, FINE, fault)
    async with open_blobs(BUCKET, emulator=gcs.url, policy=HASTY, part_bytes=2 * GRAIN) as blobs:
        content = bytes(range(256)) * (5 * 1024)
        generation = await blobs.create_from("name", io.BytesIO(content), size=len(content))
        assert Blob(content, generation) == await blobs.read("name")


async def test_service_may_take_less_than_it_got(gcs: Gcs) -> None:
    """An answer that the service holds only a part of a part is followed by the rest of it."""
    async with open_blobs(BUCKET, emulator=gcs.url, policy=HASTY, part_bytes=4 * GRAIN) as blobs:
        # It took a grain, and says so without any error.
        gcs.fail(PART, Fault(status=308, headers={"Range": f"bytes=0-{GRAIN - 1}"}, kept_bytes=GRAIN))
        content = bytes(range(256)) * (5 * 1024)
        generation = await blobs.create_from("name", io.BytesIO(content), size=len(content))
        assert Blob(content, generation) == await blobs.read("name")


@pytest.mark.parametrize("number", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("status", [404, 410])
async def test_upload_that_is_forgotten_begins_anew(gcs: Gcs, blobs: GcsBlobs, status: int, number: int) -> None:
    """When the service knows nothing of an upload any more, it is made from the file's beginning once more."""
    gcs.fail(PART, *[FINE] * number, Fault(status=status))
    file = io.BytesIO(b"before" + CONTENT)
    file.seek(len(b"before"))
    generation = await blobs.create_from("name", file, size=len(CONTENT))
    assert Blob(CONTENT, generation) == await blobs.read("name")
    assert 2 == gcs.calls[CREATE]


async def test_upload_that_is_forgotten_again_and_again_is_given_up(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A service that loses each upload is told as what it is."""
    gcs.fail_always(PART, Fault(status=410))
    with pytest.raises(StorageError, match=r"Cloud Storage lost the upload 3 times: try again later\."):
        await create_content(blobs)
    assert 3 == gcs.calls[CREATE]


async def test_service_that_holds_less_than_it_did_has_lost_the_upload(gcs: Gcs, blobs: GcsBlobs) -> None:
    """What is not in memory any more and not with the service either is read from the file again."""
    # Once could be a mistake; then it is asked.
    gcs.fail(PART, FINE, FINE, Fault(status=308), Fault(status=308))
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await blobs.read("name")
    assert 2 == gcs.calls[CREATE]


async def test_end_whose_answer_is_lost_is_made_once(gcs: Gcs, blobs: GcsBlobs, others: GcsBlobs) -> None:
    """When the last answer and then all knowledge of the upload are lost, the object is known by the write that made it."""
    gcs.fail(PART, FINE, FINE, FINE, Fault(reset="after"), Fault(status=410))
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await others.read("name")
    assert (2, 1) == (gcs.calls[CREATE], gcs.calls[GET])


async def test_object_that_comes_before_the_last_part_stays(gcs: Gcs, blobs: GcsBlobs, others: GcsBlobs) -> None:
    """Somebody else's object, made while the parts are under way, is neither written over nor taken for one's own."""
    gcs.fail(PART, FINE, FINE, FINE, Fault(delay_seconds=0.2))
    creating = asyncio.create_task(create_content(blobs))
    await until(lambda: gcs.calls[PART] == 4)
    generation = await others.create("name", CONTENT)
    with pytest.raises(BlobExists):
        await creating
    assert Blob(CONTENT, generation) == await others.read("name")


async def test_taken_name_costs_no_part(gcs: Gcs, blobs: GcsBlobs) -> None:
    """Where there is an object already, nothing is sent."""
    await blobs.create("name", b"")
    with pytest.raises(BlobExists):
        await create_content(blobs)
    assert 0 == gcs.calls[PART]


async def test_file_that_changes_makes_no_object_in_the_end(gcs: Gcs, blobs: GcsBlobs) -> None:
    """The last part, which would make the object, is not sent of a file that goes on behind it."""
    with pytest.raises(FileUnreadable):
        await blobs.create_from("name", io.BytesIO(CONTENT + b"!"), size=len(CONTENT))
    assert 3 == gcs.calls[PART]
    with pytest.raises(BlobNotFound):
        await blobs.read("name")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault(status=503), "Cloud Storage is temporarily unavailable (503): try again later."),
        (HANG, "Cloud Storage did not respond in time: check the network."),
        (Fault(reset="before"), "Cloud Storage cannot be reached: check the network."),
        (Fault(status=308), "Cloud Storage did not respond in time: check the network."),
        (Fault(status=308, headers={"Range": f"bytes=0-{GRAIN - 1}"}), "Cloud Storage did not respond in time: check"),
        (Fault(status=200, body="<html>"), "The response is not from Cloud Storage: check the network."),
        (Fault(status=302, headers={"Location": "/"}), "The response is not from Cloud Storage: check the network."),
        (Fault(status=400), f"Cloud Storage rejected the call (400): check the bucket {BUCKET}."),
        (
            Fault(status=403),
            f"Cloud Storage denied access: check that the service account has {CREATE} on the bucket {BUCKET}.",
        ),
    ],
    ids=["503", "hang", "reset", "308", "308 with a range", "200", "302", "400", "403"],
)
async def test_lasting_fault_of_parts_is_told_in_bounded_time(
    gcs: Gcs, blobs: GcsBlobs, fault: Fault, sentence: str
) -> None:
    """What does not pass ends an upload with a `StorageError` when the patience for one part is used up."""
    gcs.fail_always(PART, fault)
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        await create_content(blobs)
    assert caught.value.message.startswith(sentence)
    assert 5.0 > time.monotonic() - began


async def test_missing_bucket_is_told_for_a_large_file(gcs: Gcs) -> None:
    """An upload in parts to a bucket that is not there says which setting to look at."""
    gcs.fail_always(CREATE, Fault(status=404))
    async with open_blobs("no-such-bucket", emulator=gcs.url, part_bytes=GRAIN) as blobs:
        with pytest.raises(StorageError, match="Cloud Storage cannot find the bucket no-such-bucket: check GCS_LOGS"):
            await create_content(blobs)


async def test_upload_can_be_cancelled(gcs: Gcs, blobs: GcsBlobs) -> None:
    """Who goes away in the middle of an upload is not held up, and makes no object."""
    gcs.fail(PART, FINE, HANG)
    creating = asyncio.create_task(create_content(blobs))
    await until(lambda: gcs.calls[PART] == 2)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(creating, 0.2)
    with pytest.raises(BlobNotFound):
        await blobs.read("name")


MEASURE: Final = """
import asyncio, io, resource, sys
from ccrun.backends.gcp.blobs import open_blobs

class Zeros(io.BufferedIOBase):
    \"\"\"A file of zeros; it cannot be sparse on a disk that fills.\"\"\"
    def __init__(self, size):
        self.left = size
    def read(self, size=-1):
        size = min(size, self.left)
        self.left -= size
        return bytes(size)
    def tell(self):
        return 0
    def seek(self, offset, whence=0):
        return 0

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

async def main():
    size = int(sys.argv[3])
    async with open_blobs(sys.argv[2], emulator=sys.argv[1]) as blobs:
        await blobs.create("warm", b"")
        before = peak()
        await blobs.create_from("large", Zeros(size), size=size)
        print(peak() - before)

asyncio.run(main())
"""


async def test_large_file_takes_little_memory(gcs: Gcs) -> None:
    """A quarter of a gigabyte is uploaded in the memory of a few parts."""
    gcs.discards = True
    size = 256 * 1024 * 1024
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", MEASURE, gcs.url, BUCKET, str(size)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert 64 > int(output)
    assert 32 == gcs.calls[PART]


# --- as others read it -----------------------------------------------------------------------------------------------


def _google_client(gcs: Gcs) -> Any:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", gcs.url)
        return storage.Client()


async def test_googles_own_client_reads_the_log(gcs: Gcs, blobs: GcsBlobs) -> None:
    """Who lists the log's folder, sorts the names and reads each as text gets all lines in their order."""
    store, task_id = Store(blobs), TaskId("a-task")
    written = [{"number": number, "text": "schön \U0001f600\u2028"} for number in range(250)]
    async with LogWriter(store, task_id, FlushPolicy(flush_lines=100)) as log:
        for line in written:
            await log.write(json.dumps(line, ensure_ascii=False).encode())
    bucket_name, _, prefix = store.logs_path(task_id).removeprefix("gs://").partition("/")

    def fetch_logs() -> list[dict[str, Any]]:
        client = _google_client(gcs)
        found = client.bucket(bucket_name).list_blobs(prefix=prefix)
        chunks = sorted((blob for blob in found if blob.name.endswith(".jsonl")), key=lambda blob: blob.name)
        logs = [json.loads(line) for blob in chunks for line in blob.download_as_text().strip().split("\n") if line]
        client.close()
        return logs

    assert (BUCKET, "sessions/a-task/") == (bucket_name, prefix)
    assert written == await asyncio.to_thread(fetch_logs)


async def test_entry_has_the_time_of_the_service(blobs: GcsBlobs) -> None:
    """The time of an entry is that of Cloud Storage, with its zone."""
    await blobs.create("name", b"")
    (entry,) = await blobs.entries("", limit=1)
    assert abs(dt.datetime.now(dt.UTC) - entry.updated) < dt.timedelta(minutes=1)


@pytest.mark.parametrize("prefix", ["../", "name/../../", ".scratch/", "a//"])
async def test_listing_takes_no_prefix_that_no_name_has(gcs: Gcs, blobs: GcsBlobs, prefix: str) -> None:
    """A prefix that leads elsewhere is refused, as it is in a folder, before any call."""
    with pytest.raises(ValueError, match="not an object name"):
        await blobs.entries(prefix, limit=10)
    assert {} == gcs.calls


async def test_empty_range_is_empty_without_a_call(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A listing that ends before it begins shows nothing."""
    await blobs.create("b", b"")
    assert [] == await blobs.entries("", after="c", before="a", limit=10)
    assert [] == await blobs.entries("", before="", limit=10)
    assert 0 == gcs.calls[LIST]


async def test_address_is_that_of_the_bucket(blobs: GcsBlobs) -> None:
    """The URL of an object, or of a folder, is what Google's tools take."""
    assert f"gs://{BUCKET}/sessions/a-task/" == blobs.url("sessions/a-task/")
