"""Removes folders that somebody hostile may have built. Knows no tasks. Blocks: to be used in a thread."""

from __future__ import annotations

import contextlib
import secrets
import stat
from pathlib import Path


def remove_tree(root: Path) -> None:
    """Remove a folder whatever the agent did to it; what still cannot be removed stays, and nobody is kept waiting.

    By hand, since `shutil.rmtree` gives up at folders that are nested deeper than Python may recurse, or that the agent has
    locked: here each folder is unlocked and moved up to the root before it is emptied.
    """
    folders = [root]
    while folders:
        folder = folders.pop()
        with contextlib.suppress(OSError):
            folder.chmod(stat.S_IRWXU)
            for entry in list(folder.iterdir()):
                with contextlib.suppress(OSError):
                    if entry.is_symlink() or not entry.is_dir():
                        entry.unlink()
                    else:
                        entry.chmod(stat.S_IRWXU)
                        folders.append(entry.rename(root / f".{secrets.token_hex(8)}"))
            if folder != root:
                folder.rmdir()
    with contextlib.suppress(OSError):
        root.rmdir()
