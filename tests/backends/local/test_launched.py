from __future__ import annotations

import os
from pathlib import Path

from ccrun.backends.local.launched import REMOVAL_AGE_SECONDS, LaunchedTasks
from ccrun.task import TaskId

ONE, TWO = TaskId("one"), TaskId("two")


async def test_tasks_of_other_services_are_known(tmp_path: Path) -> None:
    """A service sees what others have launched and not yet finished, and not what it has launched itself."""
    async with LaunchedTasks(tmp_path) as first, LaunchedTasks(tmp_path) as second:
        await first.add(ONE)
        await first.add(TWO)
        await first.remove(TWO)
        assert [frozenset(), {ONE}] == [await first.of_others(), await second.of_others()]


async def test_tasks_of_a_service_that_has_exited_do_not_count(tmp_path: Path) -> None:
    """Its directory is removed: by itself, or after a kill by a later service."""
    async with LaunchedTasks(tmp_path) as second:
        async with LaunchedTasks(tmp_path) as first:
            await first.add(ONE)
        assert frozenset() == await second.of_others()
        killed = tmp_path / "killed"
        killed.mkdir()
        (killed / ONE).touch()
        assert frozenset() == await second.of_others()
    old = killed.stat().st_mtime - REMOVAL_AGE_SECONDS - 1
    os.utime(killed, (old, old))
    async with LaunchedTasks(tmp_path):
        assert not killed.exists()
    assert [] == list(tmp_path.iterdir())


async def test_unusable_directory_fails_no_task(tmp_path: Path) -> None:
    """At worst, a worker starts for nothing."""
    (tmp_path / "file").touch()
    async with LaunchedTasks(tmp_path / "file") as launched:
        await launched.add(ONE)
        await launched.remove(ONE)
        assert frozenset() == await launched.of_others()
