"""The text of a `.env` file that three kinds of readers read alike. Pure: it writes no file.

The readers are a POSIX shell or bash (`set -a; . ./.env`), Node's dotenv (18) and python-dotenv (1.2, with its expansion of
`${NAME}`). A variable is written in single quotes, in double quotes, or not at all. Either quoting guarantees that all three
readers return the exact value. Readers that expand variables further, such as dotenv-expand, are not covered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import attrs

#: Not exact in single quotes. `'` ends the value. Node turns a carriage return into a line feed. python-dotenv expands
#: `${NAME}`, reads two backslashes as one, and takes a backslash at the end as an escape of the closing quote.
_NOT_IN_SINGLE_QUOTES: Final = re.compile(r"['\r]|\$\{|\\\\|\\\Z")
#: Not exact in double quotes. Shells expand `$` and backticks. The readers disagree about what a backslash escapes.
_NOT_IN_DOUBLE_QUOTES: Final = re.compile(r'["\r$`\\]')

#: Names that cannot be written. Bash sets these variables itself, and an assignment to some of them stops its reading of the
#: file. In JavaScript, `__proto__` is no ordinary property.
_RESERVED_NAMES: Final = re.compile(
    r"BASH_(?!ENV\Z).*|BASHOPTS|BASHPID|COMP_WORDBREAKS|DIRSTACK|EPOCHREALTIME|EPOCHSECONDS|EUID|FUNCNAME|GROUPS|HISTCMD|LINENO"
    r"|OPTIND|PIPESTATUS|PPID|RANDOM|SECONDS|SHELLOPTS|SHLVL|SRANDOM|UID|_|__proto__"
)

#: Closes a quote that the lines above have left open. Each quote is in a comment, which other readers ignore. The `x` after it
#: stops Node's dotenv, which would otherwise take all lines up to the quote for a value. The empty line at the start ends a line
#: that a backslash continues.
_BOUNDARY: Final = b"\n# Set for this task. Closes a quote left open above: 'x\n# \"x\n# `x\n"


@attrs.frozen(kw_only=True)
class Dotenv:
    """The content of a `.env` file.

    Args:
        content: The bytes of the file.
        left_out: Names of the variables that are not in it, in the order given.
    """

    content: bytes = attrs.field(repr=False)
    left_out: tuple[str, ...] = ()


def render(variables: Mapping[str, str], *, existing: bytes = b"") -> Dotenv:
    """Return the `.env` that sets variables, after the lines of an existing one.

    Each reader uses the last line for a name. A variable that is left out keeps the value that the existing lines set.

    Args:
        variables: Values by POSIX names; values without NUL.
        existing: The content of another `.env`. It is kept unchanged.
    """
    quoted = {name: _quote(value) for name, value in variables.items() if not _RESERVED_NAMES.fullmatch(name)}
    lines = "".join(f"{name}={text}\n" for name, text in quoted.items() if text is not None).encode()
    if existing and lines:
        lines = (b"" if existing.endswith(b"\n") else b"\n") + _BOUNDARY + lines
    return Dotenv(content=existing + lines, left_out=tuple(name for name in variables if quoted.get(name) is None))


def _quote(value: str) -> str | None:
    """Return a value in the quotes in which all readers read it exactly; None if neither kind of quotes does."""
    if not _NOT_IN_SINGLE_QUOTES.search(value):
        return f"'{value}'"
    if not _NOT_IN_DOUBLE_QUOTES.search(value):
        return f'"{value}"'
    return None
