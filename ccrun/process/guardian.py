"""A process that kills what its child has left, even when the child was killed and nothing else of ccrun runs.

On Linux, processes whose parent has exited become children of the nearest ancestor that is a subreaper. Neither a new session
nor a cleared environment changes that.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final

from ccrun.process import linux, tree

#: The signals that stop a worker. A process that starts it knows only its parent.
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def run_guarded(work: Callable[[], int]) -> int:
    """Run `work` in a child of this process, and afterwards kill all descendants of that child that still run.

    Signals to stop are forwarded to the child. Only for a process without threads. On other systems than Linux, and if the kernel
    does not list the children of a process, `work` runs in this process.

    Returns:
        What `work` returned; 128 and the number of the signal when the child was killed.
    """
    if sys.platform != "linux" or not tree.lists_children():
        return work()
    # With all objects in one old generation, a collection in the child does not copy the memory that both share.
    gc.freeze()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        linux.become_subreaper()
        return work()
    linux.become_subreaper()

    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in _STOP_SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    # WNOWAIT: a child that is not reaped keeps its ID, so that no signal is forwarded to another process.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tree.kill_orphans(())
    return code if code >= 0 else 128 - code
