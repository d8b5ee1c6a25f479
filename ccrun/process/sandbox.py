"""A sandbox for the processes of an agent, by bubblewrap: its own files, processes, users and network.

In it there are the programs of the system, read-only; the directory of the task; and nothing else: no home, no data directory,
no other task, no service. Its processes have no capabilities, and end with it. Its network is a loopback of its own, on which
the worker listens. See https://github.com/containers/bubblewrap and namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from ccrun.process import sandbox_init
from ccrun.process.seccomp import seccomp_filter
from ccrun.process.user import User

#: What every program may need: the directories of the system's programs, their libraries and their configuration.
SYSTEM_DIRECTORIES: Final = tuple(
    Path(name)
    for name in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix/store")
)
#: Bytes of /tmp in the sandbox, which is in memory. TMPDIR is a directory of the task.
TMP_BYTES: Final = 1024**3
#: Seconds for the trial of a sandbox. It takes a twentieth of a second.
TRIAL_SECONDS: Final = 20.0
#: Bytes of the first line of a script that the kernel reads (`BINPRM_BUF_SIZE`).
MAX_SHEBANG_BYTES: Final = 256
#: Characters of an error of bubblewrap that are quoted.
MAX_REASON_CHARS: Final = 200

#: Each kind of namespace, explicitly: as root without all capabilities, bubblewrap fails without one for users.
_NAMESPACES: Final = (
    "--unshare-user",
    "--unshare-pid",
    "--unshare-net",
    "--unshare-ipc",
    "--unshare-uts",
    "--unshare-cgroup-try",
)


@attrs.frozen(kw_only=True)
class Sandbox:
    """How processes are started in a sandbox. Created by `find_sandbox`.

    Args:
        bwrap: The program.
        env: The program env(1), which makes a program ignore a signal.
        python: A Python that the agent's user can run, for `init`.
        init: The source of `sandbox_init`, whose file that user may be unable to read.
        system: The options that show the directories of the system.
        filter: The filter of system calls.
        readable: What is visible besides the directories of the system.
        hidden: Directories inside visible ones that are empty in the sandbox.
        writable: The directory of the task.
    """

    bwrap: Path
    env: Path
    python: Path
    init: str = attrs.field(repr=False)
    system: tuple[str, ...]
    filter: bytes = attrs.field(repr=False)
    readable: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()
    writable: Path | None = None

    @property
    def ignores_sigterm(self) -> tuple[str, ...]:
        """The start of a command that ignores SIGTERM, at which bubblewrap would end with everything in the sandbox."""
        return (str(self.env), "--ignore-signal=TERM")

    def argv(self, argv: Sequence[str], *, cwd: Path, filter_file: int) -> list[str]:
        """Return the command that runs `argv` in a new sandbox.

        Args:
            cwd: The working directory. It must be visible.
            filter_file: An open file with `filter`, which the command inherits.
        """
        return [
            str(self.bwrap),
            *_NAMESPACES,
            "--die-with-parent",
            *("--cap-drop", "ALL"),
            *("--seccomp", str(filter_file)),
            *self.system,
            *("--dev", "/dev"),
            *("--proc", "/proc"),
            *("--size", str(TMP_BYTES), "--tmpfs", "/tmp"),  # noqa: S108 - that of the sandbox
            *_options("--ro-bind", self.readable),
            *_options("--tmpfs", self.hidden, has_source=False),
            *_options("--bind", () if self.writable is None else (self.writable,)),
            *("--remount-ro", "/"),
            *("--chdir", str(cwd)),
            "--",
            *argv,
        ]

    def serving_argv(self, argv: Sequence[str], *, control: int, ports: Iterable[int]) -> list[str]:
        """Return the command that, in the sandbox, gives away listeners on `ports` and then runs `argv`.

        Args:
            control: The descriptor of a Unix socket, which the command inherits and on which it sends the listeners.
            ports: At least one port.
        """
        numbers = ",".join(map(str, ports))
        return [str(self.python), "-I", "-S", "-c", self.init, str(control), numbers, *argv]


def find_sandbox(*, path: str, programs: Iterable[Path], hidden: Iterable[Path], user: User | None) -> Sandbox | str:
    """Return the sandbox of this machine after a trial, or a sentence that says why there is none. Blocks.

    Args:
        path: The PATH of the agent, whose programs are visible.
        programs: More programs that are visible.
        hidden: Directories that must not be visible.
        user: The user of the agent's processes.
    """
    bwrap, env = shutil.which("bwrap"), shutil.which("env")
    if sys.platform != "linux" or bwrap is None or env is None:
        return "bubblewrap (the program bwrap) is not installed."
    try:
        program = seccomp_filter(platform.machine())
    except KeyError:
        return f"There is no filter of system calls for {platform.machine()}."
    secret = sorted({directory.resolve() for directory in hidden if directory.is_dir()})
    readable = _readable(path, programs, secret)
    if user is not None:
        readable = _readable_by(user, readable)
    visible = (*SYSTEM_DIRECTORIES, *readable)
    sandbox = Sandbox(
        bwrap=Path(bwrap).absolute(),
        env=Path(env).absolute(),
        python=Path(sys.executable).resolve(),
        init=Path(sandbox_init.__file__).read_text(encoding="utf-8"),
        system=tuple(_system_mounts()),
        filter=program,
        readable=readable,
        hidden=tuple(entry for entry in secret if any(entry.is_relative_to(directory) for directory in visible)),
    )
    reason = _trial(sandbox, user)
    if reason is not None and (python := shutil.which("python3", path=os.defpath)) is not None:
        # That of ccrun may be in the home of a user.
        sandbox = attrs.evolve(sandbox, python=Path(python))
        reason = _trial(sandbox, user)
    return reason or sandbox


def _trial(sandbox: Sandbox, user: User | None) -> str | None:
    """Return why the sandbox does not work, None if it does."""
    with open_filter(sandbox.filter) as filter_file:
        command = [str(sandbox.python), "-I", "-S", "-c", ""]
        command = sandbox.argv(command, cwd=Path("/"), filter_file=filter_file)
        command = [*sandbox.ignores_sigterm, *(command if user is None else user.argv(command))]
        try:
            ran = subprocess.run(
                command,
                env={"PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                pass_fds=[filter_file],
                timeout=TRIAL_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"bubblewrap does not work here: {type(error).__name__}."
    if ran.returncode == 0:
        return None
    message = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {ran.returncode}"
    return f"bubblewrap does not work here: {message.removeprefix('bwrap: ')[:MAX_REASON_CHARS]}"


@contextlib.contextmanager
def open_filter(content: bytes) -> Iterator[int]:
    """Yield the descriptor of a file in memory with a filter, at its start, for a program that inherits it."""
    if sys.platform != "linux":
        raise NotImplementedError
    descriptor = os.memfd_create("ccrun-seccomp")
    try:
        # Writing to memory never blocks.
        os.set_blocking(descriptor, False)
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _system_mounts() -> Iterator[str]:
    for directory in SYSTEM_DIRECTORIES:
        if directory.is_symlink():
            # On most systems, /bin is a link to usr/bin.
            yield from ("--symlink", str(directory.readlink()), str(directory))
        elif directory.is_dir():
            yield from ("--ro-bind", str(directory), str(directory))


def _options(option: str, paths: Iterable[Path], *, has_source: bool = True) -> Iterator[str]:
    for path in paths:
        yield from (option, str(path), str(path)) if has_source else (option, str(path))


def _readable(path: str, programs: Iterable[Path], hidden: Sequence[Path]) -> tuple[Path, ...]:
    """Return what must be visible besides the system, parents first: Python of ccrun, the programs, the directories of `path`."""
    found = {Path(sys.prefix), Path(sys.base_prefix)}
    directories = [Path(name) for name in path.split(os.pathsep)]
    for program in programs:
        found |= {program, *_program_files(program)}
        if interpreter := _interpreter(program):
            directories.append(interpreter.parent)
    for directory in directories:
        if directory.is_absolute() and directory.is_dir():
            found.add(
                directory.parent if directory.name == "bin" and _is_prefix(directory.parent, hidden) else directory
            )
    wanted = {entry.resolve() for entry in found} | found
    # Not the hidden directories themselves, which may be on a PATH by mistake.
    return tuple(sorted(entry for entry in wanted if entry.exists() and not _is_visible(entry) and entry not in hidden))


def _is_prefix(directory: Path, hidden: Sequence[Path]) -> bool:
    """Return whether a directory holds one installation, as that of Node does, whose programs in `bin` need all of it.

    What stands directly in the root or in a hidden directory is none, such as `.cargo` in a home: credentials may be in it.
    """
    above = directory.parent.resolve()
    return (
        above != above.parent and above not in hidden and not any(entry.is_relative_to(directory) for entry in hidden)
    )


def _readable_by(user: User, paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return those of the paths that a user can read. bubblewrap, which is run by that user, fails with the others."""
    script = 'for path; do if [ -r "$path" ]; then printf "%s\\0" "$path"; fi; done'
    command = user.argv(["sh", "-c", script, "sh", *map(str, paths)])
    ran = subprocess.run(command, env={"PATH": os.defpath}, capture_output=True, check=False, timeout=TRIAL_SECONDS)
    return tuple(Path(os.fsdecode(name)) for name in ran.stdout.split(b"\0") if name)


def _program_files(program: Path) -> Iterator[Path]:
    """Yield the file of a program, and the directory of a package of Node that it belongs to."""
    file = program.resolve()
    yield file
    if (file.parent / "package.json").is_file():
        yield file.parent


def _interpreter(program: Path) -> Path | None:
    """Return the interpreter of a script, None if the file is none. See execve(2)."""
    with contextlib.suppress(OSError), program.open("rb") as file:
        first = file.read(MAX_SHEBANG_BYTES).partition(b"\n")[0]
        if first.startswith(b"#!") and (words := first[2:].split()):
            return Path(os.fsdecode(words[0]))
    return None


def _is_visible(path: Path) -> bool:
    return any(path.is_relative_to(directory) for directory in SYSTEM_DIRECTORIES)
