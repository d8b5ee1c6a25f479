"""Pushes to a Gerrit server: each commit becomes a review, which its `Change-Id` identifies.

https://gerrit-review.googlesource.com/Documentation/user-changeid.html
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from ccrun.worker.git.run import Git, GitError

#: Where a Gerrit server takes commits for review.
REVIEW_PREFIX: Final = "refs/for/"
#: Commits in one push. A Gerrit server rejects large pushes.
MAX_REVIEWS: Final = 200

_CHANGE_ID: Final = re.compile(rb"^Change-Id: I[0-9a-f]{40}$", re.MULTILINE)
_HEADER: Final = re.compile(rb"^(?:tree|parent|author|committer|encoding) ")


async def with_change_ids(git: Git, commit: str, base: str | None) -> str:
    """Return the commit after each commit since the base has got a `Change-Id`, unless it has one.

    Authors, committers and the rest of the messages stay as they are; signatures, which would no longer be valid, are removed.

    Raises:
        GitError: There are more than `MAX_REVIEWS` commits.
    """
    beyond = ("--not", base) if base else ()
    listed = await git("rev-list", "--reverse", "--topo-order", f"--max-count={MAX_REVIEWS + 1}", commit, *beyond)
    commits = listed.decode().split()
    if len(commits) > MAX_REVIEWS:
        raise GitError(f"The agent made more than {MAX_REVIEWS} commits, which are too many for reviews.")
    # A line that starts with # is part of the message. No message has lines that start with this character.
    trailers = git.at(git.cwd, "core.commentChar=\x01")
    rewritten: dict[bytes, bytes] = {}
    for each in commits:
        headers, _, message = (await git("cat-file", "commit", each)).partition(b"\n\n")
        lines = [line for line in headers.split(b"\n") if _HEADER.match(line)]
        parents = [line for line in lines if line.startswith(b"parent ")]
        if _CHANGE_ID.search(message) and not any(parent[7:] in rewritten for parent in parents):
            continue
        lines = [b"parent " + rewritten.get(line[7:], line[7:]) if line in parents else line for line in lines]
        if not _CHANGE_ID.search(message):
            change = hashlib.sha1(headers + message, usedforsecurity=False).hexdigest()
            message = message if message.endswith(b"\n") else message + b"\n"
            message = await trailers(
                "interpret-trailers", "--no-divider", f"--trailer=Change-Id: I{change}", stdin=message
            )
        content = b"\n".join(lines) + b"\n\n" + message
        made = await git("hash-object", "-t", "commit", "-w", "--stdin", stdin=content)
        rewritten[each.encode()] = made.strip()
    return rewritten.get(commit.encode(), commit.encode()).decode()
