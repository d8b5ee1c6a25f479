"""Which paths of a folder a list of glob patterns names. Pure: it never looks at a disk.

The patterns are wcmatch's with GLOBSTAR, DOTGLOB, BRACE, NEGATE, NEGATEALL and CASE. Two things are done here and not by
wcmatch: a pattern that names a folder means all below it, and `**` is followed step by step, since as one regular expression a
hostile pattern of a few `**` takes for ever, and a regular expression holds up every thread of the process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import attrs
import bracex
from wcmatch import fnmatch

from ccrun.errors import CcrunError

#: Patterns, once the braces are expanded; wcmatch's own limit.
MAX_PATTERNS: Final = 1000
#: Characters of all of them. Each is looked at for every folder and file, and braces multiply long patterns too.
MAX_PATTERN_CHARS: Final = 256 * 1024
#: Opening braces in one pattern. People write two or three; reading hundreds that are nested takes seconds.
MAX_BRACES: Final = 32

_FLAGS: Final = fnmatch.DOTMATCH | fnmatch.CASE | fnmatch.FORCEUNIX
#: Finds a wildcard that no backslash makes an ordinary character.
_MAGIC: Final = re.compile(r"(?:[^\\*?\[]|\\.)*+[*?\[]", re.DOTALL)


class BadPattern(CcrunError):
    """A pattern cannot be used. The message goes on from what names the pattern: `may have at most …`."""


def expand(pattern: str) -> list[str]:
    """Return the patterns that one with braces stands for.

    Raises:
        BadPattern: It has too many braces, or stands for too many patterns.
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
    """Raise `BadPattern` when these are too many patterns, or too long ones."""
    if len(expanded) > MAX_PATTERNS or sum(map(len, expanded)) > MAX_PATTERN_CHARS:
        raise BadPattern(
            f"may stand for at most {MAX_PATTERNS} patterns of {MAX_PATTERN_CHARS} characters in all, braces expanded"
        )


# --- one pattern -----------------------------------------------------------------------------------------------------


class _Segment:
    """What stands between two slashes: a name, or a pattern for names, made ready when it is first needed."""

    __slots__ = ("_matches", "_text", "name")

    def __init__(self, text: str) -> None:
        self._text = text
        self._matches: Callable[[str], object] | None = None
        #: The one name that it means, unless it has wildcards.
        self.name = None if _MAGIC.match(text) else re.sub(r"\\(.?)", r"\1", text, flags=re.DOTALL)

    def matches(self, name: str) -> bool:
        if self.name is not None:
            return name == self.name
        if self._matches is None:
            # Its stars never go back (`(?>…)`), so that it takes a time that grows with pattern times name, no faster.
            ((expression,), _) = fnmatch.translate(self._text, flags=_FLAGS)
            self._matches = re.compile(expression).fullmatch
        return self._matches(name) is not None


@attrs.frozen(eq=False)
class _Pattern:
    """A pattern without braces. A segment of None is `**`: any number of folders, never the last segment."""

    segments: tuple[_Segment | None, ...]
    takes_away: bool
    #: Whether a file that it names is meant, and whether all below a folder that it names is.
    file: bool
    folder: bool
    #: Whether it has no wildcards.
    is_plain: bool


def _read(text: str, known: dict[str, _Segment]) -> _Pattern | None:
    """Return what a pattern means; None for one that names nothing."""
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
    """What the patterns say of one folder: how far each of them has come on the way there."""

    _steps: tuple[tuple[_Pattern, int], ...]
    #: Whether everything below is meant, but for what patterns take away.
    _is_whole: bool

    def enter(self, name: str) -> Reach | None:
        """Return what they say of a folder in this one; None when nothing in it can be meant."""
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
        """Whether a file in this folder is meant."""
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
        """Whether a pattern without wildcards names what is in this folder under that name, or leads through it."""
        return any(
            pattern.is_plain and not pattern.takes_away and (segment := pattern.segments[at]) and segment.name == name
            for pattern, at in self._steps
        )


def _from(pattern: _Pattern, at: int) -> Iterable[tuple[_Pattern, int]]:
    """Yield where a pattern may be that has come to a segment: `**` may mean no folder at all."""
    yield pattern, at
    if pattern.segments[at] is None:
        yield pattern, at + 1


def _reach(steps: Iterable[tuple[_Pattern, int]], *, is_whole: bool) -> Reach | None:
    if is_whole:
        # Nothing more can be added.
        return Reach(tuple(step for step in steps if step[0].takes_away), is_whole)
    found = tuple(steps)
    return Reach(found, is_whole) if any(not pattern.takes_away for pattern, _ in found) else None


class Globs:
    """Patterns, as paths relative to one folder. Case counts; `*` and `**` match names that begin with a dot.

    `!pattern` takes away, wherever in the list it stands; patterns that only take away leave everything else. `coverage`,
    `coverage/` and `coverage/**` mean all below that folder, `*` only means files.

    Raises:
        BadPattern: They cannot be used.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        expanded: dict[str, None] = {}
        for pattern in patterns:
            expanded.update(dict.fromkeys(expand(pattern)))
            check_amount(list(expanded))
        known: dict[str, _Segment] = {}
        read = [found for text in expanded if (found := _read(text, known))]
        adds = [pattern for pattern in read if not pattern.takes_away]
        # Such a pattern means the whole folder: `.`, `**`.
        is_whole = not all(pattern.segments for pattern in adds) or bool(read and not adds)
        is_nothing = not read or not all(pattern.segments for pattern in read if pattern.takes_away)
        steps = (step for pattern in read if pattern.segments for step in _from(pattern, 0))
        #: What they say of the folder itself; None when they mean nothing in it.
        self.root = None if is_nothing else _reach(steps, is_whole=is_whole)

    def matches(self, path: str) -> bool:
        """Whether a file is meant, named by its path from the folder."""
        *folders, name = path.split("/")
        reach = self.root
        for folder in folders:
            if reach is None:
                return False
            reach = reach.enter(folder)
        return reach is not None and reach.takes(name)
