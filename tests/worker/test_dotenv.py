from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs
import dotenv as python_dotenv
import pytest
from helpers.javascript import RECEIVERS, node_with_packages
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ccrun.worker.dotenv import Dotenv, render

#: The installed shells, each once: `sh` is often a link to one of the others.
SHELLS: Final = {
    " ".join(argv): argv
    for argv in (["sh"], ["bash"], ["bash", "--posix"], ["dash"])
    if (path := shutil.which(argv[0])) and (argv != ["dash"] or not Path(path).samefile(shutil.which("sh") or path))
}

PEM: Final = "-----BEGIN PRIVATE KEY-----\nMIIE/+==\n-----END PRIVATE KEY-----\n"
ACCOUNT: Final = json.dumps({"type": "service_account", "private_key": PEM, "client_email": "a@b.example"}, indent=2)

#: Pieces with a special meaning to one of the readers.
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

# It logs a warning for each line that it cannot parse. Some of these files have such lines.
logging.getLogger("dotenv.main").setLevel(logging.ERROR)

#: All examples of a test share one Node process and one file, which each example overwrites.
EXAMPLES: Final = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@attrs.frozen
class Readings:
    """The variables that each reader finds in one file."""

    shells: dict[str, dict[str, str]]
    node: list[dict[str, str]]
    python: dict[str, str | None]

    def all(self) -> list[Mapping[str, str | None]]:
        """Return the variables by reader, for all readers."""
        return [*self.shells.values(), *self.node, self.python]


Read = Callable[[bytes], Readings]


@pytest.fixture(scope="module")
def node() -> Iterator[Callable[[Path], list[dict[str, str]]]]:
    """Return a function that reads a file with Node's dotenv, in one process for all tests of the module."""
    script = [node_with_packages(), str(RECEIVERS / "read_dotenv.js")]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def read_by_node(path: Path) -> list[dict[str, str]]:
            stdin.write(json.dumps(str(path)).encode() + b"\n")
            stdin.flush()
            return [dict(entries) for entries in json.loads(stdout.readline())]

        yield read_by_node
        stdin.close()


@pytest.fixture
def read(node: Callable[[Path], list[dict[str, str]]], tmp_path: Path) -> Read:
    """Return a function that reads a file with every reader."""
    path = tmp_path / ".env"

    def read_by_all(content: bytes) -> Readings:
        path.write_bytes(content)
        return Readings(
            shells={name: read_by_shell(argv, path) for name, argv in SHELLS.items()},
            node=node(path),
            python=dict(python_dotenv.dotenv_values(path)),
        )

    return read_by_all


@pytest.fixture
def empty(read: Read) -> Readings:
    """Return what every reader finds in an empty file."""
    return read(b"")


def read_by_shell(argv: list[str], path: Path) -> dict[str, str]:
    """Return the environment of a shell after it has read a file."""
    env = shutil.which("env")
    assert env is not None
    script = f'set -a; . "$1"; exec {env} -0'
    # With a PATH: if a value were run as a command, the shell would find the program.
    result = subprocess.run(
        [*argv, "-c", script, "sh", path], env={"PATH": os.environ["PATH"]}, capture_output=True, check=False
    )
    return dict(entry.split("=", 1) for entry in result.stdout.decode().split("\0")[:-1])


def assert_read_back(readings: Readings, variables: Mapping[str, str], *, left_out: Iterable[str] = ()) -> None:
    """Assert that every reader returns the exact value of each variable that is not left out."""
    expected = {name: value for name, value in variables.items() if name not in left_out}
    for found in readings.all():
        assert expected == {name: found.get(name) for name in expected}


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
@example(value="\\\x01\x7f")
@example(value="$ {X}")
@example(value="\\${X")
def test_value_is_read_back_or_left_out(read: Read, value: str) -> None:
    """Every reader returns the exact value, or the variable is not in the file."""
    rendered = render({"A": value})
    if rendered.left_out:
        assert Dotenv(content=b"", left_out=("A",)) == rendered
    else:
        assert_read_back(read(rendered.content), {"A": value})


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
        'p$w0rd"`!\\x',
        PEM,
        ACCOUNT,
        "x" * 100_000,
        "it's " * 20_000,
    ],
)
def test_common_values_are_written(read: Read, value: str) -> None:
    """Keys, URLs, JSON, passwords, Windows paths and prose are written, and every reader returns them."""
    variables = {"A": value, "B": "after"}
    rendered = render(variables)
    assert () == rendered.left_out
    assert_read_back(read(rendered.content), variables)


@pytest.mark.parametrize(
    ("value", "content"), [("plain", b"A='plain'\n"), ('"$`', b"A='\"$`'\n"), ("it's", b'A="it\'s"\n'), ("", b"A=''\n")]
)
def test_values_are_quoted(value: str, content: bytes) -> None:
    """Single quotes are used where possible, double quotes otherwise."""
    assert Dotenv(content=content) == render({"A": value})


@pytest.mark.parametrize(
    "value",
    [
        "it's $5",
        "'`'",
        "${A}'",
        "a\rb",
        "line\r\n",
        "C:\\",
        "\\\\server\\share",
        "${NAME}",
        "it's \\d\\t",
        '{"a": "it\'s"}',
        "it's \\",
        "it's \\n",
        "it's \\r",
    ],
)
def test_value_that_one_reader_would_change_is_left_out(read: Read, value: str) -> None:
    """A value is not written if neither kind of quotes works for all readers; other variables are."""
    variables = {"Z": "\n", "A": value, "B": "# after", "C": "\n"}
    rendered = render(variables)
    assert Dotenv(content=b"Z='\n'\nB='# after'\nC='\n'\n", left_out=("A",)) == rendered
    assert_read_back(read(rendered.content), variables, left_out=["A"])


# --- several variables -----------------------------------------------------------------------------------------------


@EXAMPLES
@given(variables=VARIABLES)
@example(variables={"A": "\\", "B": "#", "C": "'"})
@example(variables={"A": "it's \\", "B": '# "', "C": "'\n"})
@example(variables={"A": "it's", "B": '# "', "C": "'\n"})
@example(variables={"A": "", "B": "", "C": "'"})
@example(variables={"__proto__": "a", "A": "b"})
def test_variables_do_not_affect_each_other(read: Read, variables: dict[str, str]) -> None:
    """A variable is written if it would be written alone, and every reader returns each of them."""
    rendered = render(variables)
    alone = [name for name, value in variables.items() if render({name: value}).left_out]
    assert tuple(alone) == rendered.left_out
    assert_read_back(read(rendered.content), variables, left_out=alone)


@EXAMPLES
@given(variables=VARIABLES)
def test_nothing_else_is_set(read: Read, empty: Readings, variables: dict[str, str]) -> None:
    """No reader finds a variable that was not given."""
    readings = read(render(variables).content)
    for shell, found in readings.shells.items():
        assert set() == set(found) - set(empty.shells[shell]) - set(variables)
    for names in (*map(set, readings.node), set(readings.python)):
        assert set() == names - set(variables)


@pytest.mark.parametrize(
    "name", ["A", "_x1", "PATH", "LANG", "LC_ALL", "IFS", "PS1", "PS4", "BASH_ENV", "ENV", "BASHFUL", "USER", "GID"]
)
def test_other_names_are_written(read: Read, name: str) -> None:
    """A variable may have a name with a meaning to the shell, as long as the shell permits its assignment."""
    path = os.environ["PATH"]
    variables = {name: path if name == "PATH" else "x y", "AFTER": "z"}
    rendered = render(variables)
    assert () == rendered.left_out
    assert_read_back(read(rendered.content), variables)


@pytest.mark.parametrize(
    "name",
    [
        *("UID", "EUID", "PPID", "SHELLOPTS", "BASH_VERSINFO", "RANDOM", "OPTIND", "HISTCMD", "GROUPS", "_", "SRANDOM"),
        "__proto__",
    ],
)
def test_reserved_names_are_left_out(name: str) -> None:
    """A variable that bash sets itself, or that is not an ordinary property in JavaScript, is left out."""
    assert Dotenv(content=b"", left_out=(name,)) == render({name: "x"})


def test_every_variable_of_bash_is_read_or_left_out(tmp_path: Path) -> None:
    """Shells read back every variable that bash sets itself, unless it is left out."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed, so its own variables cannot be listed")
    names = subprocess.run(
        [bash, "-c", "compgen -v"], env={}, capture_output=True, text=True, check=True
    ).stdout.split()
    path = tmp_path / ".env"
    values = {name: os.environ["PATH"] if name == "PATH" else "x" for name in names}
    rendered = render(values)
    path.write_bytes(rendered.content)
    for argv in SHELLS.values():
        found = read_by_shell(argv, path)
        assert {name: value for name, value in values.items() if name not in rendered.left_out}.items() <= found.items()


@pytest.mark.parametrize(
    "value", ["${" * 60_000, "${" * 60_000 + ":}", "\\" * 120_000, "'\\" * 60_000 + '"', "}" * 120_000 + "${"]
)
def test_long_values_are_rendered_fast(value: str) -> None:
    """The longest permitted values do not take quadratic time, which would be minutes, with any content."""
    started = time.thread_time()
    render({"A": value})
    assert time.thread_time() - started < 10


def test_repr_does_not_show_values() -> None:
    """The `repr` of the result does not have the content."""
    assert "secret" not in repr(render({"A": "secret"}))


# --- existing lines --------------------------------------------------------------------------------------------------


@EXAMPLES
@given(before=VARIABLES, appended=VARIABLES)
def test_appended_variables_override_existing_ones(
    read: Read, before: dict[str, str], appended: dict[str, str]
) -> None:
    """Every reader returns the appended variables, and the existing ones that they do not replace."""
    existing = render(before)
    combined = render(appended, existing=existing.content)
    assert combined.content.startswith(existing.content)
    assert render(appended).left_out == combined.left_out
    readings = read(combined.content)
    assert_read_back(readings, appended, left_out=combined.left_out)
    assert_read_back(readings, before, left_out={*existing.left_out, *appended})


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
@pytest.mark.parametrize("value", ["", "# 'x", "\n", '"', "x", "# \\", "# \\x", "`# x"])
def test_open_quotes_do_not_affect_appended_variables(read: Read, existing: bytes, value: str) -> None:
    """Every reader returns the appended variables, even if the existing lines leave a quote open."""
    appended = {"A": value, "B": value, "C": "it's"}
    combined = render(appended, existing=existing)
    assert combined.content.startswith(existing)
    assert (("A", "B") if value == "# \\" else ()) == combined.left_out
    readings = read(combined.content)
    if existing == b"K=`open":
        # In a shell, this is a command substitution up to the next backtick.
        readings = attrs.evolve(readings, shells={})
    assert_read_back(readings, appended, left_out=combined.left_out)


@pytest.mark.parametrize(("existing", "appended"), [(b"", {"A": "a"}), (b"K=v", {}), (b"", {}), (b"K=v", {"UID": "1"})])
def test_content_of_a_single_part_is_unchanged(existing: bytes, appended: dict[str, str]) -> None:
    """If there are no existing lines, or no variables to append, the content is that of the other part."""
    rendered = render(appended)
    assert attrs.evolve(rendered, content=existing + rendered.content) == render(appended, existing=existing)
