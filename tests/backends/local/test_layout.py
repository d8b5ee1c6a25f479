from __future__ import annotations

from pathlib import Path

from ccrun.backends.local.layout import process_marker
from ccrun.task import TaskId


def test_process_marker_depends_on_the_data_directory() -> None:
    """Tasks with the same ID in two data directories have different markers, so no service kills another's processes."""
    assert process_marker(Path("/a"), TaskId("t")) != process_marker(Path("/b"), TaskId("t"))
