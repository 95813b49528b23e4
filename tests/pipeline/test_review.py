# SPDX-License-Identifier: MIT
"""The review of a run: its file, and the masks that it chooses."""

from __future__ import annotations

import numpy as np
import pytest

from namedmask.errors import DamagedFile, UserError
from namedmask.masks import MaskRecord, write_errors, write_shard
from namedmask.review import read_review, reviewed_masks, warn_of_others, write_review

REVIEW = {("a.jpg", "cat"): "reject", ("b.jpg", "cat"): "detector", ("b.jpg", "dog"): "accept"}


def record(photo: str, score: float, category: str = "cat") -> MaskRecord:
    return MaskRecord.from_mask(photo, np.ones((1, 1), bool), category, None, score)


def masks(score: float) -> list[MaskRecord]:
    return [record("a.jpg", score), record("b.jpg", score), record("b.jpg", score, "dog"), record("c.jpg", score)]


def write_masks(folder, records):
    folder.mkdir()
    write_errors(folder / "00000.errors.jsonl", [])
    write_shard(folder / "00000.jsonl", records)


def test_review_round_trip_with_names_that_are_not_utf8(tmp_path):
    assert read_review(tmp_path) == {}
    for review in (REVIEW, {("\udcff\n.jpg", 'ca"t'): "reject"}, {}):
        write_review(str(tmp_path), review)
        assert read_review(tmp_path) == review and list(read_review(str(tmp_path))) == list(review)


def test_the_last_verdict_counts(tmp_path):
    line = '{"photo": "a", "category": "cat", "verdict": "%s"}\n'
    (tmp_path / "review.jsonl").write_text(line % "reject" + line % "accept")
    assert read_review(tmp_path) == {("a", "cat"): "accept"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not a line of JSON"),
        ('{"photo": "a", "verdict": "accept"}', "expected an object with the keys photo, category, verdict"),
        (
            '{"photo": "a", "category": "cat", "verdict": "ok"}',
            "verdict: expected 'accept', 'reject' or 'detector', got 'ok'",
        ),
        ('{"photo": "a", "category": "cat", "verdict": ["accept"]}', "verdict: expected 'accept'"),
        ('{"photo": 1, "category": "cat", "verdict": "accept"}', "photo: expected a valid string, got 1"),
    ],
)
def test_invalid_lines_name_the_file_and_the_line(tmp_path, line, says):
    (tmp_path / "review.jsonl").write_text('{"photo": "a", "category": "cat", "verdict": "accept"}\n' + line)
    with pytest.raises(DamagedFile, match=rf"review\.jsonl:2: {says}.*correct or delete the line") as error:
        read_review(tmp_path)
    assert "\n" not in str(error.value)


def test_masks_with_the_review_applied(tmp_path):
    write_masks(tmp_path / "masks", masks(0.25))
    assert list(reviewed_masks(tmp_path)) == masks(0.25)
    write_review(tmp_path, REVIEW)
    assert list(reviewed_masks(tmp_path)) == masks(0.25)[1:]
    write_masks(tmp_path / "refined", masks(0.5))
    assert list(reviewed_masks(str(tmp_path))) == [record("b.jpg", 0.25), *masks(0.5)[2:]]


def test_verdicts_about_no_mask_are_said(tmp_path, printing, capsys):
    keys = [record.key for record in masks(0.5)]
    warn_of_others(tmp_path, {("a.jpg", "cat"): "reject"}, keys)
    assert not capsys.readouterr().err
    warn_of_others(tmp_path, {**REVIEW, ("a.jpg", "cta"): "reject"}, keys)
    assert "review.jsonl: verdicts about no mask: 1 of 4, such as 'a.jpg' (cta)" in capsys.readouterr().err


def test_a_missing_mask_of_the_detector_is_an_error(tmp_path):
    write_masks(tmp_path / "refined", masks(0.5))
    write_review(tmp_path, REVIEW)
    with pytest.raises(UserError, match=r"review\.jsonl chooses the detector's mask of 'b\.jpg' \(cat\), but .*masks"):
        list(reviewed_masks(tmp_path))
