"""Differences between two trees, as git prints them."""

from __future__ import annotations

import os
from typing import Final

import attrs

#: The output that `parse_raw` parses, see git-diff-index(1).
RAW: Final = ("--raw", "--no-renames", "-z")
#: The modes of a submodule and of a missing path in that output.
GITLINK: Final = "160000"
MISSING: Final = "000000"


@attrs.frozen(kw_only=True)
class TreeChange:
    """A path that differs between two trees, with its modes and objects in both."""

    path: str
    old_mode: str
    mode: str
    old_blob: str
    blob: str

    @property
    def is_deleted(self) -> bool:
        """Whether it is missing from the new tree."""
        return self.mode == MISSING

    @property
    def is_link(self) -> bool:
        """Whether it is a submodule link, new or to another commit."""
        return self.mode == GITLINK

    @property
    def is_new_repository(self) -> bool:
        """Whether it is a new repository inside the repository, whose files cannot be committed."""
        return self.is_link and self.old_mode != GITLINK


def parse_raw(raw: bytes) -> list[TreeChange]:
    """Return the entries of a `--raw -z` output: `:mode mode blob blob status`, then the path. See git-diff-index(1)."""
    fields = os.fsdecode(raw).split("\0")
    entries = []
    for header, path in zip(fields[::2], fields[1::2], strict=False):
        old_mode, mode, old_blob, blob, _ = header.removeprefix(":").split(" ")
        entries.append(TreeChange(path=path, old_mode=old_mode, mode=mode, old_blob=old_blob, blob=blob))
    return entries
