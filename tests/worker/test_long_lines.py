"""Lines of output that are longer than the limit."""

from __future__ import annotations

from helpers.worker import PRELUDE, RESULT, FakeCli, WorkerSetup, worker_setup

from ccrun.process.child import PIPE_READ_BYTES
from ccrun.task import Secret, Status

__all__ = ["worker_setup"]


async def test_long_line_is_cut_in_the_log(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """Its beginning is logged with the number of omitted bytes, the lines around it are whole, and the task goes on."""
    limit = PIPE_READ_BYTES
    await worker_setup.submit(environment_secrets={"A": Secret("secret-word")})
    script = f"""
say(type="x", n=1)
say(type="x", text=os.environ["A"] + "x" * {20 * limit})
say(type="x", n=2)
result()
"""
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script), max_line_bytes=limit)
    assert Status.COMPLETED is record.status
    first, cut, second, last = await worker_setup.log()
    assert [{"type": "x", "n": 1}, {"type": "x", "n": 2}, RESULT] == [first, second, last]
    beginning = '{"type":"x","text":"secret-word'
    whole = len(beginning) + 20 * limit + len('"}')
    assert ("text", whole - limit) == (cut["type"], cut["omittedBytes"])
    assert '{"type":"x","text":"***' + "x" * (limit - len(beginning)) == cut["content"]


async def test_long_line_of_a_command_is_cut_in_the_log(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """The output of a command before the agent has the same limit."""
    limit = PIPE_READ_BYTES
    await worker_setup.submit(pre_execution_commands=(f"head -c {3 * limit} /dev/zero | tr '\\0' x",))
    await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"), max_line_bytes=limit)
    (line,) = [line for line in await worker_setup.log() if line.get("event") == "output"]
    assert (limit, 2 * limit) == (len(line["content"]), line["omittedBytes"])
