"""Removing directories that hostile code may have built, and may still change. Blocks; use it in a thread."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: Opens a directory, but no symbolic link to one, even where it may not be read.
_LOCATE: Final = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


def remove_tree(root: Path) -> None:
    """Remove a directory, as far as possible. What cannot be removed stays. A symbolic link is removed itself.

    Implemented here because `shutil.rmtree` fails for directories that are nested deeper than Python's recursion limit or that
    have no write permission. Here each directory gets the permissions and is moved to the root before it is emptied. All is
    done by descriptors, so that nothing outside is touched when another process replaces a directory by a link meanwhile.
    """
    with contextlib.suppress(OSError), _opened(os.open(root.parent, os.O_DIRECTORY | os.O_CLOEXEC)) as parent:
        try:
            with _directory(root.name, parent) as top:
                found = _clear(top, top)
                while found:
                    name = found.pop()
                    with contextlib.suppress(OSError):
                        with _directory(name, top) as directory:
                            found += _clear(directory, top)
                        os.rmdir(name, dir_fd=top)
            os.rmdir(root.name, dir_fd=parent)
        except NotADirectoryError:
            os.unlink(root.name, dir_fd=parent)


def _clear(directory: int, top: int) -> list[str]:
    """Remove all files of a directory, and move its directories to `top`. Return their new names."""
    moved = []
    with os.scandir(directory) as entries:
        found = list(entries)
    for entry in found:
        with contextlib.suppress(OSError):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=directory)
                continue
            # Moving a directory changes it, so it must be writable.
            with _directory(entry.name, directory):
                name = f".{secrets.token_hex(8)}"
                os.rename(entry.name, name, src_dir_fd=directory, dst_dir_fd=top)
                moved.append(name)
    return moved


@contextlib.contextmanager
def _directory(name: str, parent: int) -> Iterator[int]:
    """Open a directory of another one and give this user all permissions on it.

    Raises:
        NotADirectoryError: It is no directory, or a symbolic link.
    """
    try:
        located = os.open(name, _LOCATE, dir_fd=parent)
    except OSError as error:
        # A symbolic link is ELOOP on some systems.
        raise NotADirectoryError(error.errno, error.strerror) from None
    with _opened(located):
        if hasattr(os, "O_PATH"):
            # Leads to the open directory, also if it has been renamed.
            path = f"/proc/self/fd/{located}"
            os.chmod(path, stat.S_IRWXU)  # noqa: PTH101
            with _opened(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
                yield directory
        else:
            os.fchmod(located, stat.S_IRWXU)
            yield located


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
