from __future__ import annotations

import itertools
import secrets
import tempfile
from pathlib import Path

from ccrun.task import TaskId
from ccrun.task_directories import candidate_names, private_prefix, remove_leftovers


def test_names_start_with_a_fixed_one() -> None:
    """The first name depends only on the task ID. All others have a random suffix after the private prefix."""
    task_id = TaskId("t-1")
    first, *others = itertools.islice(candidate_names(task_id), 5)
    assert "ws-t-1" == first
    assert 4 == len(set(others))
    assert all(name.startswith(private_prefix(task_id)) for name in others)


def test_leftovers_of_one_task_are_removed(tmp_path: Path) -> None:
    """All directories of a task are removed, but neither those of a task with a similar ID nor the target of a link."""
    task_id = TaskId(f"t-{secrets.token_hex(8)}")
    (tmp_path / "target").mkdir()
    parent = Path(tempfile.gettempdir())
    first, second, other, link = (parent / f"ws-{task_id}{suffix}" for suffix in ("", ".0f", "-2", ".link"))
    for directory in (first, second, other):
        directory.mkdir()
    link.symlink_to(tmp_path / "target")
    try:
        remove_leftovers(task_id)
        assert [False, False, True, True] == [path.exists() for path in (first, second, other, tmp_path / "target")]
    finally:
        link.unlink()
        other.rmdir()
