"""What the return code of a process means. Pure."""

from __future__ import annotations

import attrs

# --- what an exit means ----------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Exit:
    """How a process ended. `code` is a shell's: 128 + n after signal n."""

    code: int
    signal: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the process says that it succeeded. One that a signal has killed never does."""
        return self.code == 0 and self.signal is None


def exit_from_returncode(returncode: int) -> Exit:
    """Return what a return code of the `subprocess` module means: it is -n after signal n."""
    return Exit(code=returncode) if returncode >= 0 else Exit(code=128 - returncode, signal=-returncode)
