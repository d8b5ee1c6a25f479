from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

import pytest

from ccrun.worker.git import known_hosts

#: The fingerprints that the hosts publish. The file has the URLs of the pages.
PUBLISHED: Final = {
    "github.com": {
        "ssh-ed25519": "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU",
        "ecdsa-sha2-nistp256": "SHA256:p2QAMXNIC1TJYWeIOttrVc98/R1BUFWu3/LiyKgUfQM",
        "ssh-rsa": "SHA256:uNiVztksCsDhcc0u9e8BujQXVUpKZIDTMczCvj3tD2s",
    },
    "gitlab.com": {
        "ssh-ed25519": "SHA256:eUXGGm1YGsMAS7vkcx6JOJdOGHPem5gQp4taiCfCLB8",
        "ecdsa-sha2-nistp256": "SHA256:HbW3g8zUjNSksFbqTiUWPWg2Bq1x8xdGUrliXFzSnUw",
        "ssh-rsa": "SHA256:ROQFvPThGrW4RuWLoL9tq9I9zJ42fK4XywyRtbOz/EQ",
    },
    "bitbucket.org": {
        "ssh-ed25519": "SHA256:ybgmFkzwOSotHTHLJgHO0QN8L0xErw6vd0VhFA9m3SM",
        "ecdsa-sha2-nistp256": "SHA256:FC73VB6C4OQLSCrjEayhMp9UMxS97caD/Yyi2bhW/J0",
        "ssh-rsa": "SHA256:46OSHA1Rmj8E8ERTC6xkNcmGOw9oFxYr0WF6zWW8l1E",
    },
}
#: Other names of these hosts, as known_hosts spells them.
ALIASES: Final = {
    "[ssh.github.com]:443": "github.com",
    "[altssh.gitlab.com]:443": "gitlab.com",
    "ssh.bitbucket.org": "bitbucket.org",
}


def entries() -> dict[str, dict[str, str]]:
    """Return the fingerprints in the file, by host name and key type."""
    found: dict[str, dict[str, str]] = {}
    for line in known_hosts.FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            names, kind, key = line.split(" ")
            digest = hashlib.sha256(base64.b64decode(key, validate=True)).digest()
            for name in names.split(","):
                assert kind not in found.setdefault(name, {})
                found[name][kind] = f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"
    return found


def test_keys_are_those_published_by_the_hosts() -> None:
    """Under each of its names, each host has the three published keys and no others."""
    assert PUBLISHED | {alias: PUBLISHED[name] for alias, name in ALIASES.items()} == entries()


def test_well_known_hosts_are_those_of_the_file() -> None:
    """`WELL_KNOWN` has the same names as the file."""
    assert known_hosts.WELL_KNOWN == {re.sub(r"^\[(.*)\]:\d+$", r"\1", name) for name in entries()}


@pytest.mark.parametrize("name", [*PUBLISHED, *ALIASES])
def test_openssh_finds_the_keys(name: str) -> None:
    """OpenSSH finds all keys of each name in the file."""
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        pytest.skip("ssh-keygen is not installed, so this cannot be tested with OpenSSH")
    found = subprocess.run(
        [keygen, "-l", "-F", name, "-f", known_hosts.FILE], capture_output=True, text=True, check=True
    )
    fingerprints = re.findall(r"SHA256:\S+", found.stdout)
    assert sorted(PUBLISHED[ALIASES.get(name, name)].values()) == sorted(fingerprints)


def test_file_is_part_of_the_package(tmp_path: Path) -> None:
    """The wheel contains the file."""
    root = Path(__file__).parents[3]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True, timeout=60)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert known_hosts.FILE.read_bytes() == archive.read("ccrun/worker/git/known_hosts")
