# SPDX-License-Identifier: MIT
"""MaskRecord, its RLE, shards, errors, and files that appear whole or not at all."""

import dataclasses
import json
import os
import pickle
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from namedmask.errors import DamagedFile
from namedmask.files import TEMPORARY_PREFIX, atomic_write, remove_stale
from namedmask.masks import (
    ErrorRecord,
    MaskRecord,
    assemble_errors,
    best_masks,
    cover,
    digest,
    encode_masks,
    errors_path,
    is_refined,
    mask_score,
    parse_photo,
    read_errors,
    read_lines,
    read_masks,
    read_shard,
    run_lengths,
    write_errors,
    write_shard,
)
from namedmask_kernels import Ragged

KEYS = ["photo", "size", "category", "category_score", "rle", "score", "area", "bbox"]
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))
file_names = st.binary(min_size=1).map(os.fsdecode) | st.text(min_size=1)
scores = st.floats(0, 1, width=32)


def record(photo="a.jpg", score=0.5, shape=(4, 6)):
    mask = np.zeros(shape, bool)
    mask[1:3, 2:5] = True
    return MaskRecord.from_mask(photo, mask, "cat", 0.25, score)


@given(file_names, masks, st.text(), st.none() | scores, scores)
def test_record_round_trip(photo, mask, category, category_score, score):
    created = MaskRecord.from_mask(photo, mask, category, category_score, score)
    line = created.to_json()
    assert line.isascii() and "\n" not in line
    assert list(json.loads(line)) == KEYS
    back = MaskRecord.from_json(line)
    assert back.to_json() == line
    assert (back.photo, back.category, back.size) == (photo, category, mask.shape)
    assert back.score == pytest.approx(score, abs=5.1e-5)
    assert back.category_score == pytest.approx(category_score, abs=5.1e-7)
    decoded = back.mask()
    assert decoded.dtype == bool and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask)


@given(masks)
def test_rle_area_and_box(mask):
    created = MaskRecord.from_mask("a.jpg", mask, "cat", None, 1.0)
    decoded = coco.decode({"size": list(mask.shape), "counts": created.rle.encode()})
    np.testing.assert_array_equal(decoded, mask)
    assert created.area == mask.sum()
    if not mask.any():
        assert created.bbox == (0, 0, 0, 0)
    else:
        rows, columns = np.nonzero(mask)
        box = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
        assert created.bbox == box and all(type(side) is int for side in created.bbox)


@given(st.lists(masks, min_size=1, max_size=4))
def test_records_of_a_batch_equal_those_of_single_masks(masks):
    batch = Ragged.pack([torch.from_numpy(mask) for mask in masks])
    for mask, encoded in zip(masks, encode_masks(batch), strict=True):
        record = MaskRecord.from_encoded("a", encoded, "cat", 0.25, 0.5)
        assert record == MaskRecord.from_mask("a", mask, "cat", 0.25, 0.5)
        assert record.to_json() == MaskRecord.from_mask("a", mask, "cat", 0.25, 0.5).to_json()
        assert encoded.score(0.75) == mask_score(mask, 0.75) and np.array_equal(encoded.decode(), mask)


def test_non_contiguous_masks_are_encoded_correctly():
    mask = np.random.default_rng(0).random((30, 41)) > 0.5
    for view in (mask.T, mask[::-1, ::2], np.asfortranarray(mask)):
        np.testing.assert_array_equal(MaskRecord.from_mask("a", view, "cat", None, 1.0).mask(), view)


@pytest.mark.parametrize("mask", [np.zeros((3, 4), np.uint8), np.zeros(3, bool), np.zeros((0, 4), bool)])
def test_masks_of_other_dtypes_or_shapes_raise_value_error(mask):
    with pytest.raises(ValueError, match="expected a bool mask"):
        MaskRecord.from_mask("a.jpg", mask, "cat", None, 1.0)


def test_scores_are_rounded_and_nan_raises_value_error():
    fields = json.loads(
        dataclasses.replace(record(score=np.float32(1 / 3)), category_score=np.float32(2 / 3)).to_json()
    )
    assert (fields["score"], fields["category_score"]) == (0.3333, 0.666667)
    with pytest.raises(ValueError):
        record(score=float("nan")).to_json()


def test_records_can_be_pickled():
    assert pickle.loads(pickle.dumps(record())) == record()


def compressed(runs):
    """The COCO string of run lengths, as its C code writes it."""
    text = ""
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        while True:
            low, value = value & 31, value >> 5
            more = value != (-1 if low & 16 else 0)
            text += chr(48 + low + 32 * more)
            if not more:
                break
    return text


@given(st.lists(st.integers(0, 40) | st.integers(0, 2**31 - 1), min_size=1, max_size=12))
def test_run_lengths_of_any_mask(runs):
    assert run_lengths(compressed(runs)).tolist() == runs


def test_run_lengths_have_a_few_characters_of_6_bits():
    assert run_lengths("0").tolist() == [0] and run_lengths("?").tolist() == [15] and run_lengths("@").tolist() == [-16]
    assert run_lengths("oooooo0").tolist() == [2**30 - 1] and run_lengths("ooooooo0") is None
    for text in ("/0", "p0", "0p", "\u00ff", "\ud800", "o", "P", "0 0", ""):
        assert run_lengths(text) is None, text


def test_run_lengths_whose_sum_overflows_are_rejected():
    runs = np.array([1 << 62] * 4 + [24])
    assert runs.sum() == 24 and not cover(runs, 24)
    assert cover(np.array([0, 24]), 24) and not cover(np.array([25, -1]), 24) and not cover(np.array([], int), 0)


def test_masks_whose_fields_do_not_fit_are_rejected():
    good = record()
    for change in ({"area": 5}, {"area": 7}, {"size": (4, 7)}, {"size": (3, 6)}):
        with pytest.raises(ValueError, match=r"mask of 'a.jpg': rle does not fit size .* and area"):
            dataclasses.replace(good, **change).mask()
    negative = dataclasses.replace(good, size=(1, 4), rle=compressed([2, 4, -2]), area=4)
    with pytest.raises(ValueError, match="does not fit"):
        negative.mask()


@pytest.mark.parametrize("rle", ["", "0", "zzzzzzzzz", "PPPPPPPPPPPPPPPP", "é", "84"])
def test_invalid_rle_raises_value_error(rle):
    with pytest.raises(ValueError):
        dataclasses.replace(record(), rle=rle).mask()


def changed(**fields):
    return json.dumps({**json.loads(record().to_json()), **fields})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "not a line of JSON"),
        ("{", "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ("[]", "got list"),
        ('{"photo": "a"}', "expected an object with the keys photo, size"),
        (changed(extra=1), "'extra'"),
        (changed(photo=1), "photo: expected a valid string, got 1"),
        (changed(rle=None), "rle: expected a valid string, got None"),
        (changed(size=[4]), "size.1: required"),
        (changed(size=[4, 6, 3]), "size: Tuple should have at most 2 items"),
        (changed(size="46"), "size: expected a valid tuple, got '46'"),
        (changed(size=[4, 0]), "size.1: expected above 0, got 0"),
        (changed(size=[4, 6.0]), "size.1: expected a valid integer, got 6.0"),
        (changed(bbox=[0, 0, 1, -1]), "bbox.3: expected at least 0, got -1"),
        (changed(area="6"), "area: expected a valid integer, got '6'"),
        (changed(area=True), "area: expected a valid integer, got True"),
        (changed(score=None), "score: expected a valid number"),
        (changed(score=True), "score: expected a valid number, got True"),
        (changed(score=10**400), "score: expected a valid number, got 1000"),
        (changed(score=float("nan")), "score: expected a finite number"),
        (changed(category_score="high"), "category_score: expected a valid number, got 'high'"),
    ],
)
def test_invalid_lines_raise_value_error_of_one_line(line, says):
    with pytest.raises(ValueError) as caught:
        MaskRecord.from_json(line)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_score_is_the_confidence_times_the_free_fraction_of_the_border():
    mask = np.zeros((4, 5), bool)
    assert mask_score(mask, 0.8) == 0
    mask[1:3, 1:3] = True
    assert mask_score(mask, 0.8) == 0.8
    mask[0, :] = mask[3, 0] = True  # 6 of 14 pixels of the border
    assert mask_score(mask, 0.7) == pytest.approx(0.7 * 8 / 14)


@pytest.mark.parametrize(
    ("rows", "columns", "touched"), [(0, 1, 1), (3, 2, 1), (1, 0, 1), (2, 4, 1), ([0, 3], [0, 4], 2)]
)
def test_all_sides_of_the_border_count(rows, columns, touched):
    mask = np.zeros((4, 5), bool)
    mask[1, 1] = mask[rows, columns] = True
    assert mask_score(mask, 1) == pytest.approx(1 - touched / 14)


def test_missing_and_empty_shards_are_damage(tmp_path):
    for name, shard_errors in (("00000", []), ("00001", [ErrorRecord("b.jpg", "pseudolabel", "vanished")])):
        for folder in ("masks", "refined"):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_errors(tmp_path / folder / f"{name}.errors.jsonl", shard_errors)
            write_shard(tmp_path / folder / f"{name}.jsonl", [] if shard_errors else [record()])
    assert is_refined(tmp_path)
    for folder in ("masks", "refined"):
        assert list(read_masks(tmp_path / folder)) == [record()]  # all photos of the other shard have failed
        (tmp_path / folder / "00000.jsonl").write_text("")
    assert list(read_masks(tmp_path / "refined")) == []
    with pytest.raises(
        DamagedFile, match=r"00000.jsonl: it is empty, and no photo of it has failed; .*namedmask pseudo"
    ):
        list(read_masks(tmp_path / "masks"))
    for folder in ("masks", "refined"):
        (tmp_path / folder / "00000.jsonl").unlink()
    assert list(read_masks(tmp_path / "masks")) == []  # the stage computes it
    with pytest.raises(DamagedFile, match=r"refined/00000.jsonl: it is missing; .*run `namedmask experts"):
        list(read_masks(tmp_path / "refined"))
    (tmp_path / "masks" / "00001.errors.jsonl").unlink()
    assert list(read_masks(tmp_path / "masks")) == []  # without a file of errors nothing is known


def test_lines_of_other_files_are_checked(tmp_path):
    (tmp_path / "a").write_text('{"photo": "x"}\n{"photo": 3}\n')
    names = read_lines(tmp_path / "a", parse_photo, "make it again")
    assert next(names) == "x"
    with pytest.raises(DamagedFile, match=r"a:2: photo: expected a valid string, got 3; .*: make it again"):
        next(names)
    with pytest.raises(DamagedFile, match=r"none: No such file or directory; .*: make it again"):
        next(read_lines(tmp_path / "none", parse_photo, "make it again"))


def test_digest_depends_on_masks_and_labels():
    digests = [digest([record()]), digest([record()], [1]), digest([record()] * 2), digest([])]
    assert len(set(digests)) == 4 and digests[0] == digest([record()], ()) and len(digests[0]) == 64


def test_best_masks_are_those_of_the_experts_once_they_exist(tmp_path):
    assert best_masks(tmp_path) == best_masks(str(tmp_path)) == tmp_path / "masks"
    for folder in ("refined", "refining"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "00000.jsonl", [])
    assert best_masks(tmp_path) == tmp_path / "masks"
    (tmp_path / "refining" / "00000.jsonl").unlink()
    assert best_masks(tmp_path) == tmp_path / "refined"


def test_shards_are_read_in_order(tmp_path):
    for number in (100_000, 0, 99_999, 2):
        shard = tmp_path / f"{number:05}.jsonl"
        write_errors(errors_path(shard), [ErrorRecord("bad.jpg", "pseudolabel", "empty file")])
        write_shard(shard, [record(f"{number}/{i}") for i in range(2)])
    (tmp_path / f"{TEMPORARY_PREFIX}0123").write_text("half a shard")
    names = [r.photo for r in read_masks(tmp_path)]
    assert names == [f"{number}/{i}" for number in (0, 2, 99_999, 100_000) for i in range(2)]
    assert list(read_shard(tmp_path / "00002.jsonl")) == [record("2/0"), record("2/1")]


def test_errors_name_file_and_line(tmp_path):
    shard = tmp_path / "00000.jsonl"
    shard.write_text(record().to_json() + "\n{}\n")
    with pytest.raises(ValueError, match=r"00000\.jsonl:2: expected an object"):
        list(read_shard(shard))


def test_failing_writer_keeps_the_existing_file(tmp_path):
    shard = tmp_path / "00000.jsonl"

    def failing():
        yield record()
        raise RuntimeError("decoder died")

    with pytest.raises(RuntimeError):
        write_shard(shard, failing())
    assert list(tmp_path.iterdir()) == []
    shard.write_text("before")
    with pytest.raises(RuntimeError):
        write_shard(shard, failing())
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


KILLED = """
import os, pathlib, sys
from namedmask.files import atomic_write
pathlib.Path.replace = lambda *_: os._exit(9)
with atomic_write(sys.argv[1]) as file:
    file.write(b"whole")
"""


def test_writer_killed_before_the_rename_leaves_no_shard(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "00000.jsonl")], check=False)
    assert killed.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(TEMPORARY_PREFIX) and left.read_bytes() == b"whole"
    (tmp_path / "keep.jsonl").touch()
    remove_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep.jsonl"]


def test_file_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, type(tmp_path).replace

    def note_fsync(fd):
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else os.fstat(fd).st_size)
        fsync(fd)

    def note_replace(*paths):
        calls.append("rename")
        return replace(*paths)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(type(tmp_path), "replace", note_replace)
    with atomic_write(tmp_path / "x") as file:
        file.write(b"12345")
    assert calls == [5, "rename", "folder"]


def test_new_files_have_the_usual_permissions(tmp_path):
    with atomic_write(tmp_path / "x"):
        pass
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


@settings(max_examples=25)
@given(st.lists(st.builds(ErrorRecord, file_names, st.text(), st.text())))
def test_errors_round_trip(tmp_path_factory, errors):
    path = tmp_path_factory.mktemp("errors") / "00000.errors.jsonl"
    write_errors(path, errors)
    assert list(read_errors(path)) == errors
    assert path.read_bytes().count(b"\n") == len(errors)


def test_merged_errors_are_unique_and_sorted_by_stage_then_shard(tmp_path):
    late = [ErrorRecord("c.jpg", "pseudolabel", "vanished"), ErrorRecord("a.jpg", "index", "empty file")]
    early = [ErrorRecord("z.jpg", "index", "truncated"), ErrorRecord("c.jpg", "pseudolabel", "vanished")]
    parts = [tmp_path / "00000.errors.jsonl", tmp_path / "00001.errors.jsonl", tmp_path / "00002.errors.jsonl"]
    for part, errors in zip(parts, (late, early, []), strict=True):
        write_errors(part, errors)
    out = tmp_path / "errors.jsonl"
    for _ in range(2):  # merging again after a resume adds no duplicates
        assemble_errors(out, parts)
        assert list(read_errors(out)) == [late[1], early[0], late[0]]


def test_invalid_error_lines_raise_value_error(tmp_path):
    path = tmp_path / "errors.jsonl"
    path.write_text('{"photo": "a", "stage": "index", "reason": 3}\n')
    with pytest.raises(ValueError, match=r"errors\.jsonl:1: reason: expected a valid string, got 3"):
        list(read_errors(path))
