from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path

from ccrun.removal import remove_tree


def test_tree_is_removed_without_following_links(tmp_path: Path) -> None:
    """Directories without permissions are removed, and the targets of links are not."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    tree = tmp_path / "tree"
    (tree / "locked" / "inner").mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    (tree / "locked").chmod(0)
    remove_tree(tree)
    assert [False, True] == [tree.exists(), (outside / "file").exists()]


def test_tree_deeper_than_the_recursion_limit_is_removed(tmp_path: Path) -> None:
    """A deeply nested workspace can be removed."""
    tree = tmp_path / "tree"
    tree.mkdir()
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(tree)
        for _ in range(2000):
            Path("d").mkdir()
            os.chdir("d")
    finally:
        os.fchdir(before)
        os.close(before)
    remove_tree(tree)
    assert not tree.exists()


def test_removing_a_missing_tree_is_not_an_error(tmp_path: Path) -> None:
    """Removing a directory that does not exist does nothing."""
    remove_tree(tmp_path / "missing")


def test_link_in_place_of_the_tree_is_removed_itself(tmp_path: Path) -> None:
    """If the directory was replaced by a link, its target keeps its files and its permissions."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "file").touch()
    link = tmp_path / "tree"
    link.symlink_to(outside)
    remove_tree(link)
    assert [False, True] == [link.is_symlink(), (outside / "file").exists()]
    assert 0o755 == stat.S_IMODE(outside.stat().st_mode)


def test_directory_that_is_swapped_meanwhile_leads_nowhere(tmp_path: Path) -> None:
    """While another process replaces directories by links to one outside, that one keeps its files and its permissions."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "file").touch()
    stopped = threading.Event()

    def swap() -> None:
        number = 0
        while not stopped.is_set():
            with contextlib.suppress(OSError):
                directory = tmp_path / "tree" / f"d{number % 20}"
                directory.rename(tmp_path / f"aside-{number}")
                directory.symlink_to(outside, target_is_directory=True)
            number += 1

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for _ in range(60):
            for number in range(20):
                # Where the other thread has put a link, there is no directory.
                with contextlib.suppress(OSError):
                    (tmp_path / "tree" / f"d{number}" / "inner").mkdir(parents=True, exist_ok=True)
            remove_tree(tmp_path / "tree")
    finally:
        stopped.set()
        swapping.join()
    assert (outside / "file").exists()
    assert 0o755 == stat.S_IMODE(outside.stat().st_mode)
