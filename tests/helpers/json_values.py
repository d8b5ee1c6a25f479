"""Hypothesis strategies for JSON values that I-JSON has."""

from __future__ import annotations

from typing import Final

from hypothesis import strategies as st

from ccrun import ijson

INTEGERS: Final = st.integers(-ijson.MAX_INTEGER, ijson.MAX_INTEGER)
DOUBLES: Final = st.floats(allow_nan=False, allow_infinity=False)
TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"]))
#: Includes array indexes of ECMAScript, with both limits, and names that only resemble one.
NAMES: Final = st.one_of(
    TEXTS,
    st.integers(0, 20).map(str),
    st.integers(2**32 - 4, 2**32 + 2).map(str),
    st.integers(2**53 - 2, 2**53 + 2).map(str),
    st.sampled_from(["01", "-1", "-0", "1.0", "+1", "1e3", "٣", "", "__proto__", "constructor", "toJSON", "length"]),
)
VALUES: Final = st.recursive(
    st.one_of(st.none(), st.booleans(), INTEGERS, DOUBLES, TEXTS),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(NAMES, inner)),
    max_leaves=25,
)
