"""The text of a `.env`: each value is spelled so that those who read such files get it back to the last character. Pure.

Three readers count: a shell (`set -a; . ./.env`), dotenv of Node, and python-dotenv with its replacing of `${NAME}`. They
disagree about quotes and backslashes. What is said of them here is from the sources of dotenv 18 and python-dotenv 1.2.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from typing import Final

import attrs


class Reader(enum.Flag):
    """Who reads a `.env`."""

    SHELL = enum.auto()
    NODE = enum.auto()
    PYTHON = enum.auto()


#: Who must read a value back, the best first. Never without the shell, which would take another value, or run it.
_WANTED: Final = (Reader.SHELL | Reader.NODE | Reader.PYTHON, Reader.SHELL | Reader.NODE, Reader.SHELL | Reader.PYTHON)

#: Needs no quotes, which simpler readers would keep. No tilde: a shell takes it for a home folder.
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:@%+,=-]+")
#: What a shell does not take literally between double quotes. The two control characters are marks that bash itself uses there.
_SHELL_DOUBLE: Final = re.compile(r'[$`"]|\\(?=[\\\n\x01\x7f]|\Z)')
#: What the others do not take literally there of that which a shell does.
_NODE_DOUBLE: Final = re.compile(r"\\[nr]")
_PYTHON_DOUBLE: Final = re.compile(r"\\['abfnrtv]")
#: What python-dotenv does not take literally between single quotes of that which a shell does, besides `${NAME}`.
_PYTHON_SINGLE: Final = re.compile(r"\\\\|\\\Z")
#: A backslash takes their meaning from these in a shell, the latter two not so in python-dotenv.
_ESCAPED: Final = re.compile(r'[\\"$`]')
_ESCAPED_BY_SHELL_ALONE: Final = re.compile(r"[$`]")

#: Bash sets or watches these itself; some of them end its reading of the file.
_BASHS_OWN: Final = re.compile(
    r"BASH_(?!ENV\Z).*|BASHOPTS|BASHPID|COMP_WORDBREAKS|DIRSTACK|EPOCHREALTIME|EPOCHSECONDS|EUID|FUNCNAME|GROUPS|HISTCMD|LINENO"
    r"|OPTIND|PIPESTATUS|PPID|RANDOM|SECONDS|SHELLOPTS|SHLVL|SRANDOM|UID|_"
)

#: Ends what a stray quote above may have left open: whoever is still looking for its end finds one, and not at the end of a line.
_BOUNDARY: Final = "\n# Set for this task. What is open above ends here: 'x\n# \"x\n# `x\n"


@attrs.frozen(kw_only=True)
class Dotenv:
    """A `.env`.

    Args:
        content: Its bytes.
        left_out: Names of variables whose values no quotes spell for a shell and for one of the others; in the order given.
    """

    content: bytes = attrs.field(repr=False)
    left_out: tuple[str, ...] = ()


def spell(variables: Mapping[str, str]) -> Dotenv:
    """Spell variables so that a shell reads each back, and dotenv of Node and python-dotenv too, or at least one of them.

    Where not both can, Node's comes first. What a reader does not get right does it no harm: it finds every other variable.

    Args:
        variables: By names as POSIX has them; values without NUL.
    """
    lines, left_out = [], []
    for name, value in variables.items():
        spelled = _best(name, value)
        if spelled is None:
            left_out.append(name)
        else:
            lines.append(f"{name}={spelled}\n")
    return Dotenv(content="".join(lines).encode(), left_out=tuple(left_out))


def append(existing: bytes, variables: Mapping[str, str]) -> Dotenv:
    """Spell variables below the lines of another `.env`, which are kept: each reader takes the last of several.

    A variable that is left out has the value of the lines above, if they name it.
    """
    ours = spell(variables)
    if not existing or not ours.content:
        return attrs.evolve(ours, content=existing + ours.content)
    # A backslash at the end of the last line would join it to the next, which therefore is empty.
    end = b"" if existing.endswith(b"\n") else b"\n"
    return attrs.evolve(ours, content=existing + end + _BOUNDARY.encode() + ours.content)


def _best(name: str, value: str) -> str | None:
    if _BASHS_OWN.fullmatch(name):
        return None
    # To JavaScript that is no property like others.
    able = ~Reader.NODE if name == "__proto__" else ~Reader(0)
    found = [(text, readers & able) for text, readers in spellings(value)]
    return next((text for wanted in _WANTED for text, readers in found if wanted in readers), None)


def spellings(value: str) -> Iterator[tuple[str, Reader]]:
    """Yield the ways to spell a value for a shell, the plainest first, each with those who surely read it back."""
    if _PLAIN.fullmatch(value):
        yield value, Reader.SHELL | Reader.NODE | Reader.PYTHON
    # To the others a carriage return is the end of a line, in quotes too.
    others = Reader.NODE | Reader.PYTHON if "\r" not in value else Reader(0)
    if "'" not in value:
        python = Reader(0) if _PYTHON_SINGLE.search(value) or _may_be_replaced(value) else Reader.PYTHON
        yield _in_quotes("'", value), Reader.SHELL | others & (Reader.NODE | python)
    if not _SHELL_DOUBLE.search(value):
        node = Reader(0) if _NODE_DOUBLE.search(value) else Reader.NODE
        python = Reader(0) if _PYTHON_DOUBLE.search(value) else Reader.PYTHON
        yield _in_quotes('"', value), Reader.SHELL | others & (node | python)
    if _ESCAPED.search(value):
        python = Reader(0) if _ESCAPED_BY_SHELL_ALONE.search(value) else Reader.PYTHON
        yield _in_quotes('"', _ESCAPED.sub(r"\\\g<0>", value)), Reader.SHELL | others & python


def _may_be_replaced(value: str) -> bool:
    """Whether python-dotenv may find a `${NAME}`. It says yes too often, but in a time that does not grow with the square."""
    return 0 <= value.find("${") < value.rfind("}")


def _in_quotes(quote: str, text: str) -> str:
    # To others than a shell, a backslash may make the quote after it part of the value, which then goes on to the next quote,
    # in another line. So there is one in a comment: since it ends no line, they do not take it for the end of a value.
    guard = f" #{quote}x" if text.endswith("\\") else ""
    return f"{quote}{text}{quote}{guard}"
