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


def test_every_object_has_its_name() -> None:
    """The objects of a task stand where users of the bucket look for them."""
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
def test_codes_grow_where_a_width_is_used_up(number: int, code: str) -> None:
    """Chunks have three digits up to 999, and then as many more as it takes."""
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
def test_number_is_read_back_from_its_code(number: int) -> None:
    """The digits in a chunk's name tell its number, whatever that is."""
    assert number == names.chunk_number(names.chunk_code(number))


@given(numbers, numbers, moments, moments)
@example(999, 1000, NOW, NOW)
@example(1000, 9999, NOW, NOW)
@example(1_000_998, 1_000_999, NOW, NOW)
def test_string_order_of_chunks_is_their_order(one: int, two: int, at: dt.datetime, later: dt.datetime) -> None:
    """Whichever chunk has the higher number has the name that sorts later, whenever both were written."""
    first, second = names.chunk_name(TASK, one, at), names.chunk_name(TASK, two, later)
    if one != two:
        assert (one < two) == (first < second)


def test_chunks_sort_the_same_in_javascript(tmp_path: Path) -> None:
    """A page in a browser that sorts the names with `localeCompare` gets the order of the numbers."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    edges = [*range(1, 1200), *range(1_000_900, 1_001_100), 10**12, 1_000_998 + 10**12, 10**12 + 10**7]
    in_order = [names.chunk_name(TASK, number, NOW) for number in sorted(edges)]
    program = tmp_path / "sort.js"
    program.write_text(
        "const names = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "console.log(JSON.stringify(names.reverse().sort((a, b) => a.localeCompare(b))));"
    )
    done = subprocess.run([node, program], input=json.dumps(in_order).encode(), stdout=subprocess.PIPE, check=True)
    assert in_order == json.loads(done.stdout)


@given(moments, moments)
@example(NOW, NOW + dt.timedelta(milliseconds=1))
def test_index_shows_the_newest_first(one: dt.datetime, two: dt.datetime) -> None:
    """Of two tasks, the one made later, to the millisecond, has the place in the list that sorts first."""
    first, second = names.index_name(TASK, one), names.index_name(TASK, two)
    if abs(one - two) >= dt.timedelta(milliseconds=1):
        assert (one < two) == (second < first)
