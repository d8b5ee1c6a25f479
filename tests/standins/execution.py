"""An execution of a Cloud Run job: a local process."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Final

import psutil
from google.cloud import run_v2

PROJECT: Final = "test-project"
REGION: Final = "us-central1"
JOB: Final = "claude-code-job"

#: What the message of the condition `Completed` contains, depending on why an execution failed.
EXITED: Final = "The container exited with an error."
OUT_OF_MEMORY: Final = "The configured memory limit was reached."
TIMED_OUT: Final = "The configured timeout was reached."

State = run_v2.Condition.State
ExecutionReason = run_v2.Condition.ExecutionReason


class Execution:
    """An execution of the job, which has one container. Here this is a process."""

    def __init__(self, name: str, overrides: Mapping[str, str]) -> None:
        self.name = name
        #: The variables that the request added to the job's environment.
        self.overrides = dict(overrides)
        #: Set to cancel the execution.
        self.cancelled = asyncio.Event()
        self.finished = asyncio.Event()
        #: None if the container never ran.
        self.exit_code: int | None = None
        #: What the message of the condition says about a failure.
        self.fault = EXITED
        self._process: asyncio.subprocess.Process | None = None
        self._created_at = dt.datetime.now(dt.UTC)
        self._started_at: dt.datetime | None = None
        self._finished_at: dt.datetime | None = None
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - Lives as long as the execution.

    @property
    def short_name(self) -> str:
        """The name without that of the job. It is also in the container's environment, as `CLOUD_RUN_EXECUTION`."""
        return self.name.rpartition("/")[2]

    @property
    def output(self) -> str:
        """The output of the container so far."""
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace")

    async def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        launch_seconds: float,
        task_timeout_seconds: float,
        term_grace_seconds: float,
    ) -> None:
        """Run the container, and stop it when it is cancelled or times out."""
        cancelled = asyncio.create_task(self.cancelled.wait())
        # The files of a container are removed with it.
        disk = await asyncio.to_thread(tempfile.mkdtemp)
        try:
            await asyncio.wait({cancelled}, timeout=launch_seconds)
            if not cancelled.done():
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    env={**environment, "TMPDIR": disk},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                )
                self._started_at = dt.datetime.now(dt.UTC)
                exited = asyncio.create_task(self._process.wait())
                await asyncio.wait(
                    {exited, cancelled}, timeout=task_timeout_seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if not exited.done():
                    self.fault = TIMED_OUT
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._process.pid, signal.SIGTERM)
                    await asyncio.wait({exited}, timeout=term_grace_seconds)
                    self.kill()
                self.exit_code = await exited
        finally:
            cancelled.cancel()
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, disk, ignore_errors=True))
            self._finished_at = dt.datetime.now(dt.UTC)
            self.finished.set()

    def kill(self) -> None:
        """Kill all processes of the container."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            container = psutil.Process(self._process.pid)
            for process in (container, *container.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def close(self) -> None:
        """Discard the output."""
        self._output.close()

    def message(self) -> run_v2.Execution:
        """Return the API's description of this execution."""
        is_finished = self.finished.is_set()
        has_failed = is_finished and self.exit_code != 0
        variables = [run_v2.EnvVar(name=name, value=value) for name, value in self.overrides.items()]
        return run_v2.Execution(
            name=self.name,
            job=self.name.partition("/executions/")[0].rpartition("/")[2],
            create_time=self._created_at,
            start_time=self._started_at,
            completion_time=self._finished_at,
            template=run_v2.TaskTemplate(containers=[run_v2.Container(env=variables)]),
            task_count=1,
            parallelism=1,
            running_count=int(self._started_at is not None and not is_finished),
            succeeded_count=int(is_finished and not has_failed),
            failed_count=int(has_failed and not self.cancelled.is_set()),
            cancelled_count=int(has_failed and self.cancelled.is_set()),
            conditions=[self._completed(is_finished=is_finished, has_failed=has_failed)],
        )

    def _completed(self, *, is_finished: bool, has_failed: bool) -> run_v2.Condition:
        if not is_finished:
            return run_v2.Condition(type_="Completed", state=State.CONDITION_RECONCILING)
        if not has_failed:
            text = "Execution completed successfully."
            return run_v2.Condition(type_="Completed", state=State.CONDITION_SUCCEEDED, message=text)
        if self.cancelled.is_set():
            reason, text = ExecutionReason.CANCELLED, "The execution was cancelled."
        else:
            reason = ExecutionReason.NON_ZERO_EXIT_CODE
            text = f"Task {self.short_name}-task0 failed with message: {self.fault}"
        return run_v2.Condition(type_="Completed", state=State.CONDITION_FAILED, execution_reason=reason, message=text)
