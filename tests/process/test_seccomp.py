"""The filter of system calls, interpreted as the kernel does."""

from __future__ import annotations

import errno
import struct

import pytest

from ccrun.process.seccomp import seccomp_filter

X86, ARM = 0xC000003E, 0xC00000B7
ALLOWED = "allowed"
KILLED = "killed"
#: System calls by architecture: x86-64, aarch64.
MACHINES = ("x86_64", "aarch64")
AUDIT = {"x86_64": X86, "aarch64": ARM}


def verdict(machine: str, number: int, *arguments: int, audit: int | None = None) -> str:
    """Run the filter on a call, as the kernel's interpreter of BPF does, for the instructions that filters here have."""
    data = struct.pack("<IIQ6Q", number, audit or AUDIT[machine], 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    program = list(struct.iter_unpack("=HBBI", seccomp_filter(machine)))
    loaded = position = 0
    while True:
        code, equal, otherwise, value = program[position]
        position += 1
        match code:
            case 0x20:
                loaded = int.from_bytes(data[value : value + 4], "little")
            case 0x15 | 0x35 | 0x45:
                holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
                position += equal if holds else otherwise
            case 0x06:
                if value == 0x7FFF0000:
                    return ALLOWED
                return KILLED if value == 0x80000000 else errno.errorcode[value & 0xFFFF]
            case _:
                raise AssertionError(code)


@pytest.mark.parametrize(
    ("name", "x86_64", "aarch64"),
    [
        ("add_key", 248, 217),
        ("bpf", 321, 280),
        ("init_module", 175, 105),
        ("io_uring_setup", 425, 425),
        ("kexec_load", 246, 104),
        ("keyctl", 250, 219),
        ("mount", 165, 40),
        ("open_by_handle_at", 304, 265),
        ("perf_event_open", 298, 241),
        ("setns", 308, 268),
        ("umount2", 166, 39),
        ("unshare", 272, 97),
        ("userfaultfd", 323, 282),
    ],
)
def test_call_is_denied(name: str, x86_64: int, aarch64: int) -> None:
    """The call fails with EPERM, on both architectures."""
    assert ["EPERM", "EPERM"] == [verdict("x86_64", x86_64), verdict("aarch64", aarch64)], name


@pytest.mark.parametrize(
    ("name", "x86_64", "aarch64"),
    [("read", 0, 63), ("openat", 257, 56), ("execve", 59, 221), ("ptrace", 101, 117), ("kill", 62, 129)],
)
def test_call_is_allowed(name: str, x86_64: int, aarch64: int) -> None:
    """What programs and debuggers need is allowed."""
    assert [ALLOWED, ALLOWED] == [verdict("x86_64", x86_64), verdict("aarch64", aarch64)], name


@pytest.mark.parametrize(("machine", "clone"), [("x86_64", 56), ("aarch64", 220)])
def test_process_gets_no_new_namespace(machine: str, clone: int) -> None:
    """A process may be created, but not with new namespaces. clone3, whose flags are in memory, does not exist."""
    assert ALLOWED == verdict(machine, clone, 0x11)  # SIGCHLD
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert "EPERM" == verdict(machine, clone, flag | 0x11), hex(flag)
    assert "ENOSYS" == verdict(machine, 435)


@pytest.mark.parametrize(("machine", "ioctl"), [("x86_64", 16), ("aarch64", 29)])
def test_terminal_gets_no_input(machine: str, ioctl: int) -> None:
    """TIOCSTI and TIOCLINUX are denied, also with other upper bits, which the kernel ignores; TIOCGWINSZ is allowed."""
    assert ["EPERM", "EPERM"] == [verdict(machine, ioctl, 0, 0x5412), verdict(machine, ioctl, 0, 0x541C)]
    assert "EPERM" == verdict(machine, ioctl, 0, 1 << 32 | 0x5412)
    assert ALLOWED == verdict(machine, ioctl, 0, 0x5413)


@pytest.mark.parametrize(("machine", "socket"), [("x86_64", 41), ("aarch64", 198)])
def test_sockets_are_of_the_network(machine: str, socket: int) -> None:
    """Unix, IPv4, IPv6 and netlink sockets are allowed; vsock, AF_ALG and AF_PACKET are not."""
    assert [ALLOWED] * 4 == [verdict(machine, socket, family) for family in (1, 2, 10, 16)]
    assert ["EAFNOSUPPORT"] * 3 == [verdict(machine, socket, family) for family in (40, 38, 17)]


def test_other_abi_is_refused() -> None:
    """A call in the numbering of another ABI is never compared with these numbers: i386, and x32 on x86-64."""
    assert KILLED == verdict("x86_64", 26, audit=0x40000003)
    assert "ENOSYS" == verdict("x86_64", 0x40000000 | 59)


def test_unknown_architecture_is_an_error() -> None:
    """There is no filter that denies nothing."""
    with pytest.raises(KeyError):
        seccomp_filter("riscv64")
