"""Arguments, environment and output of the CLI."""

from __future__ import annotations

from typing import Any

from ccrun.spec import TaskSpec
from ccrun.task import TaskId, TaskType

MIB = 1024 * 1024


def task(**fields: Any) -> TaskSpec:
    """Return a task with these fields, and defaults for the required ones."""
    defaults = {"task_id": TaskId("t1"), "type": TaskType.ASYNC, "prompt": "Do it.", "timeout_minutes": 1.0}
    return TaskSpec(**{**defaults, **fields})
