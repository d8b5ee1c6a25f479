"""The exit status of a process. Pure."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Exit:
    """The exit status of a process. `code` is that of a shell: 128 + n after signal n."""

    code: int
    signal: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the process was successful. One that a signal has killed never is."""
        return self.code == 0 and self.signal is None


def exit_from_returncode(returncode: int) -> Exit:
    """Return the exit status for a return code of `subprocess`, which is -n after signal n."""
    return Exit(code=returncode) if returncode >= 0 else Exit(code=128 - returncode, signal=-returncode)
