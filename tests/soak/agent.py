"""A fake Claude CLI that prints numbered lines, and stores outside of the workspace how many it has printed.

The prompt is a `Plan` as JSON. Each start creates a file in the directory `Plan.oracle`, in which the agent counts its lines.
The script stands alone: it is copied behind a line that starts Python.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from typing import Final, NotRequired, TypedDict

#: Lines whose printing has begun, and lines that were printed: two numbers of eight bytes.
COUNTS: Final = struct.Struct("<qq")
#: Seconds for which background processes run: longer than any soak.
BACKGROUND_SECONDS: Final = 86_400


class Plan(TypedDict):
    """What an agent does."""

    #: Names the task.
    key: str
    #: The directory of the counts, which also has `orphan`, a link to sleep(1).
    oracle: str
    #: Lines before the result.
    lines: int
    #: Lines of one write to the pipe.
    batch: int
    #: Seconds from the start of one write to the start of the next one.
    interval: float
    #: Characters that are added to each line.
    padding: int
    #: Whether the agent continues to print after SIGTERM.
    ignores_sigterm: bool
    #: Whether the agent exits with status 1 and without a result.
    fails: bool
    #: Background processes, and how they detach: `no`, `session` (setsid) or `environment` (setsid, without a variable).
    background: int
    detaches: str
    #: Whether background processes keep the pipe of the agent open.
    keeps_pipe: NotRequired[bool]


def line(plan: Plan, number: int) -> bytes:
    """Return a line of the output, from 1 to `printed_lines`, with its newline."""
    if number > plan["lines"]:
        fields = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": "Done."}
        return json.dumps({**fields, "n": number}, separators=(",", ":")).encode() + b"\n"
    # Without `json`, whose time would limit how fast lines can be printed.
    return f'{{"type":"soak","key":"{plan["key"]}","n":{number},"padding":"{"x" * plan["padding"]}"}}\n'.encode()


def printed_lines(plan: Plan) -> int:
    """Return how many lines the agent prints if nothing stops it."""
    return plan["lines"] + (not plan["fails"])


def _write(content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(1, view) :]


def _start_background(plan: Plan) -> None:
    output = None if plan.get("keeps_pipe") else subprocess.DEVNULL
    for _ in range(plan["background"]):
        subprocess.Popen(
            [f"{plan['oracle']}/orphan", str(BACKGROUND_SECONDS)],
            env={} if plan["detaches"] == "environment" else None,
            start_new_session=plan["detaches"] != "no",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def main() -> int:
    """Print what the plan says."""
    plan: Plan = json.loads(sys.stdin.buffer.read())
    if plan["ignores_sigterm"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    counts = os.open(f"{plan['oracle']}/{plan['key']}.{time.time_ns()}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.pwrite(counts, COUNTS.pack(0, 0), 0)
    with open("file-of-the-agent", "w") as file:  # noqa: PTH123 - starts faster without pathlib
        file.write("A part of the workspace.")
    _start_background(plan)
    printed, due = 0, time.monotonic()
    while printed < printed_lines(plan):
        begun = min(printed + plan["batch"], printed_lines(plan))
        content = b"".join(line(plan, number) for number in range(printed + 1, begun + 1))
        os.pwrite(counts, COUNTS.pack(begun, printed), 0)
        _write(content)
        os.pwrite(counts, COUNTS.pack(begun, begun), 0)
        printed, due = begun, due + plan["interval"]
        time.sleep(max(0.0, due - time.monotonic()))
    return int(plan["fails"])


if __name__ == "__main__":
    sys.exit(main())
