from __future__ import annotations

import base64
import datetime as dt
import json
import subprocess
import sys
from typing import Any

import attrs
import pytest
from helpers.request import MINIMAL, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from ccrun import codec, task
from ccrun.errors import SealError, StorageError
from ccrun.results import ActionError, GitCommit, Recovery, UploadedFile
from ccrun.spec import ConfigFile, GitAction, PostRunActions, TaskSpec, UploadAction
from ccrun.task import CallbackInfo, CallbackState, Reason, Secret, Status, Summary, TaskId, TaskRecord, TaskType

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: "Infinity" not in json.dumps(value))
OBJECT = st.dictionaries(st.text(), JSON, max_size=3)
TEXT = st.text()
NAMES = st.dictionaries(st.from_regex(r"[A-Z]{1,8}", fullmatch=True), st.builds(Secret, TEXT), max_size=3)
TIMES = st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2100, 1, 1)).map(  # noqa: DTZ001 - made aware below.
    lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=dt.UTC)
)
FILES = st.dictionaries(TEXT, st.builds(ConfigFile, frontmatter=OBJECT, content=TEXT), max_size=2)
SPECS = st.builds(
    TaskSpec,
    task_id=st.from_regex(task.TASK_ID_PATTERN, fullmatch=True),
    type=st.sampled_from(TaskType),
    prompt=TEXT,
    timeout_minutes=st.floats(0.001, 1440),
    anthropic_api_key=st.none() | st.builds(Secret, TEXT),
    anthropic_oauth_token=st.none() | st.builds(Secret, TEXT),
    environment_secrets=NAMES,
    allowed_tools=st.lists(TEXT, max_size=3).map(tuple),
    mcp_config=st.none() | OBJECT,
    slash_commands=FILES,
    subagents=FILES,
    metadata=st.none() | OBJECT,
    post_execution_actions=st.builds(
        PostRunActions,
        git=st.none() | st.builds(GitAction, commit=st.booleans(), files=st.lists(TEXT, max_size=2).map(tuple)),
        upload_files=st.none() | st.builds(UploadAction, glob_patterns=st.lists(TEXT, max_size=2).map(tuple)),
    ),
)
SUMMARIES = st.builds(
    Summary,
    duration_ms=st.integers(0, 10**9),
    turns=st.integers(0, 1000),
    errors=st.integers(0, 1000),
    started_at=st.none() | TIMES,
    completed_at=TIMES,
    cost_usd=st.none() | st.floats(0, 1000),
    usage=st.none() | OBJECT,
    session_id=st.none() | TEXT,
    result=st.none() | TEXT,
)
GIT_COMMITS = st.builds(
    GitCommit,
    sha=st.none() | TEXT,
    message=TEXT,
    pushed=st.booleans(),
    branch=TEXT,
    committed=st.sampled_from([None, False]),
    recovery=st.none()
    | st.builds(Recovery, method=TEXT, remote_sha=TEXT, conflict_files=st.lists(TEXT, max_size=2).map(tuple)),
)
RECORDS = st.builds(
    TaskRecord,
    task_id=st.from_regex(task.TASK_ID_PATTERN, fullmatch=True),
    type=st.sampled_from(TaskType),
    status=st.sampled_from(Status),
    created_at=TIMES,
    logs_path=TEXT,
    started_at=st.none() | TIMES,
    completed_at=st.none() | TIMES,
    exit_code=st.none() | st.integers(0, 255),
    error=st.none() | TEXT,
    reason=st.none() | st.sampled_from(Reason),
    summary=st.none() | SUMMARIES,
    uploaded_files=st.none()
    | st.lists(st.builds(UploadedFile, original_path=TEXT, gcs_path=TEXT, size_bytes=st.integers(0, 2**53 - 1))).map(
        tuple
    ),
    git_commit=st.none() | GIT_COMMITS,
    action_errors=st.lists(st.builds(ActionError, action=TEXT, error=TEXT), max_size=2).map(tuple),
    webhook=st.none()
    | st.builds(
        CallbackInfo,
        state=st.sampled_from(CallbackState),
        attempts=st.integers(0, 99),
        last_error=st.none() | TEXT,
        next_attempt_at=st.none() | TIMES,
    ),
    metadata=st.none() | OBJECT,
    sealed_callback_url=st.none() | st.binary(),
    idempotency_digest=st.none() | TEXT,
)
NOON = dt.datetime(2025, 1, 10, 12, 34, 56, 789_999, tzinfo=dt.UTC)
RECORD = TaskRecord(
    task_id=TaskId("t-1"),
    type=TaskType.ASYNC,
    status=Status.PENDING,
    created_at=NOON.replace(microsecond=789_000),
    logs_path="gs://bucket/sessions/t-1/",
    callback_url="https://example.com/hook",
    webhook=CallbackInfo(),
    metadata={"requestId": "r"},
    sealed_callback_url=b"\x00sealed",
    idempotency_digest="digest",
)
DONE = attrs.evolve(
    RECORD,
    status=Status.COMPLETED,
    started_at=NOON,
    completed_at=NOON,
    exit_code=0,
    reason=Reason.COMPLETED,
    summary=Summary(
        duration_ms=45_000,
        turns=15,
        errors=0,
        started_at=NOON,
        completed_at=NOON.astimezone(dt.timezone(dt.timedelta(hours=2))),
        cost_usd=0.25,
    ),
    uploaded_files=(UploadedFile(original_path="a.log", gcs_path="gs://bucket/a.log", size_bytes=3),),
    git_commit=GitCommit(sha="a1", message="m", pushed=True, branch="main"),
)


# --- sealed tasks and stored records ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(spec=SPECS)
def test_spec_is_read_as_it_was_written(spec: TaskSpec) -> None:
    """The worker reads exactly the task that the API wrote, with its secrets and numbers."""
    assert spec == codec.spec_from_bytes(codec.spec_to_bytes(spec))


@settings(deadline=None)
@given(record=RECORDS)
def test_record_is_read_as_it_was_written(record: TaskRecord) -> None:
    """Reading a record returns an equal record, and writing it again gives the same bytes."""
    content = codec.record_to_bytes(record)

    assert record == codec.record_from_bytes(content)
    assert content == codec.record_to_bytes(codec.record_from_bytes(content))


def test_fields_of_a_newer_version_are_ignored() -> None:
    """Unknown fields are ignored, at each level."""
    spec = parse({**MINIMAL, "postExecutionActions": {"git": {"commit": True}}})
    sealed = json.loads(codec.spec_to_bytes(spec))
    sealed["newField"] = sealed["postExecutionActions"]["git"]["newField"] = {"x": 1}
    stored = {**json.loads(codec.record_to_bytes(RECORD)), "newField": 1}

    assert spec == codec.spec_from_bytes(json.dumps(sealed).encode())
    assert RECORD == codec.record_from_bytes(json.dumps(stored).encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'"x"', b"\xff", b'{"taskId": 5}', b"[" * 100_000],
)
def test_invalid_bytes_raise_an_error_that_does_not_repeat_them(content: bytes) -> None:
    """Invalid bytes raise `SealError` or `StorageError`, and the former does not reveal their content."""
    with pytest.raises(SealError) as caught:
        codec.spec_from_bytes(content)
    assert caught.value.__cause__ is None
    with pytest.raises(StorageError):
        codec.record_from_bytes(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [("exitCode", "0"), ("exitCode", True), ("status", "sleeping"), ("error", 5), ("createdAt", 5), ("metadata", [1])],
)
def test_values_of_other_types_are_not_converted(field: str, value: object) -> None:
    """A damaged record raises an error, and is never converted to a plausible one."""
    stored = {**json.loads(codec.record_to_bytes(RECORD)), field: value}

    with pytest.raises(StorageError):
        codec.record_from_bytes(json.dumps(stored).encode())


def test_nan_is_stored_as_null() -> None:
    """A NaN that an agent reported is stored as null, so that the record can be written and read."""
    assert DONE.summary is not None
    summary = attrs.evolve(DONE.summary, usage={"n": float("nan"), "s": "\ud800"})
    record = codec.record_from_bytes(codec.record_to_bytes(attrs.evolve(DONE, summary=summary)))

    assert record.summary is not None
    assert {"n": None, "s": "\ud800"} == record.summary.usage


def test_commit_has_only_the_fields_that_apply() -> None:
    """`committed` and `recovery` are absent when they do not apply; all other fields are always present."""
    plain = GitCommit(sha=None, message="m", pushed=False, branch="main")
    recovery = Recovery(method="rebase", remote_sha="b2", conflict_files=("a.txt",))
    recovered = attrs.evolve(plain, sha="a1", pushed=True, recovery=recovery)

    def written(commit: GitCommit) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(codec.record_to_bytes(attrs.evolve(DONE, git_commit=commit)))["gitCommit"]
        return value

    assert {"sha": None, "message": "m", "pushed": False, "branch": "main"} == written(plain)
    assert {**written(plain), "committed": False} == written(attrs.evolve(plain, committed=False))
    expected = {"method": "rebase", "remoteSha": "b2", "conflictFiles": ["a.txt"]}
    assert {**written(plain), "sha": "a1", "pushed": True, "recovery": expected} == written(recovered)


def test_import_creates_no_converter() -> None:
    """The converter, whose creation is slow, is created on first use."""
    program = "from ccrun import codec; print(codec._converter.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    assert "0\n" == done.stdout


# --- public records and callbacks ------------------------------------------------------------------------------------


def test_public_record_has_all_fields() -> None:
    """Each public field is always present, null while unknown; internal fields never are."""
    assert {
        "taskId": "t-1",
        "type": "async",
        "status": "pending",
        "createdAt": "2025-01-10T12:34:56.789Z",
        "logsPath": "gs://bucket/sessions/t-1/",
        "startedAt": None,
        "completedAt": None,
        "cancelledAt": None,
        "executionName": None,
        "callbackUrl": "https://example.com/hook",
        "exitCode": None,
        "error": None,
        "reason": None,
        "summary": None,
        "actionErrors": [],
        "webhook": {"state": "waiting", "attempts": 0, "lastError": None, "nextAttemptAt": None},
        "metadata": {"requestId": "r"},
    } == codec.record_to_public(RECORD)


def test_public_record_does_not_show_the_end_of_a_lease() -> None:
    """During a delivery, `nextAttemptAt` is null; of an owed callback, it is the time of the next delivery."""
    at = dt.datetime(2025, 1, 10, 12, 40, tzinfo=dt.UTC)
    shown = [
        codec.record_to_public(attrs.evolve(RECORD, webhook=CallbackInfo(state=state, next_attempt_at=at)))["webhook"]
        for state in (CallbackState.DELIVERING, CallbackState.OWED)
    ]
    assert [None, "2025-01-10T12:40:00.000Z"] == [webhook["nextAttemptAt"] for webhook in shown]


def test_stored_record_has_internal_fields() -> None:
    """The sealed callback URL and the digest are stored, the bytes in base64."""
    stored = json.loads(codec.record_to_bytes(RECORD))

    assert (base64.b64encode(b"\x00sealed").decode(), "digest") == (
        stored["sealedCallbackUrl"],
        stored["idempotencyDigest"],
    )


def test_callback_has_the_documented_body() -> None:
    """The callback of a completed task has the documented fields in order, and times in UTC with milliseconds."""
    assert (
        b'{"taskId":"t-1","status":"completed","exitCode":0,"logsPath":"gs://bucket/sessions/t-1/","summary":'
        b'{"durationMs":45000,"turns":15,"errors":0,"startedAt":"2025-01-10T12:34:56.789Z",'
        b'"completedAt":"2025-01-10T12:34:56.789Z","costUsd":0.25,"usage":null,"sessionId":null,"result":null},'
        b'"error":null,"metadata":{"requestId":"r"},'
        b'"uploadedFiles":[{"originalPath":"a.log","gcsPath":"gs://bucket/a.log","sizeBytes":3}],'
        b'"gitCommit":{"sha":"a1","message":"m","pushed":true,"branch":"main"}}'
    ) == codec.callback_body(DONE)


def test_callback_has_only_the_actions_that_ran() -> None:
    """Without uploads and commit their fields are absent; failed actions are included."""
    bare = attrs.evolve(DONE, uploaded_files=None, git_commit=None)
    failed = attrs.evolve(bare, action_errors=(ActionError(action="git", error="No."),))

    assert ["taskId", "status", "exitCode", "logsPath", "summary", "error", "metadata"] == list(
        json.loads(codec.callback_body(bare))
    )
    assert [{"action": "git", "error": "No."}] == json.loads(codec.callback_body(failed))["actionErrors"]


def test_callback_has_the_metadata_of_the_request() -> None:
    """Sealing, storing and printing keep the values and the order of fields, in the form of JavaScript."""
    body = b'{"big":1e20,"negative":-0,"one":1.0,"tiny":5e-324,"max":9007199254740991,"text":"\\u00e9\\ud83d\\ude00"}'
    request = b'{"prompt":"p","anthropicApiKey":"k","callbackUrl":"https://a.example","metadata":' + body + b"}"

    spec = codec.spec_from_bytes(codec.spec_to_bytes(parse(request)))
    record = codec.record_from_bytes(codec.record_to_bytes(attrs.evolve(DONE, metadata=spec.metadata)))

    assert json.loads(body) == json.loads(codec.callback_body(record))["metadata"]
    assert (
        '"metadata":{"big":100000000000000000000,"negative":0,"one":1,"tiny":5e-324,"max":9007199254740991,"text":"é😀"}'
    ) in codec.callback_body(record).decode()
