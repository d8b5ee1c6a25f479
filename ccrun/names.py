"""The names of all objects in storage, and how to parse them. Pure."""

from __future__ import annotations

import datetime as dt
import re
from typing import Final

from ccrun.task import TASK_ID_PATTERN, TaskId

#: Digits of the first 999 chunk numbers; `chunk_code` describes how later ones are written.
CHUNK_DIGITS: Final = 3
#: Milliseconds since 1970 have 13 digits until the year 2286. Subtracted from this number, later times sort first.
LAST_MILLISECOND: Final = 10**13 - 1

CHUNK_NAME: Final = re.compile(r"([0-9]{3,})-[0-9]{8}-[0-9]{6}\.jsonl")


def task_prefix(task_id: TaskId) -> str:
    """Return the prefix of all objects of a task."""
    return f"sessions/{task_id}/"


def record_name(task_id: TaskId) -> str:
    """Return the name of the task record."""
    return f"{task_prefix(task_id)}metadata.json"


def payload_name(task_id: TaskId) -> str:
    """Return the name of the sealed request."""
    return f"{task_prefix(task_id)}encrypted-payload.bin"


def lease_name(task_id: TaskId) -> str:
    """Return the name of the lease on a `POST /run` task whose client has left. It sorts between the chunks and the record."""
    return f"{task_prefix(task_id)}lease"


def upload_name(task_id: TaskId, path: str) -> str:
    """Return the name of an uploaded file, from its path below the uploads of the task."""
    return f"{task_prefix(task_id)}uploads/{path}"


def active_name(task_id: TaskId) -> str:
    """Return the name of the mark that exists while a task is not final or owes its callback."""
    return f"active/{task_id}"


def index_name(task_id: TaskId, created_at: dt.datetime) -> str:
    """Return the name of the index entry of a task. In string order, these names list tasks newest first.

    Slashes divide the time, so that on a disk the directories stay small and a listing reads only those of the period that
    it returns.
    """
    newest_first = f"{LAST_MILLISECOND - round(created_at.timestamp() * 1000):013d}"
    return f"index/{newest_first[:5]}/{newest_first[5:8]}/{newest_first[8:]}-{task_id}"


def index_name_at(cursor: str) -> str:
    """Return the name of the index entry at which a page of the list ended.

    Raises:
        ValueError: It is not the cursor of a page.
    """
    time, _, task_id = cursor.partition("-")
    if not re.fullmatch(r"[0-9]{5}/[0-9]{3}/[0-9]{5}", time) or not TASK_ID_PATTERN.fullmatch(task_id):
        raise ValueError("cursor must be the nextCursor of an earlier response")
    return f"index/{cursor}"


def chunk_code(number: int) -> str:
    """Return the digits that stand for a chunk number: 001 to 999, then longer codes that keep string order.

    In a name, a hyphen follows the code, and a hyphen sorts before every digit: `999-` comes before `999000001-`. When all
    codes of one width are used, the last of them becomes a prefix that is followed by twice as many digits.
    """
    prefix, width = "", CHUNK_DIGITS
    while number > (most := 10**width - 1):
        prefix, number, width = prefix + str(most), number - most, width * 2
    return f"{prefix}{number:0{width}d}"


def chunk_number(code: str) -> int:
    """Return the chunk number that a code stands for; the inverse of `chunk_code`."""
    number, width = 0, CHUNK_DIGITS
    while code:
        number, code, width = number + int(code[:width]), code[width:], width * 2
    return number


def chunk_name(task_id: TaskId, number: int, at: dt.datetime) -> str:
    """Return the name of a log chunk."""
    return f"{task_prefix(task_id)}{chunk_code(number)}-{at.astimezone(dt.UTC):%Y%m%d-%H%M%S}.jsonl"


def before_chunk(task_id: TaskId, number: int) -> str:
    """Return a name that sorts just before chunk `number`, and after all earlier chunks."""
    return f"{task_prefix(task_id)}{chunk_code(number - 1)}-~" if number > 1 else task_prefix(task_id)
