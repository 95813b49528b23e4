# SPDX-License-Identifier: MIT
import json
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from namedmask.archive import (
    Archive,
    Retrieved,
    _Best,
    expect_distinct,
    prompts,
    read_archive,
    read_shards,
    search_index,
    top_photos,
    write_archive,
)
from namedmask.config import ArchiveConfig
from namedmask.errors import UserError
from namedmask.pseudolabel import work_of


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def in_shards(image, numbers, size):
    return [(image[i : i + size], numbers[i : i + size]) for i in range(0, len(image), size)]


def brute_force(image, numbers, text, count):
    scores = np.round(image.astype(np.float64) @ text.T.astype(np.float64), 6)
    order = [np.lexsort((numbers, -scores[:, k]))[:count] for k in range(len(text))]
    return [[(int(numbers[i]), scores[i, k]) for i in order[k]] for k in range(len(text))]


@settings(max_examples=40)
@given(
    photos=st.integers(1, 200),
    names=st.integers(1, 5),
    count=st.integers(1, 30),
    shard=st.integers(1, 64),
    levels=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_equals_brute_force_with_ties_by_photo_number(photos, names, count, shard, levels, seed):
    """Few distinct rows give many exact ties; the order is the documented one for any shards."""
    rng = np.random.default_rng(seed)
    image = unit(rng.standard_normal((levels, 16)))[rng.integers(0, levels, photos)]
    numbers = np.sort(rng.choice(10 * photos, photos, replace=False)).astype(np.int64)
    text = unit(rng.standard_normal((names, 16)))
    results = top_photos(in_shards(image, numbers, shard), text, count)
    expected = brute_force(image, numbers, text, count)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose([one.score for one in a], [s for _, s in b], atol=2e-6)
        if levels < 20:  # enough ties, and gaps between levels far wider than rounding
            assert [one.photo for one in a] == [p for p, _ in b]


def test_many_merges_equal_brute_force():
    rng = np.random.default_rng(0)
    image, numbers = unit(rng.standard_normal((5000, 8))).astype(np.float16), np.arange(5000)
    text = unit(rng.standard_normal((3, 8)))
    results = top_photos(in_shards(image, numbers, 100), text, 7)
    assert [[one.photo for one in a] for a in results] == [
        [p for p, _ in b] for b in brute_force(image, numbers, text, 7)
    ]


def test_a_photo_that_is_better_by_one_step_enters_a_full_list():
    """Also if its own score is only better by less than that and rounds up."""
    cosines = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.500_000_8, 0.500_000_9])
    image = np.stack([cosines, np.sqrt(1 - cosines**2)], 1).astype(np.float32)
    text = np.array([[1, 0]], np.float32)
    for shard in (1, 2, 7):
        assert top_photos(in_shards(image, np.arange(7), shard), text, 1) == [[(5, 0.500001, 0, 0.500001)]]


def test_scores_have_6_decimals():
    rng = np.random.default_rng(3)
    image, text = unit(rng.standard_normal((400, 8))), unit(rng.standard_normal((1, 8)))
    (entries,) = top_photos([(image, np.arange(400))], text, 400)
    scores = [one.score for one in entries]
    assert scores == [round(score, 6) for score in scores] and scores != [round(score, 5) for score in scores]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_do_not_change_the_others(value):
    """Both while lists are short and when they are full; a text that is not finite has no photos."""
    rng = np.random.default_rng(0)
    image, numbers = unit(rng.standard_normal((1200, 8))), np.arange(1200)
    text = unit(rng.standard_normal((3, 8)))
    bad = np.array([0, 7, 250, 1100])
    without = np.delete(image, bad, 0), np.delete(numbers, bad)
    image[bad, rng.integers(8, size=4)] = value
    for count in (5, 100):
        expected = [[photo for photo, _ in one] for one in brute_force(*without, text, count)]
        results = top_photos(in_shards(image, numbers, 300), text, count)
        assert [[candidate.photo for candidate in one] for one in results] == expected
    text[1] = value
    results = top_photos(in_shards(image, numbers, 300), text, 100)
    assert [[candidate.photo for candidate in one] for one in results] == [expected[0], [], expected[2]]


def test_empty_shards():
    text = unit(np.ones((2, 4)))
    empty = (np.zeros((0, 0), np.float16), np.zeros(0, np.int64))
    assert top_photos([empty], text, 3) == [[], []]
    assert top_photos([], text, 3) == [[], []]


def test_85_prompts_each_contain_the_name():
    assert len(prompts()) == 85
    assert all(prompt.format("traffic light").count("traffic light") == 1 for prompt in prompts())


def test_archive_round_trip(tmp_path):
    archive = Archive(["b", "a"], {"b": [Retrieved("x\udcff.jpg", 0.5)], "a": [Retrieved("y.jpg", None)]})
    write_archive(tmp_path / "archive.json", archive)
    assert read_archive(tmp_path / "archive.json") == archive
    data = json.loads((tmp_path / "archive.json").read_bytes())
    assert data["categories"] == ["b", "a"] and data["photos"]["b"] == [{"photo": "x\udcff.jpg", "score": 0.5}]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"categories": ["a"], "photos": {}}', '{"categories": 3}'])
def test_damaged_archive_raises_user_error(tmp_path, text):
    (tmp_path / "archive.json").write_text(text)
    with pytest.raises(UserError, match="is not an archive"):
        read_archive(tmp_path / "archive.json")
    with pytest.raises(UserError, match="is missing; create it with"):
        read_archive(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog", "cat"], "the name 'cat' is listed twice"),
        (["Cat", "dog", "cAT"], "'cAT' and 'Cat' differ only in case or Unicode form"),
        (["caf\u00e9", "cafe\u0301"], "differ only in case or Unicode form"),
        (["cat", "Background"], "'Background' is the name of class 0"),
        (["cat", " "], "empty name"),
    ],
)
def test_names_that_collide_raise_user_error(tmp_path, names, message):
    with pytest.raises(UserError, match=f"--categories: .*{message}"):
        expect_distinct(names, "--categories")
    write_archive(tmp_path / "archive.json", Archive(names, {name: [] for name in names}))
    with pytest.raises(UserError, match=r"archive.json: .*" + message):
        read_archive(tmp_path / "archive.json")


def test_many_names_are_checked_in_linear_time():
    began = time.process_time()
    expect_distinct([f"name {number}" for number in range(100_000)], "--categories")
    assert time.process_time() - began < 5  # each with all others: an hour


def test_photo_that_an_archive_lists_twice_is_one_photo():
    entries = [Retrieved("a.jpg", 0.5), Retrieved("b.jpg", 0.4), Retrieved("a.jpg", 0.3)]
    work = work_of(Archive(["cat", "dog"], {"cat": entries, "dog": entries[:1]}))
    assert work == [("a.jpg", [("cat", 0.5), ("dog", 0.5)]), ("b.jpg", [("cat", 0.4)])]


def test_candidates_are_few_and_merged_in_large_groups(monkeypatch):
    """A search is fast because almost no photo of the later shards becomes a candidate."""
    generator, merges, merge = torch.Generator().manual_seed(0), [], _Best._merge
    monkeypatch.setattr(_Best, "_merge", lambda self: (merges.append(self.pending_rows), merge(self)))
    best = _Best(3, 5)
    best.offer(torch.rand(50, 3, generator=generator), torch.arange(50))
    assert best.pending_rows == 15 and not merges  # the best 5 of each name
    for shard in range(1, 200):
        best.offer(torch.rand(50, 3, generator=generator), torch.arange(50 * shard, 50 * shard + 50))
    assert 3 <= len(merges) <= 8 and all(60 < rows < 80 for rows in merges)


def write_shard(path, photos, width=4):
    path.parent.mkdir(exist_ok=True)
    image = unit(np.random.default_rng(0).normal(size=(len(photos), width))).astype(np.float16)
    save_file({"image": image, "photo": np.array(photos, np.int64)}, path)


@pytest.mark.parametrize(
    ("photos", "width"), [([2, 5], 4), ([1, 4], 4), ([3, 3], 4), ([5, 4, 6], 4), ([5, 6], 5)], ids=str
)
def test_shards_that_do_not_continue_are_damaged(tmp_path, photos, width):
    write_shard(tmp_path / "00000.safetensors", [0, 2])
    write_shard(tmp_path / "00001.safetensors", [])
    write_shard(tmp_path / "00002.safetensors", photos, width)
    with pytest.raises(UserError, match=r"00002.safetensors: its rows do not continue"):
        list(read_shards(tmp_path))
    write_shard(tmp_path / "00002.safetensors", [3, 7, 8])
    assert [list(numbers) for _, numbers in read_shards(tmp_path)] == [[0, 2], [], [3, 7, 8]]


def test_embeddings_of_another_width_are_named(tmp_path):
    write_shard(tmp_path / "index" / "00000.safetensors", [0, 2, 3])
    message = f"{tmp_path / 'index'}: embeddings have 4 dimensions, those of the names 6; "
    with pytest.raises(UserError, match=re.escape(message)):
        search_index(tmp_path / "index", ["a"], np.eye(1, 6, dtype=np.float32), ArchiveConfig(), iter("abcd"))
