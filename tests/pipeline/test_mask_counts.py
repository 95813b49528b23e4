# SPDX-License-Identifier: MIT
"""Usable masks of each category, counted before a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from namedmask.distributed import Worker
from namedmask.errors import UserError
from namedmask.mask_counts import check_mask_counts, show_mask_counts
from namedmask.masks import MaskRecord


def records(category: str, usable: int, empty: int) -> list[MaskRecord]:
    full = [MaskRecord.from_mask("a", np.ones((2, 2), bool), category, None, 1.0)] * usable
    return full + [MaskRecord.from_mask("a", np.zeros((2, 2), bool), category, None, 0.0)] * empty


def test_prints_the_usable_masks_of_each_category_and_warns_of_few(printing, capsys):
    masks = records("[cat]", 12, 3) + records("dog", 9, 0)
    check_mask_counts(["[cat]", "dog"], masks, masks, Path("out/masks"), False, Worker())
    printed = capsys.readouterr()
    summary, *table = printed.out.splitlines()
    assert summary == "usable masks in out/masks: 21 of 24; per category 9 to 12, median 10.5"
    assert list(map(str.split, table)) == [
        ["category", "masks", "selected", "usable"], ["[cat]", "15", "15", "12"], ["dog", "9", "9", "9"],
    ]  # fmt: skip
    assert printed.err == "namedmask: warning: 'dog' has fewer than 10 usable masks in out/masks\n"
    check_mask_counts(["[cat]", "dog"], masks, masks, Path("out/masks"), False, Worker(1, 2))
    assert capsys.readouterr() == ("", "")


def test_of_many_categories_only_those_with_few_masks_are_listed(printing, capsys):
    names = [f"name {n}" for n in range(100)]
    masks = [r for n, name in enumerate(names) for r in records(name, 10 if n > 6 else 1, 0)]
    check_mask_counts(names, masks, masks, Path("masks"), False, Worker())
    printed = capsys.readouterr()
    assert printed.out.count("\nname ") == 7
    assert "7 categories (name 0, name 1, name 2, name 3, name 4 and 2 more) have fewer than 10" in printed.err


@pytest.mark.parametrize(("categories", "lines"), [(20, 20), (21, 2)])
def test_up_to_20_categories_are_listed(categories, lines, printing, capsys):
    names = [f"name {n}" for n in range(categories)]
    masks = [r for n, name in enumerate(names) for r in records(name, 9 if n < 2 else 10, 0)]
    check_mask_counts(names, masks, masks, Path("masks"), False, Worker())
    printed = capsys.readouterr()
    assert printed.out.count("\nname ") == lines and "per category 9 to 10, median 10\n" in printed.out
    assert "2 categories (name 0, name 1) have fewer than 10" in printed.err


def test_at_most_20_categories_with_few_masks_are_listed(printing, capsys):
    names = [f"name {n}" for n in range(30)]
    masks = [r for name in names for r in records(name, 1, 0)]
    check_mask_counts(names, masks, masks, Path("masks"), False, Worker())
    assert capsys.readouterr().out.count("\nname ") == 20


def test_a_mask_of_one_pixel_is_usable(printing, capsys):
    masks = [MaskRecord.from_mask("a", np.eye(1, 4, dtype=bool), "cat", None, 1.0)] * 10
    check_mask_counts(["cat"], masks, masks, Path("masks"), False, Worker())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and 1 more")])
def test_five_categories_without_masks_are_named(count, more):
    names, masks = [f"n{n}" for n in range(count)], records("cat", 12, 0)
    with pytest.raises(UserError, match=rf"^{count} categories \(n0, n1, n2, n3, n4{more}\) have no usable mask"):
        check_mask_counts(["cat", *names], masks, masks, Path("masks"), False, Worker(1, 2))


@pytest.mark.parametrize("folder", ["masks", "refined"])
def test_a_category_without_a_usable_mask_is_an_error_unless_allowed(folder):
    masks = records("cat", 12, 0) + records("dog", 0, 5)
    for categories, worker in ((["cat", "dog"], Worker()), (["cat", "dog"], Worker(1, 2)), (["cat", "fox"], Worker())):
        with pytest.raises(UserError, match=f"'{categories[1]}' has no usable mask in {folder}") as error:
            check_mask_counts(categories, masks, masks, Path(folder), False, worker)
        assert ("delete refined to use the detector's masks" in str(error.value)) == (folder == "refined")
        check_mask_counts(categories, masks, masks, Path(folder), True, worker)
    with pytest.raises(UserError, match="all masks in masks are empty"):
        check_mask_counts(["dog"], masks[12:], masks[12:], Path("masks"), True, Worker())


def test_only_selected_masks_are_usable(printing, capsys):
    masks, selected = records("cat", 30, 3) + records("dog", 20, 0), records("cat", 11, 1) + records("dog", 10, 0)
    check_mask_counts(["cat", "dog"], masks, selected, Path("masks"), False, Worker())
    printed = capsys.readouterr()
    assert "21 of 53; per category 10 to 11" in printed.out and not printed.err
    assert [line.split() for line in printed.out.splitlines()[2:]] == [
        ["cat", "33", "12", "11"],
        ["dog", "20", "10", "10"],
    ]
    for kept, says in (
        (selected[:12], r"^'dog' has no usable mask that is selected: lower --min-score or .* --allow-empty$"),
        ([], r"^2 categories \(cat, dog\) have no usable mask that is selected: .* change review.jsonl$"),
    ):
        with pytest.raises(UserError, match=says):
            check_mask_counts(["cat", "dog"], masks, kept, Path("masks"), False, Worker(1, 2))
    check_mask_counts(["cat", "dog"], masks, selected[:12], Path("masks"), True, Worker(1, 2))
    with pytest.raises(UserError, match="no usable mask that is selected"):
        check_mask_counts(["cat", "dog"], masks, [], Path("masks"), True, Worker(1, 2))
    show_mask_counts(["cat"], masks, Path("masks"))
    assert capsys.readouterr().out.splitlines()[1].split() == ["category", "masks", "usable"]
