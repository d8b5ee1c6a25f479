from __future__ import annotations

import os
from pathlib import Path

from ccrun.removal import remove_tree


def test_locked_folders_and_links_are_removed_without_touching_what_links_lead_to(tmp_path: Path) -> None:
    """What the agent locked goes all the same; what lies outside stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    tree = tmp_path / "tree"
    (tree / "locked" / "inner").mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    (tree / "locked").chmod(0)
    remove_tree(tree)
    assert [False, True] == [tree.exists(), (outside / "kept").exists()]


def test_a_tree_deeper_than_python_may_recurse_is_removed(tmp_path: Path) -> None:
    """An agent that nests folders without end cannot keep its workspace on the disk."""
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


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    """Whoever comes second finds nothing to do."""
    remove_tree(tmp_path / "gone")
