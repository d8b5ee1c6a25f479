"""The oracle reports each kind of fault, and none where there is none."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from soak import agent
from soak.agent import Plan, line
from soak.oracle import Evidence, Printed, faults, read_starts

from ccrun.task import Reason, Status, TaskId, TaskRecord, TaskType
from ccrun.worker.lines import text_line, worker_line

PLAN = Plan(
    key="7",
    oracle="",
    lines=3,
    batch=2,
    interval=0.0,
    padding=4,
    ignores_sigterm=False,
    fails=False,
    background=0,
    detaches="no",
)
LINES = [line(PLAN, number).rstrip(b"\n") for number in (1, 2, 3, 4)]
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
COMPLETED = TaskRecord(
    task_id=TaskId("t-1"),
    type=TaskType.ASYNC,
    status=Status.COMPLETED,
    reason=Reason.COMPLETED,
    created_at=NOW,
    completed_at=NOW,
    logs_path="file:///",
)
KILLED = attrs.evolve(COMPLETED, status=Status.FAILED, reason=Reason.KILLED)
DROPPED = attrs.evolve(KILLED, error="2 lines of the log could not be stored. There was no time left to write them.")
LOST = attrs.evolve(KILLED, reason=Reason.WORKER_LOST)
CANCELLED = attrs.evolve(COMPLETED, status=Status.CANCELLED, reason=Reason.CANCELLED)


def callback(record: TaskRecord) -> bytes:
    """Return the part of a callback that the oracle reads."""
    return json.dumps({"status": record.status}).encode()


def evidence(record: TaskRecord, **changes: Any) -> Evidence:
    """Return the evidence of a task whose four lines were printed and stored."""
    given: dict[str, Any] = {
        "plan": PLAN,
        "starts": [Printed(least=4, most=4)],
        "record": record,
        "first_final": record,
        "log": LINES,
        "callbacks": [callback(record)],
        "was_cancelled": False,
        "worker_was_killed": False,
    }
    return Evidence(**{**given, **changes})


@pytest.mark.parametrize(
    "kept",
    [
        evidence(COMPLETED),
        evidence(COMPLETED, callbacks=[callback(COMPLETED)] * 2),
        evidence(COMPLETED, log=[worker_line("clone"), *LINES]),
        evidence(CANCELLED, was_cancelled=True, starts=[], log=[]),
        evidence(KILLED, log=LINES[:2], starts=[Printed(least=2, most=3)]),
        evidence(KILLED, log=[*LINES[:2], text_line(LINES[2][:9], type="text")], starts=[Printed(least=2, most=3)]),
        evidence(LOST, log=LINES[:1], worker_was_killed=True),
        evidence(DROPPED, log=[*LINES[:2], worker_line("log", error="Some lines.")]),
    ],
    ids=["completed", "two callbacks", "a line of the worker", "cancelled", "killed", "a fragment", "lost", "dropped"],
)
def test_kept_promises_are_no_faults(kept: Evidence) -> None:
    """The oracle reports nothing about a task that keeps its promises."""
    assert [] == faults(kept)


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (evidence(attrs.evolve(COMPLETED, status=Status.RUNNING)), "it is running"),
        (evidence(COMPLETED, first_final=KILLED), "the final record has changed"),
        (evidence(COMPLETED, was_cancelled=True), "it was cancelled, and is completed"),
        (evidence(LOST, log=LINES[:1]), "its worker was lost without SIGKILL"),
        (evidence(COMPLETED, starts=[Printed(least=4, most=4)] * 2), "its agent was started 2 times"),
        (evidence(COMPLETED, starts=[], log=[]), "its agent was not started"),
        (evidence(COMPLETED, log=LINES[:3]), "3 of 4 lines are stored"),
        (evidence(COMPLETED, log=[LINES[0], LINES[2], LINES[3]]), "line 2 of the log is"),
        (evidence(COMPLETED, log=[LINES[0], *LINES]), "line 2 of the log is"),
        (evidence(KILLED, starts=[Printed(least=2, most=3)]), "4 lines are stored, and 3 were printed"),
        (evidence(KILLED, log=LINES[:3]), "4 lines were printed, 3 stored, 0 dropped"),
        (evidence(DROPPED, log=LINES[:1]), "4 lines were printed, 1 stored, 2 dropped"),
        (evidence(DROPPED, log=LINES[:3]), "3 lines are stored and 2 dropped, but only 4 were printed"),
        (evidence(KILLED, log=[*LINES[:3], text_line(b"other", type="text")]), "the last line of the log is"),
        (evidence(COMPLETED, callbacks=[]), "no callback was delivered"),
        (evidence(COMPLETED, callbacks=[callback(COMPLETED), callback(KILLED)]), "its 2 callbacks differ"),
        (evidence(COMPLETED, callbacks=[callback(KILLED)]), "the callback says failed, the record completed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_promise_is_reported(broken: Evidence, fault: str) -> None:
    """The oracle reports each promise that is broken."""
    assert any(fault in found for found in faults(broken)), faults(broken)


def test_agent_prints_its_plan_and_counts_its_lines(tmp_path: Path) -> None:
    """The fake CLI prints the lines that the oracle expects, and its file has their number."""
    plan = Plan(**{**PLAN, "oracle": str(tmp_path)})
    command = [sys.executable, agent.__file__]
    done = subprocess.run(
        command, input=json.dumps(plan).encode(), capture_output=True, cwd=tmp_path, check=True, timeout=60
    )
    assert LINES == done.stdout.splitlines()
    assert [Printed(least=4, most=4)] == read_starts(tmp_path, "7")
