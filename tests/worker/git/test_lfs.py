"""Repositories with files that are stored with Git LFS."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
from helpers.git import GitSetup, git_setup
from helpers.post_run import COMMIT_AND_PUSH, KEY
from helpers.worker import Agent, WorkerSetup, agent, separate_user, worker_setup
from standins.githttp import TOKEN, GitHttp
from standins.gitssh import GitSsh
from standins.lfs import LfsServer, needs_lfs, pointer
from standins.repos import Repository

from ccrun.process.user import User
from ccrun.spec import GitToken
from ccrun.task import Reason, Status, TaskRecord
from ccrun.worker.git import lfs

__all__ = ["agent", "git_setup", "separate_user", "worker_setup"]
pytestmark = needs_lfs

ATTRIBUTES = "*.bin filter=lfs diff=lfs merge=lfs -text\n"
OLD = b"old content\0"
#: With this, git does not read the file again: it is older than the index.
OLDER = "touch -d @1000000000 b.bin"


@attrs.frozen(kw_only=True)
class LfsSetup:
    """A repository with a file that is stored with Git LFS."""

    worker_setup: WorkerSetup
    repository: Repository
    server: GitHttp
    store: LfsServer
    user: User | None

    async def run(self, script: Any, **fields: Any) -> TaskRecord:
        """Run a task that pushes what the agent has done."""
        defaults = {
            "git_repo": self.server.url("demo"),
            "git_token": GitToken.parse(TOKEN),
            "post_execution_actions": COMMIT_AND_PUSH,
        }
        await self.worker_setup.submit(**{**defaults, **fields})
        return await self.worker_setup.run(cli=script, agent_user=self.user)

    async def files(self) -> dict[str, str]:
        """Return the files of the branch at the server."""
        return {path: content.decode() for path, content in (await self.repository.files()).items()}

    async def output(self) -> list[str]:
        """Return what the agent has printed."""
        return [str(line["content"]) for line in await self.worker_setup.log() if line["type"] == "text"]


@pytest.fixture
async def setup(worker_setup: WorkerSetup, git_setup: GitSetup, agent_user: User | None) -> AsyncIterator[LfsSetup]:
    """A repository with the files `.gitattributes`, `a.bin` and `a.txt`."""
    store = LfsServer()
    files = {".gitattributes": ATTRIBUTES, "a.bin": store.add(OLD), "a.txt": "old"}
    repository = await git_setup.repos.create("demo", files)
    async with GitHttp(git_setup.repos) as server:
        server.lfs = store
        yield LfsSetup(worker_setup=worker_setup, repository=repository, server=server, store=store, user=agent_user)


def errors(record: TaskRecord) -> list[str]:
    """Return the errors of the actions."""
    return [error.error for error in record.action_errors]


# --- pulling ---------------------------------------------------------------------------------------------------------


async def test_agent_has_the_contents(setup: LfsSetup, agent: Agent) -> None:
    """The files have their contents, and git of the agent shows no changes. Nothing is pushed then."""
    record = await setup.run(agent("wc -c <a.bin; git status --porcelain; git config lfs.url"))
    assert (Status.COMPLETED, [], ["12"]) == (record.status, errors(record), await setup.output())
    assert record.git_commit is not None
    assert (False, ["download"]) == (record.git_commit.pushed, setup.store.operations)


async def test_objects_come_over_ssh_too(
    worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent, setup: LfsSetup
) -> None:
    """The SSH server says where they are, and gives a credential for it."""
    credential = base64.b64encode(f"x:{TOKEN}".encode()).decode()
    async with GitSsh(git_setup.repos) as server:
        server.lfs = {
            "href": f"{setup.server.base}/demo.git/info/lfs",
            "header": {"Authorization": f"Basic {credential}"},
        }
        fields = {"git_repo": server.url("demo"), "git_token": None, "ssh_key": KEY}
        record = await setup.run(agent("wc -c <a.bin; echo new >b.bin"), **fields)
    assert ([], ["12"]) == (errors(record), await setup.output())
    assert (await setup.files())["b.bin"] == pointer(b"new\n")
    assert ["download", "upload"] == setup.store.operations


async def test_missing_object_is_an_error(setup: LfsSetup, agent: Agent) -> None:
    """The task does not start with a file that is not what the repository has. The error has the words of the server."""
    setup.store.objects.clear()
    record = await setup.run(agent("true"))
    assert Reason.PREPARE_FAILED == record.reason
    assert str(record.error).startswith("The files of Git LFS could not be downloaded: ")
    assert "Object does not exist on the server" in str(record.error)


async def test_repository_chooses_no_server(setup: LfsSetup, agent: Agent) -> None:
    """A `.lfsconfig` with another host gets no request; the files stay pointers, and the log says so."""
    other = setup.server.base_at("localhost")
    await setup.repository.commit({".lfsconfig": f"[lfs]\n\turl = {other}/evil/info/lfs\n"})
    record = await setup.run(agent("wc -c <a.bin"))
    assert (Status.COMPLETED, []) == (record.status, setup.store.operations)
    assert [str(len(pointer(OLD)))] == await setup.output()
    [line] = [line for line in await setup.worker_setup.log() if line.get("step") == "lfs"]
    assert (
        "The files of Git LFS are pointers, since .lfsconfig names another server, which is not asked."
        == line["content"]
    )


async def test_settings_of_the_repository_have_no_effect(setup: LfsSetup, agent: Agent) -> None:
    """Its `.lfsconfig` cannot leave files out, or send requests to another path of the host."""
    config = f"[lfs]\n\turl = {setup.server.base}/evil/info/lfs\n\tfetchexclude = *\n\tskipdownloaderrors = true\n"
    await setup.repository.commit({".lfsconfig": config})
    record = await setup.run(agent("wc -c <a.bin"))
    assert (Status.COMPLETED, ["12"]) == (record.status, await setup.output())
    assert not [request for request in setup.server.requests if "evil" in request.path]


# --- pushing ---------------------------------------------------------------------------------------------------------


async def test_new_and_changed_files_are_pushed_as_pointers(setup: LfsSetup, agent: Agent) -> None:
    """Their contents are uploaded before. Other files are not affected."""
    record = await setup.run(agent("echo new >b.bin; echo changed >a.bin; echo text >a.txt"))
    assert [] == errors(record)
    assert {
        ".gitattributes": ATTRIBUTES,
        "a.bin": pointer(b"changed\n"),
        "b.bin": pointer(b"new\n"),
        "a.txt": "text\n",
    } == await setup.files()
    assert {OLD, b"new\n", b"changed\n"} == set(setup.store.objects.values())


async def test_commit_of_the_agent_is_pushed(setup: LfsSetup, agent: Agent) -> None:
    """Its git has made pointers, and has the contents. A renamed file needs no upload."""
    script = "git mv a.bin moved.bin; echo new >b.bin; git add -A; git commit -qm Work"
    record = await setup.run(agent(script))
    assert [] == errors(record)
    files = await setup.files()
    assert (pointer(OLD), pointer(b"new\n")) == (files["moved.bin"], files["b.bin"])
    assert {OLD, b"new\n"} == set(setup.store.objects.values())


async def test_new_pattern_applies(setup: LfsSetup, agent: Agent) -> None:
    """A pattern that the agent has added makes pointers."""
    record = await setup.run(agent("echo '*.dat filter=lfs' >>.gitattributes; echo new >b.dat"))
    assert ([], pointer(b"new\n")) == (errors(record), (await setup.files())["b.dat"])


async def test_rejected_object_fails_the_push(setup: LfsSetup, agent: Agent) -> None:
    """No pointer is pushed whose object the server does not have. The content is in the patch."""
    setup.store.rejects = True
    record = await setup.run(agent("echo new >b.bin"))
    assert record.git_commit is not None
    assert (False, {".gitattributes", "a.bin", "a.txt"}) == (record.git_commit.pushed, set(await setup.files()))
    assert "The quota is exceeded." in errors(record)[0]
    assert ["rescue.patch"] == [file.original_path for file in record.uploaded_files or ()]


async def test_content_without_a_pointer_is_left_out(setup: LfsSetup, agent: Agent) -> None:
    """A file that the agent committed without git-lfs is not pushed; it is in the patch."""
    # Some systems have the filter in their own configuration.
    script = "export GIT_CONFIG_NOSYSTEM=1; git config --remove-section filter.lfs; echo raw >b.bin; echo text >a.txt"
    script += f"; {OLDER}; git add b.bin a.txt; git commit -qm Work"
    record = await setup.run(agent(script))
    assert ["b.bin, a file of Git LFS, was left out of the push, since it was committed without git-lfs."] == errors(
        record
    )
    files = await setup.files()
    assert ("text\n", False) == (files["a.txt"], "b.bin" in files)
    assert ["rescue.patch"] == [file.original_path for file in record.uploaded_files or ()]


async def test_pointer_without_an_object_is_left_out(setup: LfsSetup, agent: Agent) -> None:
    """The agent has written a pointer by hand, or its object is damaged."""
    text = pointer(b"nowhere").replace("\n", "\\n")
    record = await setup.run(agent(f"printf '{text}' >b.bin"))
    assert [
        "b.bin, a file of Git LFS, was left out of the push, since the object that its pointer names is missing."
    ] == errors(record)


async def test_damaged_object_is_not_uploaded(setup: LfsSetup, agent: Agent) -> None:
    """An object is what its name says."""
    damage = 'for file in $(find .git/lfs/objects -type f); do chmod u+w "$file"; echo bad >"$file"; done'
    record = await setup.run(agent(f"echo new >b.bin; {OLDER}; git add -A; git commit -qm Work; {damage}"))
    [error] = errors(record)
    assert "of Git LFS is damaged" in error
    assert {OLD} == set(setup.store.objects.values())


async def test_without_git_lfs_nothing_is_pushed_raw(
    setup: LfsSetup, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files stay pointers; a new or changed file under a pattern is left out, and in the patch."""
    monkeypatch.setattr(lfs, "is_installed", lambda path: False)
    record = await setup.run(agent("wc -c <a.bin; echo new >b.bin; echo changed >a.bin; echo text >a.txt"))
    assert [
        f"{path}, a file of Git LFS, was left out of the push, since git-lfs is not installed."
        for path in ("a.bin", "b.bin")
    ] == errors(record)
    assert {".gitattributes": ATTRIBUTES, "a.bin": pointer(OLD), "a.txt": "text\n"} == await setup.files()
    [file] = record.uploaded_files or ()
    assert "rescue.patch" == file.original_path
    [line] = [line for line in await setup.worker_setup.log() if line.get("step") == "lfs"]
    assert "The files of Git LFS are pointers, since git-lfs is not installed." == line["content"]


async def test_only_change_that_is_left_out_is_in_the_patch(
    setup: LfsSetup, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is nothing to commit, and the content is not lost."""
    monkeypatch.setattr(lfs, "is_installed", lambda path: False)
    record = await setup.run(agent("echo new >b.bin"))
    assert record.git_commit is not None
    assert (False, 1) == (record.git_commit.committed, len(errors(record)))
    assert ["rescue.patch"] == [file.original_path for file in record.uploaded_files or ()]
