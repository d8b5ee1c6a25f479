"""Uploads of files in parts to Cloud Storage."""

from __future__ import annotations

import asyncio
import io
import sys
import time
from typing import Final

import pytest
from helpers.gcs import CREATE, GET, PART, PART_BYTES, POLICY, TRANSIENT_FAULTS, until
from standins.gcs import BUCKET, HANG, NO_FAULT, Fault, Gcs

from ccrun.backends.gcp.blobs import GcsBlobs, open_blobs
from ccrun.blobs import Blob
from ccrun.errors import BlobExists, BlobNotFound, FileUnreadable, StorageError

#: Three parts and a short one.
CONTENT = bytes(range(256)) * (3 * 1024) + b"and the end"


async def create_content(blobs: GcsBlobs, name: str = "name") -> int:
    """Create an object from a file that has several parts."""
    return await blobs.create_from(name, io.BytesIO(CONTENT), size=len(CONTENT))


async def test_large_file_is_uploaded_in_parts(gcs: Gcs, blobs: GcsBlobs) -> None:
    """An upload costs one call to start it and one for each part. A file that fits into one part costs one call."""
    await create_content(blobs)
    assert {CREATE: 1, PART: 4} == gcs.calls
    gcs.calls.clear()
    await blobs.create_from("small", io.BytesIO(bytes(PART_BYTES)), size=PART_BYTES)
    assert {CREATE: 1} == gcs.calls


@pytest.mark.parametrize("number", [1, 3], ids=["second", "last"])
@pytest.mark.parametrize("fault", TRANSIENT_FAULTS.values(), ids=TRANSIENT_FAULTS)
async def test_transient_fault_of_a_part_is_retried(gcs: Gcs, blobs: GcsBlobs, fault: Fault, number: int) -> None:
    """After a fault, whether the part arrived or not, the upload continues from the progress that the service reports."""
    gcs.fail(PART, *[NO_FAULT] * number, fault)
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await blobs.read("name")
    # The stand-in rejects a part that it has already stored, so nothing was sent twice.
    assert 1 == gcs.calls[CREATE]
    assert gcs.calls[PART] in (4, 5, 6)


@pytest.mark.parametrize("fault", TRANSIENT_FAULTS.values(), ids=TRANSIENT_FAULTS)
async def test_transient_fault_of_the_start_is_retried(gcs: Gcs, blobs: GcsBlobs, fault: Fault) -> None:
    """If it is unknown whether the upload was started, it is started again."""
    gcs.fail(CREATE, fault)
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await blobs.read("name")


async def test_progress_query_is_retried(gcs: Gcs, blobs: GcsBlobs) -> None:
    """After a lost part, a progress query that fails is retried."""
    gcs.fail(PART, NO_FAULT, Fault(status=503), Fault(reset="before"), Fault(status=500))
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await blobs.read("name")


@pytest.mark.parametrize(
    "fault", [Fault(stored_bytes=PART_BYTES, reset="before"), Fault(stored_bytes=PART_BYTES, status=503)]
)
async def test_stored_half_of_a_part_is_not_sent_again(gcs: Gcs, fault: Fault) -> None:
    """After a part was interrupted, only the bytes that the service has not stored are sent."""
    gcs.fail(PART, NO_FAULT, fault)
    async with open_blobs(BUCKET, emulator=gcs.url, policy=POLICY, part_bytes=2 * PART_BYTES) as blobs:
        content = bytes(range(256)) * (5 * 1024)
        generation = await blobs.create_from("name", io.BytesIO(content), size=len(content))
        assert Blob(content, generation) == await blobs.read("name")


async def test_rest_of_a_partly_stored_part_is_sent(gcs: Gcs) -> None:
    """If the service reports that it stored only some bytes of a part, the rest is sent."""
    async with open_blobs(BUCKET, emulator=gcs.url, policy=POLICY, part_bytes=4 * PART_BYTES) as blobs:
        # It stored a quarter of the part, and reports that as a success.
        gcs.fail(PART, Fault(status=308, headers={"Range": f"bytes=0-{PART_BYTES - 1}"}, stored_bytes=PART_BYTES))
        content = bytes(range(256)) * (5 * 1024)
        generation = await blobs.create_from("name", io.BytesIO(content), size=len(content))
        assert Blob(content, generation) == await blobs.read("name")


@pytest.mark.parametrize("number", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("status", [404, 410])
async def test_lost_upload_is_started_again(gcs: Gcs, blobs: GcsBlobs, status: int, number: int) -> None:
    """If the service no longer has the upload, it is started again from the file's original position."""
    gcs.fail(PART, *[NO_FAULT] * number, Fault(status=status))
    file = io.BytesIO(b"before" + CONTENT)
    file.seek(len(b"before"))
    generation = await blobs.create_from("name", file, size=len(CONTENT))
    assert Blob(CONTENT, generation) == await blobs.read("name")
    assert 2 == gcs.calls[CREATE]


async def test_upload_that_is_lost_repeatedly_is_an_error(gcs: Gcs, blobs: GcsBlobs) -> None:
    """If the service loses the upload every time, `create_from` raises a `StorageError`."""
    gcs.fail_always(PART, Fault(status=410))
    with pytest.raises(StorageError, match=r"Cloud Storage lost the upload 3 times: try again later\."):
        await create_content(blobs)
    assert 3 == gcs.calls[CREATE]


async def test_upload_with_lost_parts_is_started_again(gcs: Gcs, blobs: GcsBlobs) -> None:
    """If the service has lost a part that is no longer in memory, the upload is started again."""
    # The first response to the part, and the response to the progress query that follows it.
    gcs.fail(PART, NO_FAULT, NO_FAULT, Fault(status=308), Fault(status=308))
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await blobs.read("name")
    assert 2 == gcs.calls[CREATE]


async def test_last_part_with_a_lost_response_takes_effect_once(
    gcs: Gcs, blobs: GcsBlobs, other_blobs: GcsBlobs
) -> None:
    """If the response to the last part and then the upload are lost, the object is recognized by its write ID."""
    gcs.fail(PART, NO_FAULT, NO_FAULT, NO_FAULT, Fault(reset="after"), Fault(status=410))
    generation = await create_content(blobs)
    assert Blob(CONTENT, generation) == await other_blobs.read("name")
    assert (2, 1) == (gcs.calls[CREATE], gcs.calls[GET])


async def test_object_of_another_client_is_not_replaced(gcs: Gcs, blobs: GcsBlobs, other_blobs: GcsBlobs) -> None:
    """An object that another client creates during the upload is neither replaced nor mistaken for this one."""
    gcs.fail(PART, NO_FAULT, NO_FAULT, NO_FAULT, Fault(delay_seconds=0.2))
    creating = asyncio.create_task(create_content(blobs))
    await until(lambda: gcs.calls[PART] == 4)
    generation = await other_blobs.create("name", CONTENT)
    with pytest.raises(BlobExists):
        await creating
    assert Blob(CONTENT, generation) == await other_blobs.read("name")


async def test_existing_object_costs_no_part(gcs: Gcs, blobs: GcsBlobs) -> None:
    """If the object already exists, no part is sent."""
    await blobs.create("name", b"")
    with pytest.raises(BlobExists):
        await create_content(blobs)
    assert 0 == gcs.calls[PART]


async def test_file_that_grows_creates_no_object(gcs: Gcs, blobs: GcsBlobs) -> None:
    """If the file is longer than the given size, the last part, which would create the object, is not sent."""
    with pytest.raises(FileUnreadable):
        await blobs.create_from("name", io.BytesIO(CONTENT + b"!"), size=len(CONTENT))
    assert 3 == gcs.calls[PART]
    with pytest.raises(BlobNotFound):
        await blobs.read("name")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=503), "Cloud Storage is temporarily unavailable (503): try again later."),
        (HANG, "Cloud Storage did not respond in time: check the network."),
        (Fault(reset="before"), "Cloud Storage cannot be reached: check the network."),
        (Fault(status=308), "Cloud Storage did not respond in time: check the network."),
        (
            Fault(status=308, headers={"Range": f"bytes=0-{PART_BYTES - 1}"}),
            "Cloud Storage did not respond in time: check",
        ),
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
async def test_permanent_fault_of_parts_is_an_error_in_bounded_time(
    gcs: Gcs, blobs: GcsBlobs, fault: Fault, message: str
) -> None:
    """A fault that persists makes the upload raise a `StorageError` within the timeout of one part."""
    gcs.fail_always(PART, fault)
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        await create_content(blobs)
    assert caught.value.message.startswith(message)
    assert 2 * POLICY.total_seconds + POLICY.attempt_seconds + 30.0 > time.monotonic() - started


async def test_missing_bucket_names_the_setting_for_a_large_file(gcs: Gcs) -> None:
    """If the bucket does not exist, the error of an upload names the setting to check."""
    gcs.fail_always(CREATE, Fault(status=404))
    async with open_blobs("no-such-bucket", emulator=gcs.url, part_bytes=PART_BYTES) as blobs:
        with pytest.raises(StorageError, match="Cloud Storage cannot find the bucket no-such-bucket: check GCS_LOGS"):
            await create_content(blobs)


async def test_upload_can_be_cancelled(gcs: Gcs, blobs: GcsBlobs) -> None:
    """A cancelled upload returns immediately and creates no object."""
    gcs.fail(PART, NO_FAULT, HANG)
    creating = asyncio.create_task(create_content(blobs))
    await until(lambda: gcs.calls[PART] == 2)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(creating, POLICY.attempt_seconds / 2)
    with pytest.raises(BlobNotFound):
        await blobs.read("name")


MEASURE: Final = """
import asyncio, io, resource, sys
from ccrun.backends.gcp.blobs import open_blobs

class Zeros(io.BufferedIOBase):
    \"\"\"A file of zeros that needs no disk space.\"\"\"
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


async def test_large_file_needs_little_memory(gcs: Gcs) -> None:
    """An upload of 256 MiB needs the memory of a few parts."""
    gcs.discards = True
    size = 256 * 1024 * 1024
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", MEASURE, gcs.url, BUCKET, str(size)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert 64 > int(output)
    assert 32 == gcs.calls[PART]
