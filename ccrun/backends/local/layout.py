"""The files of the local backend that are not objects."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ccrun.task import TaskId


def callback_secret_file(data_dir: Path) -> Path:
    """Return the path of the generated secret for callbacks."""
    return data_dir / ".keys" / "callback.secret"


def pid_file(data_dir: Path, task_id: TaskId) -> Path:
    """Return the path of the PID file of a task's worker."""
    return data_dir / ".workers" / task_id


def process_marker(data_dir: Path, task_id: TaskId) -> str:
    """Return the marker of the processes of a task, which differs from that of a task with this ID in another data directory."""
    return f"{task_id}.{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]}"
