"""Matches paths against glob patterns, without access to the disk.

The syntax is that of wcmatch with GLOBSTAR, DOTGLOB, BRACE, NEGATE, NEGATEALL and CASE. wcmatch expands braces and translates
single path segments. Segments are matched here one by one, because wcmatch translates a whole pattern to one regular expression
whose time multiplies with each `**` (six of them against a path of 60 directories took 38 s), and because here a pattern that
names a directory matches everything below it.
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
    """A pattern is invalid. The message is a sentence without its subject: `may have at most …`."""


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
        raise BadPattern(f"may expand to at most {MAX_PATTERNS} patterns") from None
    except (RecursionError, ValueError):
        raise BadPattern("has braces that cannot be parsed") from None


def check_amount(expanded: Sequence[str]) -> None:
    """Check the number and the total length of patterns.

    Raises:
        BadPattern: There are too many, or they are too long.
    """
    if len(expanded) > MAX_PATTERNS or sum(map(len, expanded)) > MAX_PATTERN_CHARS:
        raise BadPattern(f"may expand to at most {MAX_PATTERNS} patterns with {MAX_PATTERN_CHARS} characters in total")


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
    """A parsed pattern without braces. A segment of None is `**`, any number of directories; it is never the last segment."""

    segments: tuple[_Segment | None, ...]
    excludes: bool
    #: Whether it matches files.
    is_for_files: bool
    #: Whether it matches everything below directories.
    is_for_directories: bool
    #: Whether it has no wildcards.
    is_plain: bool


def _parse(text: str, segments_by_text: dict[str, _Segment]) -> _Pattern | None:
    """Return the parsed pattern, None for one that matches nothing."""
    excludes = text.startswith("!")
    text = text.removeprefix("!")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not text:
        return None
    segments: list[_Segment | None] = []
    for part in parts:
        if part != "**":
            segments.append(segments_by_text.setdefault(part, _Segment(part)))
        elif segments[-1:] != [None]:
            segments.append(None)
    is_for_directories_only = not segments or segments[-1] is None or text.endswith(("/", "/."))
    while segments[-1:] == [None]:
        segments.pop()
    last = segments[-1] if segments else None
    return _Pattern(
        segments=tuple(segments),
        excludes=excludes,
        is_for_files=not is_for_directories_only,
        is_for_directories=is_for_directories_only or (last is not None and last.name is not None),
        is_plain=all(segment is not None and segment.name is not None for segment in segments),
    )


# --- all patterns ----------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Matcher:
    """Matches the entries of one directory: holds which segments of the patterns the path of that directory has matched."""

    #: Patterns, each with the index of the segment to match next.
    _steps: tuple[tuple[_Pattern, int], ...]
    #: Whether everything below matches, except for what negative patterns exclude.
    _is_whole: bool

    def enter(self, name: str) -> Matcher | None:
        """Return the matcher of a subdirectory, None when nothing in it can match."""
        steps: dict[tuple[_Pattern, int], None] = {}
        is_whole = self._is_whole
        for pattern, at in self._steps:
            segment = pattern.segments[at]
            if segment is None:
                steps.update(dict.fromkeys(_steps_at(pattern, at)))
            elif segment.matches(name):
                if at + 1 < len(pattern.segments):
                    steps.update(dict.fromkeys(_steps_at(pattern, at + 1)))
                elif pattern.is_for_directories and pattern.excludes:
                    return None
                elif pattern.is_for_directories:
                    is_whole = True
        return _matcher(steps, is_whole=is_whole)

    def matches_file(self, name: str) -> bool:
        """Return whether a file in this directory matches."""
        is_matched = self._is_whole
        for pattern, at in self._steps:
            if (pattern.excludes or not is_matched) and pattern.is_for_files and at + 1 == len(pattern.segments):
                segment = pattern.segments[at]
                if segment is not None and segment.matches(name):
                    if pattern.excludes:
                        return False
                    is_matched = True
        return is_matched

    def names_entry(self, name: str) -> bool:
        """Return whether a pattern without wildcards names this entry of the directory, or something in it."""
        return any(
            pattern.is_plain and not pattern.excludes and (segment := pattern.segments[at]) and segment.name == name
            for pattern, at in self._steps
        )


def _steps_at(pattern: _Pattern, at: int) -> Iterable[tuple[_Pattern, int]]:
    """Yield the steps of a pattern at a segment: two at `**`, which may also match no directory."""
    yield pattern, at
    if pattern.segments[at] is None:
        yield pattern, at + 1


def _matcher(steps: Iterable[tuple[_Pattern, int]], *, is_whole: bool) -> Matcher | None:
    if is_whole:
        # No pattern can add more.
        return Matcher(tuple(step for step in steps if step[0].excludes), is_whole)
    found = tuple(steps)
    return Matcher(found, is_whole) if any(not pattern.excludes for pattern, _ in found) else None


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
        segments_by_text: dict[str, _Segment] = {}
        parsed = [found for text in expanded if (found := _parse(text, segments_by_text))]
        included = [pattern for pattern in parsed if not pattern.excludes]
        # `.` and `**` match the whole directory.
        is_whole = not all(pattern.segments for pattern in included) or bool(parsed and not included)
        is_nothing = not parsed or not all(pattern.segments for pattern in parsed if pattern.excludes)
        steps = (step for pattern in parsed if pattern.segments for step in _steps_at(pattern, 0))
        #: The matcher of the directory itself, None when nothing in it can match.
        self.root = None if is_nothing else _matcher(steps, is_whole=is_whole)

    def matches(self, path: str) -> bool:
        """Return whether a file matches, by its path relative to the directory."""
        *directories, name = path.split("/")
        matcher = self.root
        for directory in directories:
            if matcher is None:
                return False
            matcher = matcher.enter(directory)
        return matcher is not None and matcher.matches_file(name)
