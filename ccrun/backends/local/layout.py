"""Where the local backend keeps what is not an object."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ccrun.task import TaskId


def callback_secret_file(data_dir: Path) -> Path:
    """Return where the local backend keeps the secret that it made for callbacks."""
    return data_dir / ".keys" / "callback.secret"


def pid_file(data_dir: Path, task_id: TaskId) -> Path:
    """Return the file that the worker of a task keeps locked on the local backend."""
    return data_dir / ".workers" / task_id


def process_marker(data_dir: Path, task_id: TaskId) -> str:
    """Return what marks the processes of a task. Another service on this machine may have a task of the same ID."""
    return f"{task_id}.{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]}"
