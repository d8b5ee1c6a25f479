"""The system calls that an agent in a sandbox may not make, as a program for the kernel. Pure.

It denies what reaches parts of the kernel that no namespace separates, or that have often been attacked: keys, BPF, performance
counters, io_uring, modules, mounts, further namespaces, and sockets that are not of the network (such as vsock, which reaches
the host of a virtual machine). Docker's default profile denies the same: https://docs.docker.com/engine/security/seccomp/.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

# <linux/bpf_common.h>, <linux/seccomp.h>
_LOAD: Final = 0x20
_JUMP_EQUAL: Final = 0x15
_JUMP_GREATER_EQUAL: Final = 0x35
_JUMP_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06
_ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
_ERROR: Final = 0x00050000

# The offsets of the fields of `struct seccomp_data`: numbers are little-endian on both architectures.
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_FIRST_ARGUMENT: Final = 16
_SECOND_ARGUMENT: Final = 24

#: On x86-64, calls of the x32 ABI have this bit, and would pass a filter that only compares numbers.
_X32: Final = 0x40000000
#: `CLONE_NEW*` of <linux/sched.h>: new namespaces.
_NEW_NAMESPACES: Final = 0x7E020000
#: Writes to the input of a terminal.
_TERMINAL_INPUT: Final = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
#: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK.
_SOCKET_FAMILIES: Final = (1, 2, 10, 16)


class _Architecture(NamedTuple):
    audit: int  # <linux/audit.h>
    clone: int
    ioctl: int
    socket: int
    denied: tuple[int, ...]


# The same on both: io_uring, the newer calls for mounts.
_COMMON: Final = (425, 426, 427, 428, 429, 430, 431, 432, 433, 442)
_CLONE3: Final = 435

#: The numbers of the system calls, from <asm/unistd_64.h> and <asm-generic/unistd.h>. Denied are, in this order: acct, add_key,
#: bpf, chroot, clock_settime, delete_module, finit_module, init_module, kexec_file_load, kexec_load, keyctl, mount,
#: name_to_handle_at, open_by_handle_at, perf_event_open, pivot_root, quotactl, reboot, request_key, setns, settimeofday,
#: swapoff, swapon, syslog, umount2, unshare, userfaultfd.
_ARCHITECTURES: Final[Mapping[str, _Architecture]] = {
    "x86_64": _Architecture(
        audit=0xC000003E,
        clone=56,
        ioctl=16,
        socket=41,
        denied=(
            *(163, 248, 321, 161, 227, 176, 313, 175, 320, 246, 250, 165, 303, 304, 298, 155, 179, 169, 249, 308, 164),
            *(168, 167, 103, 166, 272, 323),
        ),
    ),
    "aarch64": _Architecture(
        audit=0xC00000B7,
        clone=220,
        ioctl=29,
        socket=198,
        denied=(
            *(89, 217, 280, 51, 112, 106, 273, 105, 294, 104, 219, 40, 264, 265, 241, 41, 60, 142, 218, 268, 170),
            *(225, 224, 116, 39, 97, 282),
        ),
    ),
}


def seccomp_filter(machine: str) -> bytes:
    """Return the filter as an array of `struct sock_filter`, for `bwrap --seccomp`.

    Args:
        machine: The architecture, as `platform.machine` names it.

    Raises:
        KeyError: The architecture is not supported.
    """
    architecture = _ARCHITECTURES[machine]
    denied = _return_error(errno.EPERM)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, architecture.audit, equal=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_GREATER_EQUAL, _X32, otherwise=1),
        _return_error(errno.ENOSYS),
        # The C library then falls back to clone, whose flags can be checked.
        _instruction(_JUMP_EQUAL, _CLONE3, otherwise=1),
        _return_error(errno.ENOSYS),
    ]
    for number in (*architecture.denied, *_COMMON):
        program += [_instruction(_JUMP_EQUAL, number, otherwise=1), denied]
    program += _if_call(
        architecture.clone,
        _FIRST_ARGUMENT,
        [_instruction(_JUMP_ANY_BIT, _NEW_NAMESPACES, otherwise=1), denied],
    )
    program += _if_call(
        architecture.ioctl,
        _SECOND_ARGUMENT,
        [part for request in _TERMINAL_INPUT for part in (_instruction(_JUMP_EQUAL, request, otherwise=1), denied)],
    )
    allowed = [
        part
        for family in _SOCKET_FAMILIES
        for part in (_instruction(_JUMP_EQUAL, family, otherwise=1), _instruction(_RETURN, _ALLOW))
    ]
    program += _if_call(architecture.socket, _FIRST_ARGUMENT, [*allowed, _return_error(errno.EAFNOSUPPORT)])
    return b"".join([*program, _instruction(_RETURN, _ALLOW)])


def _if_call(number: int, argument: int, checks: list[bytes]) -> list[bytes]:
    """Return the instructions that check an argument of a call, and allow the call if no check has returned."""
    body = [_instruction(_LOAD, argument), *checks, _instruction(_RETURN, _ALLOW)]
    return [_instruction(_JUMP_EQUAL, number, otherwise=len(body)), *body]


def _return_error(number: int) -> bytes:
    return _instruction(_RETURN, _ERROR | number)


def _instruction(code: int, value: int, *, equal: int = 0, otherwise: int = 0) -> bytes:
    """Return an instruction. `equal` and `otherwise` are how many instructions a jump skips."""
    return struct.pack("=HBBI", code, equal, otherwise, value)
