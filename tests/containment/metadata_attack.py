"""Asks for the token of a metadata server in every spelling, from an agent without isolation and from one in a sandbox.

Runs in network and mount namespaces of its own, in which a stand-in has the addresses of the server. Prints, as JSON, the
spellings that succeeded for each agent.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from ccrun.egress import Egress
from ccrun.process.capture import capture
from ccrun.process.confinement import Confinement
from ccrun.process.sandbox import Sandbox, find_sandbox
from ccrun.worker.egress_proxy import PORT, EgressProxy, HostPolicy

CANARY: Final = "canary-token"
ADDRESSES: Final = ("169.254.169.254", "fd20:ce::254", "fd00:ec2::254")
NAMES: Final = ("metadata.google.internal", "metadata", "innocent.example")
SPELLINGS: Final = (
    *("169.254.169.254", "2852039166", "0xa9fea9fe", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376"),
    *("169.254.43518", "169.16689662", "0XA9FEA9FE", "169.254.0251.0xfe"),
    *(
        "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:a9fe]",
        "[0:0:0:0:0:ffff:a9fe:a9fe]",
        "[fd20:ce::254]",
        "[fd00:ec2::254]",
    ),
    *("metadata.google.internal", "METADATA.google.internal", "metadata", "innocent.example"),
)
#: Takes the spellings as arguments. curl reads some of them itself, so the last two requests are made without it.
_ATTACK: Final = r"""
ask() { timeout 20 "$@" 2>/dev/null | grep -q canary-token && echo "$spelling"; }
send() { exec 3<>"/dev/tcp/127.0.0.1/$PORT"; printf "$@" >&3; cat <&3; }
export -f send
for spelling; do
  ask curl -s --noproxy '*' "http://$spelling/token"
  if [ -n "$PORT" ]; then
    ask curl -s --noproxy none -x "http://127.0.0.1:$PORT" "http://$spelling/token"
    ask curl -s --noproxy none -p -x "http://127.0.0.1:$PORT" "http://$spelling/token"
    ask bash -c 'send "GET http://%s/token HTTP/1.1\r\nHost: x\r\n\r\n" "$1"' bash "$spelling"
    ask bash -c 'send "CONNECT %s:80 HTTP/1.1\r\n\r\nGET /token HTTP/1.0\r\n\r\n" "$1"' bash "$spelling"
  fi
done
true
"""


def prepare(hosts: Path) -> None:
    """Give the addresses to this namespace."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in ADDRESSES:
        subprocess.run(["ip", "address", "add", f"{address}/{128 if ':' in address else 32}", "dev", "lo"], check=True)
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"169.254.169.254 {name}\n" for name in NAMES))
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)


async def attack(directory: Path, confinement: Confinement) -> list[str]:
    """Return the spellings by which an agent got the token."""
    ran = await capture(
        ["bash", "-c", _ATTACK, "bash", *SPELLINGS],
        env={"PATH": os.environ["PATH"], "PORT": str(PORT) if confinement.servers else ""},
        cwd=directory,
        seconds=300,
        confinement=confinement,
    )
    assert ran.exit.ok, ran
    return sorted(set(ran.stdout.decode().split()))


async def main(directory: Path) -> None:
    """Do what the module says."""
    prepare(directory / "hosts")

    def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.0 200 OK\r\n\r\n{CANARY}".encode())
        writer.close()

    found = find_sandbox(path=os.environ["PATH"], programs=[], hidden=[], user=None)
    if not isinstance(found, Sandbox):
        print(json.dumps({"skipped": found}))
        return
    proxy = EgressProxy(HostPolicy(), Egress())
    async with await asyncio.start_server(answer, ADDRESSES, 80):
        sandbox = Confinement(sandbox=found, servers={PORT: proxy.serve}).within(directory)
        succeeded = {
            "none": await attack(directory, Confinement()),
            "sandbox": await attack(directory, sandbox),
        }
    print(json.dumps({**succeeded, "refused": list(proxy.refused)}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
