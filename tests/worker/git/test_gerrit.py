"""Pushes for review, to a server that requires a `Change-Id` as Gerrit does."""

from __future__ import annotations

import re

import pytest
from helpers.git import git_setup
from helpers.push import CloneFactory, clones
from standins.gitssh import needs_ssh

from ccrun.worker.git.run import GitError

__all__ = ["clones", "git_setup"]
pytestmark = needs_ssh

#: A hook like the check of a Gerrit server, with its message.
REQUIRE_CHANGE_ID = """
while read -r old new ref; do
  for commit in $(git rev-list "$new" --not --branches); do
    git log -1 --format=%B "$commit" | grep -Eqx 'Change-Id: I[0-9a-f]{40}' ||
      { echo "error: commit $commit: missing Change-Id in message footer" >&2; exit 1; }
  done
done
"""


async def test_commits_become_reviews(clones: CloneFactory) -> None:
    """Each commit gets a `Change-Id` of its own, those with one keep it, and no branch moves."""
    setup = await clones.create({"a.txt": "old"})
    setup.repository.hook("pre-receive", REQUIRE_CHANGE_ID)
    for number, message in enumerate(
        ("First\n\nSigned-off-by: A <a@b>", f"Second\n\nChange-Id: I{'1' * 40}", "#3 fix")
    ):
        setup.write(a__txt=str(number))
        await setup.git("commit", "--quiet", "--all", "--cleanup=verbatim", "-m", message)
    pushed = await setup.push("refs/for/main")
    assert setup.cloned.base == await setup.repository.sha("main")
    reviews = [commit.message for commit in await setup.repository.log("refs/for/main")][:3]
    assert pushed.sha == await setup.repository.sha("refs/for/main")
    changes = [re.findall(r"^Change-Id: (I\w{40})$", message, re.MULTILINE) for message in reviews]
    assert [1, 1, 1] == [len(found) for found in changes]
    assert [f"I{'1' * 40}"] == changes[1]
    assert changes[0] != changes[2]
    assert reviews[0].startswith("#3 fix\n")
    assert "Signed-off-by: A <a@b>\nChange-Id:" in reviews[2]


async def test_review_is_not_rebased(clones: CloneFactory) -> None:
    """The branch may have moved: the server decides what to do about it."""
    setup = await clones.create({"a.txt": "old"})
    remote = await setup.repository.commit({"b.txt": "remote"})
    setup.write(a__txt="local")
    pushed = await setup.push("refs/for/main")
    assert (None, remote) == (pushed.recovery, await setup.repository.sha("main"))


async def test_rejected_review_has_the_message_of_the_server(clones: CloneFactory) -> None:
    """Its words are in the error."""
    setup = await clones.create({"a.txt": "old"})
    setup.repository.hook("pre-receive", 'echo "error: prohibited by Gerrit: not permitted: push" >&2; exit 1')
    setup.write(a__txt="local")
    with pytest.raises(GitError, match=r"rejected the push to refs/for/main: .*prohibited by Gerrit"):
        await setup.push("refs/for/main")
