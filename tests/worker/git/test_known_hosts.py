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

#: As the hosts publish them, on the pages that the file names.
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
    """Return the fingerprints of the file by name and kind of key."""
    found: dict[str, dict[str, str]] = {}
    for line in known_hosts.FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            names, kind, key = line.split(" ")
            digest = hashlib.sha256(base64.b64decode(key, validate=True)).digest()
            for name in names.split(","):
                assert kind not in found.setdefault(name, {})
                found[name][kind] = f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"
    return found


def test_keys_are_those_that_the_hosts_publish() -> None:
    """Each host has the three keys whose fingerprints it publishes, under each of its names, and no other."""
    assert PUBLISHED | {alias: PUBLISHED[name] for alias, name in ALIASES.items()} == entries()


def test_names_are_those_of_the_file() -> None:
    """Every host that is said to be well known has its keys in the file, and the other way round."""
    assert known_hosts.WELL_KNOWN == {re.sub(r"^\[(.*)\]:\d+$", r"\1", name) for name in entries()}


@pytest.mark.parametrize("name", [*PUBLISHED, *ALIASES])
def test_openssh_finds_them(name: str) -> None:
    """OpenSSH reads the file and finds each name with all of its keys."""
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        pytest.skip("ssh-keygen is not installed: whether OpenSSH reads the file cannot be seen")
    found = subprocess.run(
        [keygen, "-l", "-F", name, "-f", known_hosts.FILE], capture_output=True, text=True, check=True
    )
    fingerprints = re.findall(r"SHA256:\S+", found.stdout)
    assert sorted(PUBLISHED[ALIASES.get(name, name)].values()) == sorted(fingerprints)


def test_file_is_part_of_the_package(tmp_path: Path) -> None:
    """Whoever installs ccrun from a wheel has the file."""
    root = Path(__file__).parents[3]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True, timeout=60)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        assert known_hosts.FILE.read_bytes() == packed.read("ccrun/worker/git/known_hosts")
