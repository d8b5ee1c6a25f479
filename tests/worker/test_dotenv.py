from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs
import dotenv as python_dotenv
import pytest
from helpers.javascript import RECEIVERS, node_with_packages
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ccrun.worker.dotenv import Dotenv, Reader, append, spell, spellings

#: The shells that are here, each once: `sh` is often one of the others.
SHELLS: Final = {
    " ".join(argv): argv
    for argv in (["sh"], ["bash"], ["bash", "--posix"], ["dash"])
    if (path := shutil.which(argv[0])) and (argv != ["dash"] or not Path(path).samefile(shutil.which("sh") or path))
}
ALL: Final = Reader.SHELL | Reader.NODE | Reader.PYTHON

PEM: Final = "-----BEGIN PRIVATE KEY-----\nMIIE/+==\n-----END PRIVATE KEY-----\n"
ACCOUNT: Final = json.dumps({"type": "service_account", "private_key": PEM, "client_email": "a@b.example"}, indent=2)

#: Pieces that mean something to one of the readers.
WORDS: Final = r"""
    ' " ` \ \\ # = $ ${X} ${X:-y} $X $$ $( ` ) \n \r \t \' \" \$ \` { } ~ ~/ : :~ ; & | < > * ? ! !! [ ] ( % ^ - --
    export X= X=' X=" é € 😀 a b 0
"""
BLANKS: Final = " \t\n\r\x01\x02\x0b\x0c\x1c\x7f\x81\x85\xa0\u2028\u2029\ufeff"
PIECES: Final = st.sampled_from([*WORDS.split(), *BLANKS, "\r\n", " #", "export X=", "$(echo no)", "`echo no`"])
TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
VALUES: Final = st.lists(PIECES | TEXTS, max_size=7).map("".join)
NAMES: Final = st.sampled_from(
    ["A", "B", "C", "X", "export", "if", "_a", "__proto__", "constructor", "toString", "a1", "IFS", "PS4"]
)
VARIABLES: Final = st.dictionaries(NAMES, VALUES, max_size=5)

# What it cannot parse it warns of, and some of these files are of that kind.
logging.getLogger("dotenv.main").setLevel(logging.ERROR)

#: Fixtures of a module live as long as the module, and a folder a test is overwritten by each example.
EXAMPLES: Final = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@attrs.frozen
class Readings:
    """What the readers make of one file."""

    shells: dict[str, dict[str, str]]
    node: list[dict[str, str]]
    python: dict[str, str | None]

    def who(self, name: str, value: str, expected: Reader = ALL) -> Reader:
        """Return which readers give a variable that very value, of those that are expected to where that is not known."""
        found = Reader(0)
        if all(read.get(name) == value for read in self.shells.values()):
            found |= Reader.SHELL
        if all(read.get(name) == value for read in self.node):
            found |= Reader.NODE
        if self.python.get(name) == value:
            found |= Reader.PYTHON
        # What looks like a variable to be replaced, but is none, python-dotenv leaves alone.
        return found & (expected | Reader.SHELL | Reader.NODE) if "${" in value else found


Read = Callable[[bytes], Readings]


@pytest.fixture(scope="module")
def node() -> Iterator[Callable[[Path], list[dict[str, str]]]]:
    """Return what reads a file by Node's dotenv, in one process that lives as long as the module's tests."""
    script = [node_with_packages(), str(RECEIVERS / "read_dotenv.js")]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(path: Path) -> list[dict[str, str]]:
            stdin.write(json.dumps(str(path)).encode() + b"\n")
            stdin.flush()
            return [dict(entries) for entries in json.loads(stdout.readline())]

        yield ask
        stdin.close()


@pytest.fixture
def read(node: Callable[[Path], list[dict[str, str]]], tmp_path: Path) -> Read:
    """Return what lets every reader read a file."""
    path = tmp_path / ".env"

    def ask(content: bytes) -> Readings:
        path.write_bytes(content)
        return Readings(
            shells={name: by_shell(argv, path) for name, argv in SHELLS.items()},
            node=node(path),
            python=dict(python_dotenv.dotenv_values(path)),
        )

    return ask


def by_shell(argv: list[str], path: Path) -> dict[str, str]:
    """Return the environment that a shell has after it has read a file."""
    env = shutil.which("env")
    assert env is not None
    script = f'set -a; . "$1"; exec {env} -0'
    # A program to run by mistake would be found.
    result = subprocess.run(
        [*argv, "-c", script, "sh", path], env={"PATH": os.environ["PATH"]}, capture_output=True, check=False
    )
    return dict(entry.split("=", 1) for entry in result.stdout.decode().split("\0")[:-1])


def who(name: str, value: str) -> Reader:
    """Return who reads a variable back as it is spelled, as far as that is known."""
    text = spell({name: value}).content.decode().removeprefix(f"{name}=").removesuffix("\n")
    readers = dict(spellings(value))[text]
    return readers & ~Reader.NODE if name == "__proto__" else readers


def read_back(read: Read, spelled: Dotenv, variables: Mapping[str, str]) -> dict[str, Reader]:
    """Return who reads each variable back that is not left out."""
    readings = read(spelled.content)
    return {
        name: readings.who(name, value, who(name, value))
        for name, value in variables.items()
        if name not in spelled.left_out
    }


# --- one value -------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(value=VALUES)
@example(value="")
@example(value="\\")
@example(value="a\\\\")
@example(value="it's \\")
@example(value="it's \\d")
@example(value="it's \\n")
@example(value="it's \\t")
@example(value='"it\'s"\\')
@example(value="a\r\nb")
@example(value="${X}'")
@example(value="~")
@example(value="a:~b")
@example(value="it's \\\x7f~")
@example(value="it's \\\x01\x7f")
def test_readers_are_known(read: Read, value: str) -> None:
    """Of each spelling it is known who reads it back, and a shell always does."""
    for text, readers in spellings(value):
        assert Reader.SHELL in readers
        assert readers == read(f"A={text}\n".encode()).who("A", value, readers), text


@pytest.mark.parametrize(
    "value",
    [
        "",
        "plain",
        "two words",
        "  blanks around\t",
        "#no comment",
        "a # b",
        "a=b",
        "https://example.com/?a=1&b=2#c",
        "postgres://user:p%40ss@host:5432/db?sslmode=require",
        "dGVzdA==",
        "$HOME $(id) `id` $1 $$",
        'say "hello"',
        "it's",
        "it's\ntwo lines",
        "C:\\new\\table",
        "a\\nb",
        "glob*?[x] {a,b} ~ ; | & < > !",
        "ünïcödé 😀 \u2028",
        "export A=b",
        PEM,
        ACCOUNT,
        "x" * 100_000,
        "it's " * 20_000,
    ],
)
def test_all_three_read_what_real_life_has(read: Read, value: str) -> None:
    """Keys, URLs, JSON and prose are read back by all three."""
    variables = {"A": value, "B": "after"}
    assert {"A": ALL, "B": ALL} == read_back(read, spell(variables), variables)


@pytest.mark.parametrize(
    ("value", "readers"),
    [
        ("C:\\", Reader.SHELL | Reader.NODE),
        ("\\\\server\\share", Reader.SHELL | Reader.NODE),
        ("${NAME}", Reader.SHELL | Reader.NODE),
        ("it's \\d\\t", Reader.SHELL | Reader.NODE),
        ('{"a": "it\'s"}', Reader.SHELL | Reader.PYTHON),
        ("it's \\", Reader.SHELL | Reader.PYTHON),
        ("it's \\n", Reader.SHELL | Reader.PYTHON),
        ("it's \\r", Reader.SHELL | Reader.PYTHON),
    ],
)
def test_two_read_what_three_cannot(read: Read, value: str, readers: Reader) -> None:
    """What no spelling makes all three read is read by a shell and Node, or else by a shell and Python."""
    variables = {"A": value, "B": "# after", "C": "\n"}
    assert {"A": readers, "B": ALL, "C": ALL} == read_back(read, spell(variables), variables)


def test_one_name_is_none_to_node(read: Read) -> None:
    """What Node cannot have by its name is spelled for a shell and Python."""
    variables = {"__proto__": "C:\\", "A": "C:\\"}
    assert {"__proto__": Reader.SHELL | Reader.PYTHON, "A": Reader.SHELL | Reader.NODE} == read_back(
        read, spell(variables), variables
    )


@pytest.mark.parametrize("value", ["it's $5", "'`'", "${A}'", "a\rb", "line\r\n"])
def test_what_only_a_shell_could_read_is_left_out(value: str) -> None:
    """A value that neither of the two others would read is not written, but named."""
    assert Dotenv(content=b"B=b\n", left_out=("A",)) == spell({"A": value, "B": "b"})


# --- several ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(variables=VARIABLES)
@example(variables={"A": "\\", "B": "#", "C": "'"})
@example(variables={"A": "it's \\", "B": '# "', "C": "'\n"})
@example(variables={"A": "", "B": "", "C": "'"})
@example(variables={"__proto__": "a", "A": "b"})
def test_nobody_takes_one_for_another(read: Read, variables: dict[str, str]) -> None:
    """Whoever reads a variable right alone reads it right among others: none spoils its neighbours."""
    spelled = spell(variables)
    together = read_back(read, spelled, variables)
    assert {name: who(name, value) for name, value in variables.items() if name in together} == together
    assert tuple(name for name in variables if name not in together) == spelled.left_out
    assert all(Reader.SHELL in readers and readers != Reader.SHELL for readers in together.values())


@EXAMPLES
@given(variables=VARIABLES)
def test_nothing_else_is_set(read: Read, variables: dict[str, str]) -> None:
    """Whatever the values hold, no reader finds a variable that was not given."""
    readings = read(spell(variables).content)
    empty = read(b"")
    for shell, found in readings.shells.items():
        assert set() == set(found) - set(empty.shells[shell]) - set(variables)
    for names in (*map(set, readings.node), set(readings.python)):
        assert set() == names - set(variables)


@pytest.mark.parametrize(
    "name", ["A", "_x1", "PATH", "LANG", "LC_ALL", "IFS", "PS1", "PS4", "BASH_ENV", "ENV", "BASHFUL", "USER", "GID"]
)
def test_names_are_free(read: Read, name: str) -> None:
    """A variable may have any name that a shell leaves alone, also one that means something to it."""
    path = os.environ["PATH"]
    variables = {name: path if name == "PATH" else "x y", "AFTER": "z"}
    assert {name: ALL, "AFTER": ALL} == read_back(read, spell(variables), variables)


@pytest.mark.parametrize(
    "name",
    ["UID", "EUID", "PPID", "SHELLOPTS", "BASH_VERSINFO", "RANDOM", "OPTIND", "HISTCMD", "GROUPS", "_", "SRANDOM"],
)
def test_names_of_the_shell_are_left_out(name: str) -> None:
    """A variable that a shell keeps for itself, and would not read or even stop at, is left out."""
    assert Dotenv(content=b"", left_out=(name,)) == spell({name: "x"})


def test_every_variable_of_bash_is_read_or_left_out(tmp_path: Path) -> None:
    """Of the variables that bash itself has, those that are not left out are read back."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed: its own variables cannot be seen")
    names = subprocess.run(
        [bash, "-c", "compgen -v"], env={}, capture_output=True, text=True, check=True
    ).stdout.split()
    path = tmp_path / ".env"
    values = {name: os.environ["PATH"] if name == "PATH" else "x" for name in names}
    spelled = spell(values)
    path.write_bytes(spelled.content)
    for argv in SHELLS.values():
        found = by_shell(argv, path)
        assert {name: value for name, value in values.items() if name not in spelled.left_out}.items() <= found.items()


@pytest.mark.parametrize(
    "value", ["${" * 60_000, "${" * 60_000 + ":}", "\\" * 120_000, "'\\" * 60_000 + '"', "}" * 120_000 + "${"]
)
def test_long_values_take_no_time(value: str) -> None:
    """A value as long as they may be is spelled at once, whatever it holds."""
    started = time.perf_counter()
    spell({"A": value})
    assert time.perf_counter() - started < 1


def test_values_do_not_show() -> None:
    """The bytes are not part of what is printed of the object."""
    assert "secret" not in repr(spell({"A": "secret"}))


# --- after other lines -----------------------------------------------------------------------------------------------


@EXAMPLES
@given(before=VARIABLES, ours=VARIABLES)
def test_ours_win(read: Read, before: dict[str, str], ours: dict[str, str]) -> None:
    """Below other lines each variable is read as if it stood alone, and what it does not name is read as before."""
    above = spell(before)
    both = append(above.content, ours)
    assert both.content.startswith(above.content)
    assert spell(ours).left_out == both.left_out
    readings = read(both.content)
    for name, value in ours.items():
        if name not in both.left_out:
            assert who(name, value) == readings.who(name, value, who(name, value))
    for name, value in before.items():
        if name not in ours and name not in above.left_out:
            assert who(name, value) == readings.who(name, value, who(name, value))


@pytest.mark.parametrize(
    "existing",
    [
        *(
            b"K=v",
            b"K=v\n",
            b"K=v\r\n",
            b"# comment",
            b"K=v\\",
            b"K=",
            b"K=\n",
            b"export K=v # 'comment'\n",
            b"K: v\n",
            b"K",
        ),
        *(
            b"K='open",
            b'K="open',
            b"K=`open",
            b"K='open\n",
            b'K="open\n',
            b"K=it's",
            b'K=5"',
            b"'",
            b'"',
            b"K='a\\'",
            b'K="a\\"',
        ),
    ],
)
@pytest.mark.parametrize("value", ["", "# 'x", "\n", '"', "x", "# \\", "`# x"])
def test_stray_lines_above_take_nothing(read: Read, existing: bytes, value: str) -> None:
    """Whatever stands above, even a quote that nobody closed, the variables are read as if they stood alone."""
    ours = {"A": value, "B": value, "C": "it's"}
    both = append(existing, ours)
    assert both.content.startswith(existing)
    readings = read(both.content)
    if existing == b"K=`open":
        # To a shell that is the start of a command, up to wherever there is another.
        readings = attrs.evolve(readings, shells={})
    known = {name: who(name, text) for name, text in ours.items()}
    assert known == {name: readings.who(name, text) for name, text in ours.items()}


@pytest.mark.parametrize(("existing", "ours"), [(b"", {"A": "a"}), (b"K=v", {}), (b"", {}), (b"K=v", {"UID": "1"})])
def test_nothing_is_added_to_nothing(existing: bytes, ours: dict[str, str]) -> None:
    """A file that is empty, or to which nothing comes, is what there is."""
    assert attrs.evolve(spell(ours), content=existing + spell(ours).content) == append(existing, ours)
