from __future__ import annotations

import os
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
