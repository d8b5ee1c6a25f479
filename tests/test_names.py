from __future__ import annotations

import datetime as dt
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.store import NOW, TASK
from hypothesis import example, given
from hypothesis import strategies as st

from ccrun import names


def test_objects_have_documented_names() -> None:
    """The names of objects are those that users of the bucket rely on."""
    at = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    assert [
        "sessions/t-1/",
        "sessions/t-1/encrypted-payload.bin",
        "sessions/t-1/007-20250304-030607.jsonl",
        "sessions/t-1/metadata.json",
        "active/t-1",
        "index/82589/352/32999-t-1",
    ] == [
        names.task_prefix(TASK),
        names.payload_name(TASK),
        names.chunk_name(TASK, 7, at),
        names.record_name(TASK),
        names.active_name(TASK),
        names.index_name(TASK, at + dt.timedelta(hours=2)),
    ]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (1, "001"),
        (999, "999"),
        (1000, "999000001"),
        (1000 + 999_998, "999999999"),
        (1000 + 999_999, "999999999000000000001"),
    ],
)
def test_chunk_code_gets_longer_with_the_number(number: int, code: str) -> None:
    """The code of a chunk has three digits up to 999, and more for higher numbers."""
    assert code == names.chunk_code(number)


numbers = st.one_of(
    st.integers(1, 2000), st.integers(1_000_900, 1_001_100), st.integers(1, 10**13), st.integers(1, 10**40)
)

moments = st.integers(0, names.LAST_MILLISECOND * 1000).map(
    lambda microseconds: dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=microseconds)
)


@given(numbers)
@example(999)
@example(1000)
@example(1_000_998)
@example(1_000_999)
@example(1_000_998 + 10**12 - 1)
@example(1_000_998 + 10**12)
def test_chunk_code_is_reversible(number: int) -> None:
    """`chunk_number` returns the number that `chunk_code` got."""
    assert number == names.chunk_number(names.chunk_code(number))


@given(numbers, numbers, moments, moments)
@example(999, 1000, NOW, NOW)
@example(1000, 9999, NOW, NOW)
@example(1_000_998, 1_000_999, NOW, NOW)
def test_chunk_names_sort_by_number(one: int, two: int, at: dt.datetime, later: dt.datetime) -> None:
    """The names of chunks sort by their numbers, independent of the times in the names."""
    first, second = names.chunk_name(TASK, one, at), names.chunk_name(TASK, two, later)
    if one != two:
        assert (one < two) == (first < second)


def test_chunk_names_sort_by_number_in_javascript(tmp_path: Path) -> None:
    """Sorting the names with `localeCompare`, as in a browser, gives the order of the numbers."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    edges = [*range(1, 1200), *range(1_000_900, 1_001_100), 10**12, 1_000_998 + 10**12, 10**12 + 10**7]
    sorted_names = [names.chunk_name(TASK, number, NOW) for number in sorted(edges)]
    program = tmp_path / "sort.js"
    program.write_text(
        "const names = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "console.log(JSON.stringify(names.reverse().sort((a, b) => a.localeCompare(b))));"
    )
    done = subprocess.run([node, program], input=json.dumps(sorted_names).encode(), stdout=subprocess.PIPE, check=True)
    assert sorted_names == json.loads(done.stdout)


@given(moments, moments)
@example(NOW, NOW + dt.timedelta(milliseconds=1))
def test_index_names_sort_newest_first(one: dt.datetime, two: dt.datetime) -> None:
    """The index name of a newer task sorts first, with a precision of one millisecond."""
    first, second = names.index_name(TASK, one), names.index_name(TASK, two)
    if abs(one - two) >= dt.timedelta(milliseconds=1):
        assert (one < two) == (second < first)
