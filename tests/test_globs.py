from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wcmatch import glob

from ccrun.globs import MAX_BRACES, MAX_PATTERN_CHARS, MAX_PATTERNS, BadPattern, Globs

WCMATCH = glob.GLOBSTAR | glob.DOTGLOB | glob.BRACE | glob.NEGATE | glob.NEGATEALL | glob.CASE | glob.FORCEUNIX
#: Seconds of processor time. A match takes milliseconds; a backtracking implementation needs hours for these patterns.
MAX_SECONDS = 10.0


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*.log", "out.log"),
        ("*.log", ".log"),
        ("*", ".env"),
        ("**/*.log", "out.log"),
        ("**/*.log", "a/.b/out.log"),
        ("a/**/b", "a/b"),
        ("a/**/b", "a/x/y/b"),
        ("a/**", "a/x/.y"),
        ("**", "a/.b/c"),
        (".playwright/**/*.{webm,png}", ".playwright/test-results/video-1.webm"),
        ("{src/{a,b},lib}/*.ts", "src/b/x.ts"),
        ("{,sub/}*.log", "sub/x.log"),
        ("file-{1..12}.txt", "file-12.txt"),
        ("[[:digit:]][!x]?", "1yz"),
        ("a**b", "axxb"),
        ("./a//b/./c", "a/b/c"),
        (r"\!important", "!important"),
        (r"app/\[id\]/page.tsx", "app/[id]/page.tsx"),
        ("a b/*", "a b/\udcff\n"),
        ("ä/*", "ä/€"),
    ],
)
def test_pattern_matches(pattern: str, path: str) -> None:
    """Wildcards, braces, ranges, sets and escapes work as in wcmatch, and dots are ordinary characters."""
    assert Globs([pattern]).matches(path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*.log", "a/out.log"),
        ("*", "a/b"),
        ("*.PNG", "a.png"),
        ("a/**", "a"),
        ("src/", "src"),
        ("a/**/b", "a/b.txt"),
        ("*.py", "a.py\n"),
        ("[a-z]", "B"),
        ("", "a"),
        ("..", "a"),
        ("../a", "a"),
        ("a/..", "a/b"),
        (r"\*", "a"),
        ("dist-*", "dist-1/a"),
    ],
)
def test_pattern_does_not_match(pattern: str, path: str) -> None:
    """A star does not match a slash, case matters, and no pattern matches through `..`."""
    assert not Globs([pattern]).matches(path)


@pytest.mark.parametrize(
    "pattern", ["coverage", "coverage/", "coverage/**", "./coverage", "**/coverage", "cov*/", "{coverage,x}", "."]
)
def test_directory_matches_all_files_below_it(pattern: str) -> None:
    """A pattern that matches a directory matches all files below it."""
    assert [True, True] == [Globs([pattern]).matches(path) for path in ("coverage/index.html", "coverage/a/b/.c")]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["**", "!**/*.map"], {"a.js", "b/c.js", "b/node_modules/d.js"}),
        (["!**/*.map", "**"], {"a.js", "b/c.js", "b/node_modules/d.js"}),
        (["!**/node_modules"], {"a.js", "a.map", "b/c.js"}),
        (["**/*.js", "!b/"], {"a.js"}),
        (["b", "!b/node_modules/**"], {"b/c.js"}),
        (["!{a.*,b}"], set()),
        (["**", "!**"], set()),
        ([], set()),
    ],
)
def test_negated_pattern_excludes_files(patterns: list[str], expected: set[str]) -> None:
    """Negated patterns exclude files in any position and, alone, match all other files; an empty list matches no file."""
    paths = ["a.js", "a.map", "b/c.js", "b/node_modules/d.js"]
    globs = Globs(patterns)
    assert expected == {path for path in paths if globs.matches(path)}


#: Few characters, so that patterns often match.
segments = st.text("ab.*?[]!-\\", min_size=1, max_size=4) | st.just("**") | st.just("*")
single_patterns = st.lists(segments, min_size=1, max_size=4).map("/".join) | st.sampled_from(
    ["{a,b}/*", "{a/,}b", "**/{a,*b}", "a/{**/,}b"]
)
paths = st.lists(st.text("ab.-", min_size=1, max_size=3).filter(lambda name: name.strip(".")), min_size=1, max_size=4)


@given(st.lists(single_patterns, min_size=1, max_size=3), paths)
@example(["**/a/**/b"], ["a", "b", "a", "b"])
@example(["!a", "*"], ["a"])
@settings(max_examples=200, deadline=None)
def test_matches_equal_those_of_wcmatch(patterns: list[str], parts: list[str]) -> None:
    """Patterns that match no directory match the same files as in wcmatch."""
    # Dot segments, brackets that contain a slash, and directories differ from wcmatch; other tests cover them.
    patterns = [
        pattern
        for pattern in patterns
        if not any(segment.strip("!") in (".", "..", "") or "\\" in segment[-1:] for segment in pattern.split("/"))
        and not ("[" in pattern and "/" in pattern)
    ]
    path = "/".join(parts)
    parents = ["/".join(parts[:length]) for length in range(1, len(parts))]
    if not patterns or any(
        glob.globmatch(parent, [p.removeprefix("!")], flags=WCMATCH) for parent in parents for p in patterns
    ):
        return
    assert glob.globmatch(path, patterns, flags=WCMATCH) == Globs(patterns).matches(path)


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("{a,b}" * 32, f"may expand to at most {MAX_PATTERNS} patterns"),
        ("{1..1000000000}", f"may expand to at most {MAX_PATTERNS} patterns"),
        ("{" * 512 + "}" * 512, f"may have at most {MAX_BRACES} opening braces"),
        ("{a,b}" * 200, f"may have at most {MAX_BRACES} opening braces"),
    ],
)
def test_large_brace_expansion_is_rejected(pattern: str, rule: str) -> None:
    """Braces that expand to too many patterns are rejected before they are expanded."""
    started = time.thread_time()
    with pytest.raises(BadPattern) as caught:
        Globs([pattern])
    assert rule == caught.value.message
    assert MAX_SECONDS > time.thread_time() - started


@pytest.mark.parametrize(
    "patterns", [["{1..600}", "x{1..600}"], [f"{'x' * 900}{{1..{MAX_PATTERN_CHARS // 900}}}"]], ids=["number", "length"]
)
def test_all_patterns_have_a_common_limit(patterns: list[str]) -> None:
    """Patterns that are allowed individually are rejected if they exceed the limit together."""
    with pytest.raises(BadPattern, match=r"may expand to at most 1000 patterns with 262144 characters in total"):
        Globs(patterns)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("**/" * 300 + "b", "a/" * 500 + "c"),
        ("**/a/" * 200 + "b", "a/" * 500 + "c"),
        ("**/*a*/" * 140 + "b", "aaaaaaaaa/" * 100 + "c"),
        ("*a" * 500 + "b", "a" * 255),
        ("*[a-z]" * 170 + "1", "a" * 255),
        ("?*" * 500 + "b", "a" * 255),
        ("*a*/" * 250 + "b", ("a" * 255 + "/") * 15 + "c"),
    ],
)
def test_match_of_a_malicious_pattern_is_fast(pattern: str, path: str) -> None:
    """No pattern needs exponential time, which would block the whole process."""
    started = time.thread_time()
    assert not Globs([pattern]).matches(path)
    assert MAX_SECONDS > time.thread_time() - started


def test_directory_without_matches_is_not_entered() -> None:
    """`enter` returns None for a directory in which no file can match, so that a walk can skip it."""
    root = Globs(["src/**/*.ts", "*.md", "!src/vendor"]).root
    assert root is not None
    assert [False, True, False] == [root.enter(name) is not None for name in ("node_modules", "src", "README.md")]
    src = root.enter("src")
    assert src is not None
    assert [None, False, True] == [src.enter("vendor"), src.matches_file("a.js"), src.matches_file("a.ts")]


def test_literal_pattern_names_its_directories() -> None:
    """`names` is true only for the segments of patterns without wildcards."""
    root = Globs(["a/b", r"\*", "c*", "**/d", "!e"]).root
    assert root is not None
    assert ["a", "*"] == [name for name in ("a", "*", "c", "cc", "d", "e") if root.names_entry(name)]
    inner = root.enter("a")
    assert inner is not None
    assert inner.names_entry("b")
