"""The paths of files in the local data directory that are not objects, and the marker of processes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ccrun.task import TaskId


def sealing_key_file(data_dir: Path) -> Path:
    """Return the file with the key that wraps data keys."""
    return data_dir / ".keys" / "sealing.key"


def callback_secret_file(data_dir: Path) -> Path:
    """Return the file with the callback secret that ccrun generates when none is configured."""
    return data_dir / ".keys" / "callback.secret"


def pid_files(data_dir: Path) -> Path:
    """Return the directory of the PID files. Each is named after the task whose worker keeps it locked."""
    return data_dir / ".workers"


def agent_users(data_dir: Path) -> Path:
    """Return the directory of the files that workers lock for the users that their agents run as, each named by its number."""
    return data_dir / ".users"


def services(data_dir: Path) -> Path:
    """Return the directory in which services record what they have queued."""
    return data_dir / ".services"


def process_marker(data_dir: Path, task_id: TaskId) -> str:
    """Return the string that marks the processes of a task.

    It includes a hash of the directory, since another service on the machine may have a task with the same ID.
    """
    return f"{task_id}.{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]}"
