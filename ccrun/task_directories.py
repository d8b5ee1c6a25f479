"""The temporary directories of a task: how they are named, and how those of a lost worker are removed."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ccrun.removal import remove_tree
from ccrun.task import TaskId


def candidate_names(task_id: TaskId) -> Iterator[str]:
    """Yield names for the workspace of a task: first a fixed one, then names that cannot be guessed."""
    yield _name(task_id)
    while True:
        yield f"{private_prefix(task_id)}{secrets.token_hex(4)}"


def private_prefix(task_id: TaskId) -> str:
    """Return the prefix of all other directories of a task. No task ID has a dot, so the prefix is unique to the task."""
    return f"{_name(task_id)}."


def remove_leftovers(task_id: TaskId) -> None:
    """Remove all directories of a task that belong to this user; for root, also those of the agent's user. Blocks."""
    parent = Path(tempfile.gettempdir())
    for path in (parent / _name(task_id), *parent.glob(f"{private_prefix(task_id)}*")):
        if path.is_dir() and not path.is_symlink() and os.geteuid() in (0, path.stat().st_uid):
            remove_tree(path)


def _name(task_id: TaskId) -> str:
    return f"ws-{task_id}"
