"""The oracle: compares what the agents printed with what is stored and what the receiver got."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from soak.agent import COUNTS, Plan, line, printed_lines

from ccrun.store import Store
from ccrun.task import Reason, Status, TaskId, TaskRecord

#: The number of lines in the error of a record or in the last line of a log.
DROPPED: Final = re.compile(r"([0-9]+) lines? of the log could not be stored")
#: Part of the error of a task whose worker had no time left to read what the agent had printed.
NOT_IN_ORDER: Final = "could not be stopped in order"
#: Part of the error of a task whose worker exited after SIGTERM without a final record, on Google Cloud.
STOPPED: Final = "stopped at the platform"
#: The beginning of a line that the worker has added, or a fragment of the last line of the agent as text.
ADDED: Final = re.compile(rb'\{"type":"(worker|stderr)"')
FRAGMENT: Final = re.compile(rb'\{"type":"text","content":"')


@attrs.frozen(kw_only=True)
class Printed:
    """What one start of an agent has printed: at least `least` lines, at most `most`."""

    least: int
    most: int


@attrs.frozen(kw_only=True)
class Evidence:
    """All that is known about one task at the end.

    Args:
        plan: What its agent should do.
        starts: What each start of its agent has printed.
        record: The stored record.
        first_final: The first record that was final.
        log: The stored lines, without newlines.
        callbacks: The bodies of the callbacks.
        was_cancelled: Whether the API accepted a cancellation.
        worker_was_killed: Whether its worker got SIGKILL.
    """

    plan: Plan
    starts: Sequence[Printed]
    record: TaskRecord
    first_final: TaskRecord
    log: Sequence[bytes]
    callbacks: Sequence[bytes]
    was_cancelled: bool
    worker_was_killed: bool


def faults(evidence: Evidence) -> list[str]:
    """Return what is wrong with a task, nothing if all promises are kept."""
    found = [*_faults_of_record(evidence), *_faults_of_log(evidence), *_faults_of_callbacks(evidence)]
    return [f"task {evidence.record.task_id}, key {evidence.plan['key']}: {fault}" for fault in found]


def _faults_of_record(evidence: Evidence) -> list[str]:
    record, found = evidence.record, []
    if not record.status.is_final:
        found.append(f"it is {record.status}")
    if _facts(record) != _facts(evidence.first_final):
        found.append(f"the final record has changed from {_facts(evidence.first_final)} to {_facts(record)}")
    if evidence.was_cancelled and record.status is not Status.CANCELLED:
        found.append(f"it was cancelled, and is {record.status}")
    if not evidence.worker_was_killed and (record.reason is Reason.WORKER_LOST or STOPPED in (record.error or "")):
        found.append(f"its worker was lost without SIGKILL ({record.error})")
    if len(evidence.starts) > 1:
        found.append(f"its agent was started {len(evidence.starts)} times")
    if record.status is Status.COMPLETED and not evidence.starts:
        found.append("it is completed, and its agent was not started")
    if record.reason is Reason.COMPLETED and evidence.plan["fails"]:
        found.append("it is completed, and its agent has failed")
    return found


def _facts(record: TaskRecord) -> tuple[object, ...]:
    return (record.status, record.reason, record.exit_code, record.error, record.completed_at)


def _faults_of_log(evidence: Evidence) -> list[str]:
    record, plan = evidence.record, evidence.plan
    printed = evidence.starts[0] if evidence.starts else Printed(least=0, most=0)
    own = [stored for stored in evidence.log if not ADDED.match(stored)]
    has_fragment = bool(own and FRAGMENT.match(own[-1]))
    lines = own[:-1] if has_fragment else own
    found = []
    for number, stored in enumerate(lines, start=1):
        if stored + b"\n" != line(plan, number):
            return [f"line {number} of the log is {stored[:80]!r}"]
    if len(lines) + has_fragment > printed.most:
        found.append(f"{len(lines)} lines are stored, and {printed.most} were printed")
    if has_fragment:
        fragment = str(json.loads(own[-1])["content"]).encode()
        if not line(plan, len(lines) + 1).startswith(fragment):
            found.append(f"the last line of the log is {fragment[:80]!r}")
    if record.status is Status.COMPLETED and len(lines) != printed_lines(plan):
        found.append(f"it is completed, and {len(lines)} of {printed_lines(plan)} lines are stored")
    dropped = dropped_lines(record)
    stopped_in_order = not evidence.worker_was_killed and NOT_IN_ORDER not in (record.error or "")
    if stopped_in_order and len(lines) + dropped < printed.least:
        found.append(f"{printed.least} lines were printed, {len(lines)} stored, {dropped} dropped ({record.error})")
    if dropped and len(lines) + dropped > printed.most:
        found.append(f"{len(lines)} lines are stored and {dropped} dropped, but only {printed.most} were printed")
    return found


def dropped_lines(record: TaskRecord) -> int:
    """Return how many lines of the log could not be stored, as the record says."""
    match = DROPPED.search(record.error or "")
    return int(match[1]) if match else 0


def _faults_of_callbacks(evidence: Evidence) -> list[str]:
    if not evidence.callbacks:
        return ["no callback was delivered"]
    if len(set(evidence.callbacks)) > 1:
        return [f"its {len(evidence.callbacks)} callbacks differ"]
    body: dict[str, Any] = json.loads(evidence.callbacks[0])
    if body["status"] != evidence.record.status:
        return [f"the callback says {body['status']}, the record {evidence.record.status}"]
    return []


def read_starts(directory: Path, key: str) -> list[Printed]:
    """Return what each start of an agent has printed."""
    starts = []
    for path in sorted(directory.glob(f"{key}.*")):
        most, least = COUNTS.unpack(path.read_bytes().ljust(COUNTS.size, b"\0"))
        starts.append(Printed(least=least, most=most))
    return starts


async def stored_log(store: Store, task_id: TaskId) -> list[bytes]:
    """Return all lines of a log. Raise an error if the numbers of its chunks have a gap."""
    lines: list[bytes] = []
    first = 1
    while True:
        listing = await store.logs.listing(task_id, first=first)
        for number, chunk in enumerate(listing.chunks, start=first):
            assert chunk.number == number, f"chunk {number} of task {task_id} is missing"
            lines += (await store.logs.read_chunk(chunk)).splitlines()
        first += len(listing.chunks)
        if listing.record_generation is not None or not listing.chunks:
            return lines
