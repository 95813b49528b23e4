# SPDX-License-Identifier: MIT
"""The masks that a selection keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namedmask.masks import MaskRecord
from namedmask.selection import Selection, select


def record(photo: str, score: float, category: str = "cat", similarity: float | None = None) -> MaskRecord:
    return MaskRecord(photo, (1, 1), category, similarity, "01", score, 1, (0, 0, 1, 1))


def names(records, selection, review=None):
    return "".join(one.photo for one in select(records, selection, review or {}))


SCORES = {"a": 0.5, "b": 0.9, "c": 0.1, "d": 0.7, "e": 0.5}
QUARTERS = [0.0, 0.25, 0.5, 0.75]
RECORDS = [record(photo, score) for photo, score in SCORES.items()]


@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        (Selection(), "abcde"),
        (Selection(min_score=0.5), "abde"),  # a score of just that is enough
        (Selection(keep_fraction=0.4), "bd"),
        (Selection(keep_fraction=0.01), "b"),
        (Selection(per_category=3), "abd"),  # of equal scores, the earlier one
        (Selection(per_category=9), "abcde"),
        (Selection(min_score=0.2, keep_fraction=0.5), "bd"),  # half of the four that have the score
        (Selection(min_score=0.2, keep_fraction=0.75, per_category=1), "b"),
        (Selection(min_score=0.95), ""),
        (Selection(min_score=0.95, keep_fraction=0.5), ""),
    ],
)
def test_cuts_are_applied_in_order_and_masks_keep_theirs(selection, kept):
    assert names(RECORDS, selection) == kept
    assert names(iter(RECORDS), selection) == kept


def test_each_category_has_its_own_cuts():
    dogs = [record(one.photo.upper(), one.score / 10, "dog") for one in RECORDS]
    mixed = [one for pair in zip(RECORDS, dogs, strict=True) for one in pair]
    assert names(mixed, Selection(keep_fraction=0.4)) == "bBdD"
    assert names(mixed, Selection(min_score=0.09, per_category=2)) == "bBd"


def test_of_equal_scores_the_higher_category_score_is_better():
    masks = [record("a", 0.5, similarity=0.1), record("b", 0.5, similarity=0.3), record("c", 0.5)]
    assert names(masks, Selection(per_category=1)) == "b"
    assert names(masks, Selection(per_category=2)) == "ab"


def test_accepted_masks_stay_and_count_and_rejected_ones_do_neither():
    review = {("c", "cat"): "accept", ("b", "cat"): "reject", ("a", "dog"): "reject"}
    assert names(RECORDS, Selection(), review) == "acde"
    assert names(RECORDS, Selection(min_score=0.6), review) == "cd"
    assert names(RECORDS, Selection(per_category=2), review) == "cd"
    assert names(RECORDS, Selection(keep_fraction=0.5), review) == "cd"  # of four
    accepted = {(photo, "cat"): "accept" for photo in "ace"} | {("d", "cat"): "detector"}
    assert names(RECORDS, Selection(min_score=0.99, per_category=1), accepted) == "acde"


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_fraction": 0},
        {"keep_fraction": 1.01},
        {"per_category": 0},
        {"min_score": float("nan")},
        {"min_score": -0.1},
        {"min_score": 3},
    ],
)
def test_numbers_out_of_range_raise_value_error(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        Selection(**wrong)


@given(
    st.lists(st.tuples(st.sampled_from(QUARTERS), st.sampled_from("xy"), st.sampled_from([None, 0.0, 0.1]))),
    st.none() | st.sampled_from([*QUARTERS, 1.0]),
    st.none() | st.floats(0.01, 1),
    st.none() | st.integers(1, 5),
)
def test_no_mask_that_is_left_out_is_better_than_one_that_stays(rows, least, fraction, most):
    masks = [record(str(n), score, name, similarity) for n, (score, name, similarity) in enumerate(rows)]
    kept = select(masks, Selection(least, fraction, most))
    assert [masks.index(one) for one in kept] == sorted(masks.index(one) for one in kept)
    for name in "xy":
        own = [one for one in kept if one.category == name]
        rest = [one for one in masks if one.category == name and one not in own]
        enough = [one for one in masks if one.category == name and one.score >= (least or 0)]
        expected = max(1, round(len(enough) * (fraction or 1))) if enough else 0
        assert len(own) == min(expected, most or expected)
        worst = min((one.score for one in own), default=9)
        assert all(one.score <= worst or one.score < (least or 0) for one in rest)
