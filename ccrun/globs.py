"""Matching paths of a directory against glob patterns. Pure: it never reads the disk.

The syntax is that of wcmatch with GLOBSTAR, DOTGLOB, BRACE, NEGATE, NEGATEALL and CASE. wcmatch expands braces and translates
single path segments. Segments are matched here one by one, because wcmatch translates a whole pattern to one regular expression,
whose time multiplies with each `**` (six of them against a path of 60 directories took 38 s); and because a pattern that names a
directory here means everything below it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import attrs
import bracex
from wcmatch import fnmatch

from ccrun.errors import CcrunError

#: Patterns after brace expansion: the limit of wcmatch.
MAX_PATTERNS: Final = 1000
#: Characters of all patterns after brace expansion. Each pattern is matched against each path.
MAX_PATTERN_CHARS: Final = 256 * 1024
#: Opening braces in one pattern. Parsing hundreds of nested ones takes seconds.
MAX_BRACES: Final = 32

_FLAGS: Final = fnmatch.DOTMATCH | fnmatch.CASE | fnmatch.FORCEUNIX
#: A wildcard that is not escaped by a backslash.
_MAGIC: Final = re.compile(r"(?:[^\\*?\[]|\\.)*+[*?\[]", re.DOTALL)


class BadPattern(CcrunError):
    """A pattern is invalid. The message follows the name of the pattern: `may have at most …`."""


def expand(pattern: str) -> list[str]:
    """Return the patterns that a pattern with braces expands to.

    Raises:
        BadPattern: It has too many braces, or expands to too many patterns.
    """
    if "{" not in pattern:
        return [pattern]
    if pattern.count("{") > MAX_BRACES:
        raise BadPattern(f"may have at most {MAX_BRACES} opening braces")
    try:
        return bracex.expand(pattern, keep_escapes=True, limit=MAX_PATTERNS)
    except bracex.ExpansionLimitException:
        raise BadPattern(f"may stand for at most {MAX_PATTERNS} patterns") from None
    except (RecursionError, ValueError):
        raise BadPattern("has braces that cannot be read") from None


def check_amount(expanded: Sequence[str]) -> None:
    """Check the number and the total length of patterns.

    Raises:
        BadPattern: There are too many, or they are too long.
    """
    if len(expanded) > MAX_PATTERNS or sum(map(len, expanded)) > MAX_PATTERN_CHARS:
        raise BadPattern(
            f"may stand for at most {MAX_PATTERNS} patterns of {MAX_PATTERN_CHARS} characters in all, braces expanded"
        )


# --- one pattern -----------------------------------------------------------------------------------------------------


class _Segment:
    """The part of a pattern between two slashes: a name or a pattern for names, compiled on first use."""

    __slots__ = ("_matches", "_text", "name")

    def __init__(self, text: str) -> None:
        self._text = text
        self._matches: Callable[[str], object] | None = None
        #: The only name that it matches, None if it has wildcards.
        self.name = None if _MAGIC.match(text) else re.sub(r"\\(.?)", r"\1", text, flags=re.DOTALL)

    def matches(self, name: str) -> bool:
        if self.name is not None:
            return name == self.name
        if self._matches is None:
            # Its stars do not backtrack (`(?>…)`), so that the time is linear in pattern times name.
            ((expression,), _) = fnmatch.translate(self._text, flags=_FLAGS)
            self._matches = re.compile(expression).fullmatch
        return self._matches(name) is not None


@attrs.frozen(eq=False)
class _Pattern:
    """A pattern without braces. A segment of None is `**`: any number of directories. It is never the last segment."""

    segments: tuple[_Segment | None, ...]
    takes_away: bool
    #: Whether it matches files, and whether it matches everything below directories.
    file: bool
    folder: bool
    #: Whether it has no wildcards.
    is_plain: bool


def _read(text: str, known: dict[str, _Segment]) -> _Pattern | None:
    """Return the parsed pattern, None for one that matches nothing."""
    takes_away = text.startswith("!")
    text = text.removeprefix("!")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not text:
        return None
    segments: list[_Segment | None] = []
    for part in parts:
        if part != "**":
            segments.append(known.setdefault(part, _Segment(part)))
        elif segments[-1:] != [None]:
            segments.append(None)
    whole_folder = not segments or segments[-1] is None or text.endswith(("/", "/."))
    while segments[-1:] == [None]:
        segments.pop()
    last = segments[-1] if segments else None
    return _Pattern(
        segments=tuple(segments),
        takes_away=takes_away,
        file=not whole_folder,
        folder=whole_folder or (last is not None and last.name is not None),
        is_plain=all(segment is not None and segment.name is not None for segment in segments),
    )


# --- all patterns ----------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Reach:
    """The state of the patterns in one directory: which segments have been matched on the way there."""

    _steps: tuple[tuple[_Pattern, int], ...]
    #: Whether everything below matches, except for what negative patterns exclude.
    _is_whole: bool

    def enter(self, name: str) -> Reach | None:
        """Return the state in a subdirectory, None when nothing in it can match."""
        steps: dict[tuple[_Pattern, int], None] = {}
        is_whole = self._is_whole
        for pattern, at in self._steps:
            segment = pattern.segments[at]
            if segment is None:
                steps.update(dict.fromkeys(_from(pattern, at)))
            elif segment.matches(name):
                if at + 1 < len(pattern.segments):
                    steps.update(dict.fromkeys(_from(pattern, at + 1)))
                elif pattern.folder and pattern.takes_away:
                    return None
                elif pattern.folder:
                    is_whole = True
        return _reach(steps, is_whole=is_whole)

    def takes(self, name: str) -> bool:
        """Return whether a file in this directory matches."""
        taken = self._is_whole
        for pattern, at in self._steps:
            if (pattern.takes_away or not taken) and pattern.file and at + 1 == len(pattern.segments):
                segment = pattern.segments[at]
                if segment is not None and segment.matches(name):
                    if pattern.takes_away:
                        return False
                    taken = True
        return taken

    def names(self, name: str) -> bool:
        """Return whether a pattern without wildcards names this entry of the directory or leads through it."""
        return any(
            pattern.is_plain and not pattern.takes_away and (segment := pattern.segments[at]) and segment.name == name
            for pattern, at in self._steps
        )


def _from(pattern: _Pattern, at: int) -> Iterable[tuple[_Pattern, int]]:
    """Yield the positions of a pattern at a segment: `**` may match no directory at all."""
    yield pattern, at
    if pattern.segments[at] is None:
        yield pattern, at + 1


def _reach(steps: Iterable[tuple[_Pattern, int]], *, is_whole: bool) -> Reach | None:
    if is_whole:
        # No pattern can add more.
        return Reach(tuple(step for step in steps if step[0].takes_away), is_whole)
    found = tuple(steps)
    return Reach(found, is_whole) if any(not pattern.takes_away for pattern, _ in found) else None


class Globs:
    """Patterns for paths relative to one directory. They are case-sensitive; `*` and `**` match names that start with a dot.

    `!pattern` excludes, wherever it is in the list; when all patterns exclude, everything else matches. `coverage`,
    `coverage/` and `coverage/**` match everything below that directory, while `*` matches files only.

    Raises:
        BadPattern: A pattern is invalid.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        expanded: dict[str, None] = {}
        for pattern in patterns:
            expanded.update(dict.fromkeys(expand(pattern)))
            check_amount(list(expanded))
        known: dict[str, _Segment] = {}
        read = [found for text in expanded if (found := _read(text, known))]
        adds = [pattern for pattern in read if not pattern.takes_away]
        # `.` and `**` match the whole directory.
        is_whole = not all(pattern.segments for pattern in adds) or bool(read and not adds)
        is_nothing = not read or not all(pattern.segments for pattern in read if pattern.takes_away)
        steps = (step for pattern in read if pattern.segments for step in _from(pattern, 0))
        #: The state in the directory itself, None when nothing in it can match.
        self.root = None if is_nothing else _reach(steps, is_whole=is_whole)

    def matches(self, path: str) -> bool:
        """Return whether a file matches, by its path relative to the directory."""
        *folders, name = path.split("/")
        reach = self.root
        for folder in folders:
            if reach is None:
                return False
            reach = reach.enter(folder)
        return reach is not None and reach.takes(name)
