from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wcmatch import glob

from ccrun.globs import MAX_BRACES, MAX_PATTERN_CHARS, MAX_PATTERNS, BadPattern, Globs

WCMATCH = glob.GLOBSTAR | glob.DOTGLOB | glob.BRACE | glob.NEGATE | glob.NEGATEALL | glob.CASE | glob.FORCEUNIX
#: Seconds. What takes milliseconds, on a busy machine; hostile patterns took hours.
SOON = 2.0


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
def test_pattern_names_a_path(pattern: str, path: str) -> None:
    """Stars, `**`, braces, ranges, sets and escapes mean what they mean to wcmatch, and dots are ordinary."""
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
def test_pattern_does_not_name_a_path(pattern: str, path: str) -> None:
    """A star stays in its folder, case counts, and no pattern climbs."""
    assert not Globs([pattern]).matches(path)


@pytest.mark.parametrize(
    "pattern", ["coverage", "coverage/", "coverage/**", "./coverage", "**/coverage", "cov*/", "{coverage,x}", "."]
)
def test_folder_means_all_below_it(pattern: str) -> None:
    """A pattern that names a folder means every file in it, however deep."""
    assert [True, True] == [Globs([pattern]).matches(path) for path in ("coverage/index.html", "coverage/a/b/.c")]


@pytest.mark.parametrize(
    ("patterns", "meant"),
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
def test_exclamation_mark_takes_away(patterns: list[str], meant: set[str]) -> None:
    """A negation takes away wherever it stands; negations alone leave everything else; no pattern means nothing."""
    paths = ["a.js", "a.map", "b/c.js", "b/node_modules/d.js"]
    globs = Globs(patterns)
    assert meant == {path for path in paths if globs.matches(path)}


#: Few letters, so that patterns often match.
segments = st.text("ab.*?[]!-\\", min_size=1, max_size=4) | st.just("**") | st.just("*")
single_patterns = st.lists(segments, min_size=1, max_size=4).map("/".join) | st.sampled_from(
    ["{a,b}/*", "{a/,}b", "**/{a,*b}", "a/{**/,}b"]
)
paths = st.lists(st.text("ab.-", min_size=1, max_size=3).filter(lambda name: name.strip(".")), min_size=1, max_size=4)


@given(st.lists(single_patterns, min_size=1, max_size=3), paths)
@example(["**/a/**/b"], ["a", "b", "a", "b"])
@example(["!a", "*"], ["a"])
@settings(max_examples=500, deadline=None)
def test_files_are_those_of_wcmatch(patterns: list[str], parts: list[str]) -> None:
    """Where no folder is named, exactly those files are meant that wcmatch means."""
    # A lone dot as a segment, a bracket over a slash and a name that is a folder are told apart by tests of their own.
    patterns = [
        pattern
        for pattern in patterns
        if not any(segment.strip("!") in (".", "..", "") or "\\" in segment[-1:] for segment in pattern.split("/"))
        and not ("[" in pattern and "/" in pattern)
    ]
    path = "/".join(parts)
    above = ["/".join(parts[:length]) for length in range(1, len(parts))]
    if not patterns or any(
        glob.globmatch(folder, [p.removeprefix("!")], flags=WCMATCH) for folder in above for p in patterns
    ):
        return
    assert glob.globmatch(path, patterns, flags=WCMATCH) == Globs(patterns).matches(path)


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("{a,b}" * 32, f"may stand for at most {MAX_PATTERNS} patterns"),
        ("{1..1000000000}", f"may stand for at most {MAX_PATTERNS} patterns"),
        ("{" * 512 + "}" * 512, f"may have at most {MAX_BRACES} opening braces"),
        ("{a,b}" * 200, f"may have at most {MAX_BRACES} opening braces"),
    ],
)
def test_brace_bomb_is_refused_at_once(pattern: str, rule: str) -> None:
    """Braces that stand for too much are told in one sentence, before they are expanded."""
    began = time.monotonic()
    with pytest.raises(BadPattern) as caught:
        Globs([pattern])
    assert rule == caught.value.message
    assert SOON > time.monotonic() - began


@pytest.mark.parametrize(
    "patterns", [["{1..600}", "x{1..600}"], [f"{'x' * 900}{{1..{MAX_PATTERN_CHARS // 900}}}"]], ids=["number", "length"]
)
def test_all_patterns_have_a_limit_together(patterns: list[str]) -> None:
    """What is allowed one by one may be too much in all."""
    with pytest.raises(BadPattern, match=r"may stand for at most 1000 patterns of 262144 characters in all"):
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
def test_hostile_pattern_takes_no_longer_than_another(pattern: str, path: str) -> None:
    """No pattern makes a match go on and on: a regular expression would hold up the whole process."""
    began = time.monotonic()
    assert not Globs([pattern]).matches(path)
    assert SOON > time.monotonic() - began


def test_folder_in_which_nothing_is_meant_is_not_entered() -> None:
    """Whoever walks a tree learns which folders to leave out."""
    root = Globs(["src/**/*.ts", "*.md", "!src/vendor"]).root
    assert root is not None
    assert [False, True, False] == [root.enter(name) is not None for name in ("node_modules", "src", "README.md")]
    src = root.enter("src")
    assert src is not None
    assert [None, False, True] == [src.enter("vendor"), src.takes("a.js"), src.takes("a.ts")]


def test_plain_pattern_names_what_it_leads_through() -> None:
    """Only patterns without wildcards name something, and what they lead through."""
    root = Globs(["a/b", r"\*", "c*", "**/d", "!e"]).root
    assert root is not None
    assert ["a", "*"] == [name for name in ("a", "*", "c", "cc", "d", "e") if root.names(name)]
    inner = root.enter("a")
    assert inner is not None
    assert inner.names("b")
