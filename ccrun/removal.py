"""Removing directories that hostile code may have built. Blocks; use it in a thread."""

from __future__ import annotations

import contextlib
import secrets
import stat
from pathlib import Path


def remove_tree(root: Path) -> None:
    """Remove a directory, as far as possible. What cannot be removed stays.

    Implemented here because `shutil.rmtree` fails for directories that are nested deeper than Python's recursion limit or that
    have no write permission. Here each directory gets the permissions and is moved to the root before it is emptied.
    """
    directories = [root]
    while directories:
        directory = directories.pop()
        with contextlib.suppress(OSError):
            directory.chmod(stat.S_IRWXU)
            for entry in list(directory.iterdir()):
                with contextlib.suppress(OSError):
                    if entry.is_symlink() or not entry.is_dir():
                        entry.unlink()
                    else:
                        entry.chmod(stat.S_IRWXU)
                        directories.append(entry.rename(root / f".{secrets.token_hex(8)}"))
            if directory != root:
                directory.rmdir()
    with contextlib.suppress(OSError):
        root.rmdir()
