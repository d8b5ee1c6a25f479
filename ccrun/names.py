"""The name of every object in storage, and the meaning of its parts. Pure."""

from __future__ import annotations

import datetime as dt
import re
from typing import Final

from ccrun.task import TaskId

# --- object names: pure ----------------------------------------------------------------------------------------------

#: The digits of the first 999 chunks. See `chunk_code` for what follows.
CHUNK_DIGITS: Final = 3
#: Milliseconds since 1970 have 13 digits until the year 2286; taken from this, a later time gives a smaller number.
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


def upload_name(task_id: TaskId, path: str) -> str:
    """Return the name of a file that a task left, under its path in the place for uploads."""
    return f"{task_prefix(task_id)}uploads/{path}"


def active_name(task_id: TaskId) -> str:
    """Return the name of the mark that a task is not over, or owes its callback."""
    return f"active/{task_id}"


def index_name(task_id: TaskId, created_at: dt.datetime) -> str:
    """Return the name under which a listing shows tasks newest first.

    The digits of the time are cut into folders, so that on a disk no folder grows with the number of tasks ever run: a
    listing looks into those of the days, hours and seconds that it shows, and no others.
    """
    newest_first = f"{LAST_MILLISECOND - round(created_at.timestamp() * 1000):013d}"
    return f"index/{newest_first[:5]}/{newest_first[5:8]}/{newest_first[8:]}-{task_id}"


def chunk_code(number: int) -> str:
    """Return the digits of a chunk: 001 to 999, then longer, so that plain string order stays the order of the numbers.

    A name goes on with a hyphen, which sorts before any digit: `999-` comes before `999000001-`. So when the codes of one
    width are used up, the last of them becomes the prefix of twice as many digits more, for as long as it takes.
    """
    prefix, width = "", CHUNK_DIGITS
    while number > (most := 10**width - 1):
        prefix, number, width = prefix + str(most), number - most, width * 2
    return f"{prefix}{number:0{width}d}"


def chunk_number(code: str) -> int:
    """Return the number of a chunk from its digits: the inverse of `chunk_code`."""
    number, width = 0, CHUNK_DIGITS
    while code:
        number, code, width = number + int(code[:width]), code[width:], width * 2
    return number


def chunk_name(task_id: TaskId, number: int, at: dt.datetime) -> str:
    """Return the name of a log chunk."""
    return f"{task_prefix(task_id)}{chunk_code(number)}-{at.astimezone(dt.UTC):%Y%m%d-%H%M%S}.jsonl"


def before_chunk(task_id: TaskId, number: int) -> str:
    """Return a name that sorts after every chunk before `number` and before that chunk."""
    return f"{task_prefix(task_id)}{chunk_code(number - 1)}-~" if number > 1 else task_prefix(task_id)
