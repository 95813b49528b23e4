# SPDX-License-Identifier: MIT
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from namedmask import archive, curation
from namedmask.archive import read_archive, search_index
from namedmask.config import ArchiveConfig
from namedmask.curation import (
    FILE,
    Candidate,
    Dropped,
    Flag,
    better_matches,
    fill_places,
    near_duplicates,
    read_dropped,
    summary,
    write_dropped,
)
from namedmask.errors import DamagedFile
from small_world import command, files_of, small_run

DUPLICATE, BETTER = Flag("near-duplicate", 0, 0.99), Flag("better-match", 1, 0.5)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def search(folder, image, text, categories, shard=3, **config):
    """The archive and the dropped photos; the photos are called after their numbers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for first in range(0, len(image), shard):
        part = image[first : first + shard]
        numbers = np.arange(first, first + len(part), dtype=np.int64)
        save_file({"image": part.astype(np.float16), "photo": numbers}, folder / f"{first // shard:05}.safetensors")
    names = iter([str(number) for number in range(len(image))])
    found, dropped = search_index(folder, categories, unit(text), ArchiveConfig(**config), names)
    return {name: [entry.photo for entry in photos] for name, photos in found.photos.items()}, dropped


@settings(max_examples=60)
@given(
    photos=st.integers(0, 40),
    directions=st.integers(1, 40),
    count=st.integers(1, 20),
    block=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_near_duplicates_are_those_of_a_comparison_with_each_kept_photo(photos, directions, count, block, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((directions, 3))[rng.integers(0, directions, photos)]
    rows = unit(rows + 0.05 * rng.standard_normal(rows.shape))
    kept, expected = [], {}
    for number in range(photos):
        if len(kept) == count:
            break
        cosines = [float(rows[number] @ rows[one]) for one in kept]
        if cosines and max(cosines) > 0.99:
            expected[number] = kept[int(np.argmax(cosines))], max(cosines)
        else:
            kept.append(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curation, "BLOCK", block)
        found = near_duplicates(torch.from_numpy(rows), 0.99, count)
    assert {number: why.other for number, why in found.items()} == {n: other for n, (other, _) in expected.items()}
    for number, why in found.items():
        assert why.reason == "near-duplicate" and why.similarity == pytest.approx(expected[number][1], abs=2e-6)


def test_a_similarity_equal_to_the_threshold_is_no_near_duplicate_and_ties_name_the_best():
    rows = torch.tensor([[1, 0], [0, 1], [1, 0], [0.6, 0.8], [0.5**0.5, 0.5**0.5]])
    assert near_duplicates(rows, 0.8, 5).keys() == {2, 4}
    assert near_duplicates(rows, 0.7, 5)[4] == Flag("near-duplicate", 0, 0.707107)  # equally similar to 1
    assert near_duplicates(rows, 1.0, 5) == {}


@settings(max_examples=100)
@given(
    reasons=st.lists(st.sampled_from([None, DUPLICATE, BETTER]), max_size=30),
    count=st.integers(1, 20),
)
def test_every_place_is_given_while_there_are_candidates(reasons, count):
    flags = {number: why for number, why in enumerate(reasons) if why}
    places, lost = fill_places(len(reasons), flags, count)
    assert len(places) == len(set(places)) == min(count, len(reasons))
    groups = [[n for n in places if flags.get(n) == why] for why in (None, DUPLICATE, BETTER)]
    assert places == [n for group in groups for n in sorted(group)]
    left_out = [n for n in range(len(reasons)) if n not in places]
    for better, worse in ((None, DUPLICATE), (DUPLICATE, BETTER), (None, BETTER)):
        assert not (any(flags.get(n) == better for n in left_out) and any(reasons[n] == worse for n in places))
    # Without flags, the first `count` would have the places.
    assert lost == {n: flags[n] for n in left_out if n < count}


def test_equal_matches_are_not_flagged():
    tie, other, own = Candidate(3, 0.5, 0, 0.5), Candidate(4, 0.5, 0, 0.500001), Candidate(5, 0.4, 1, 0.4)
    assert better_matches([tie, other, own]) == {1: Flag("better-match", 0, 0.500001)}


# A photo per row: how well it matches "car" and "boat", and a direction of its own.
CARS = unit(
    np.array([[9, 1, 5, 0], [8, 1, 5, 0.01], [7, 8, 0, 5], [6, 2, 0, 9], [1, 9, 0, 1], [2, 9, 9, 0]], np.float32)
)


def brief(dropped):
    return dropped.photo, dropped.category, dropped.reason, dropped.other


def test_photos_lose_their_places_to_the_next(tmp_path):
    text, names = np.eye(2, 4), ["car", "boat"]
    plain = {"best_match_only": False, "photos_per_category": 3}
    assert search(tmp_path / "i", CARS, text, names, **plain) == ({"car": ["0", "1", "2"], "boat": ["4", "5", "2"]}, [])
    found, dropped = search(tmp_path / "i", CARS, text, names, photos_per_category=3)
    assert found == {"car": ["0", "1", "3"], "boat": ["4", "5", "2"]}
    assert [(one.photo, one.category, one.reason, one.other) for one in dropped] == [
        ("2", "car", "better-match", "boat")
    ]
    assert dropped[0].score == pytest.approx(7 / 138**0.5, abs=1e-3)
    assert dropped[0].similarity == pytest.approx(8 / 138**0.5, abs=1e-3)
    found, dropped = search(tmp_path / "i", CARS, text, names, **plain, near_duplicate_threshold=0.99)
    assert found == {"car": ["0", "2", "3"], "boat": ["4", "5", "2"]}
    assert [(one.photo, one.category, one.reason, one.other) for one in dropped] == [
        ("1", "car", "near-duplicate", "0")
    ]
    assert 0.99 < dropped[0].similarity < 1
    # Both: three candidates are left for two places and one near-duplicate.
    found, dropped = search(tmp_path / "i", CARS, text, names, photos_per_category=3, near_duplicate_threshold=0.99)
    assert found == {"car": ["0", "3", "1"], "boat": ["4", "5", "2"]}
    assert list(map(brief, dropped)) == [("2", "car", "better-match", "boat")]


def test_one_name_has_no_better_match(tmp_path):
    found, dropped = search(tmp_path / "i", CARS, np.eye(1, 4), ["car"], photos_per_category=4)
    assert found == {"car": ["0", "1", "2", "3"]} and not dropped


def test_a_name_that_another_one_contains_keeps_its_photos(tmp_path):
    """All photos match "sports car" better than "car", whose archive is that of a run with this name alone."""
    rng = np.random.default_rng(0)
    image = unit(np.hstack([np.full((8, 1), 2), np.full((8, 1), 3), rng.random((8, 2))]))
    found, dropped = search(tmp_path / "i", image, np.eye(2, 4), ["car", "sports car"], photos_per_category=5)
    assert found["car"] == search(tmp_path / "i", image, np.eye(1, 4), ["car"], photos_per_category=5)[0]["car"]
    assert len(found["sports car"]) == 5 and not dropped


def test_candidates_come_from_the_pool_alone(tmp_path):
    """Photos far below the places match nothing well, even if this category is the best of them."""
    image = unit(np.array([[5 - 0.1 * n, 9, 1, 0] for n in range(12)] + [[1, 0, 9, 0]], np.float32))
    assert curation.POOL == 4
    assert search(tmp_path / "i", image, np.eye(2, 4), ["a", "b"], photos_per_category=3)[0]["a"] == ["0", "1", "2"]
    assert search(tmp_path / "i", image, np.eye(2, 4), ["a", "b"], photos_per_category=4)[0]["a"] == [
        "12",
        "0",
        "1",
        "2",
    ]


@settings(max_examples=15)
@given(shard=st.integers(1, 40), rows=st.sampled_from([1, 30, 1 << 19]), seed=st.integers(0, 99))
def test_archives_do_not_depend_on_shards_or_memory(tmp_path_factory, shard, rows, seed):
    rng = np.random.default_rng(seed)
    image = unit(rng.standard_normal((9, 8)))[rng.integers(0, 9, 40)]
    image = unit(image + 0.01 * rng.standard_normal(image.shape))
    folder, text, names = tmp_path_factory.mktemp("index") / "i", unit(rng.standard_normal((3, 8))), ["a", "b", "c"]
    config = {"photos_per_category": 4, "near_duplicate_threshold": 0.98}
    expected = search(folder, image, text, names, 40, **config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "ROWS", rows)
        assert search(folder, image, text, names, shard, **config) == expected


def test_dropped_photos_round_trip_and_damage(tmp_path):
    lines = [
        Dropped("x\udcff.jpg", "cat", 0.27, "near-duplicate", "y.jpg", 0.998),
        Dropped("z.jpg", "cat", 0.25, "better-match", "dog", 0.28),
    ]
    write_dropped(tmp_path / FILE, lines)
    assert list(read_dropped(tmp_path / FILE)) == lines
    expected = {"photo": "z.jpg", "category": "cat", "score": 0.25, "reason": "better-match", "other": "dog"}
    assert json.loads((tmp_path / FILE).read_bytes().splitlines()[1]) == expected | {"similarity": 0.28}
    (tmp_path / FILE).write_text('{"photo": "a"}\n')
    with pytest.raises(DamagedFile, match=rf"{FILE}:1: .*: delete it"):
        list(read_dropped(tmp_path / FILE))


@pytest.mark.parametrize(
    ("duplicates", "matches", "words"),
    [
        (0, 0, ""),
        (1, 0, "1 near-duplicate"),
        (0, 1, "1 photo that matches another category better"),
        (1200, 31, "1,200 near-duplicates and 31 photos that match another category better"),
    ],
)
def test_summary(duplicates, matches, words):
    assert summary({"near-duplicate": duplicates, "better-match": matches}) == words


def test_a_run_says_what_was_dropped(tmp_path, detector_options, one_thread):
    """Two photos of each category are retrieved; cat0002.jpg has the embedding of cat0000.jpg."""
    from safetensors.numpy import load_file

    words, _ = small_run(tmp_path, 8, detector_options)
    embeddings = tmp_path / "embeddings.safetensors"
    tensors = load_file(embeddings)
    tensors["image"][2] = tensors["image"][0]
    save_file(tensors, embeddings)
    out = tmp_path / "out"
    options = [*words, "--photos-per-category", 2, "--out", out]
    paper = command(*options, "--no-best-match-only")
    assert paper.exit_code == 0 and "dropped" not in paper.output and (out / FILE).read_bytes() == b""
    assert "dropped from the archive" not in (out / "report.html").read_text()
    strict = [*options, "--near-duplicate-threshold", 0.99, "--best-match-only"]
    assert "archive.near_duplicate_threshold: 1.0 -> 0.99" in command(*strict).output
    result = command(*strict, "--update")
    assert result.exit_code == 0, result.output
    assert f"dropped 1 near-duplicate: {out / FILE}" in result.output.replace("\n", "")
    assert next(read_dropped(out / FILE)).other == "cat0000.jpg"
    assert [entry.photo for entry in read_archive(out / "archive.json").photos["cat"]] == ["cat0000.jpg", "cat0004.jpg"]
    assert "1 near-duplicate, see archive.dropped.jsonl" in (out / "report.html").read_text()
    strict[-4] = tmp_path / "all"
    assert command(*strict).exit_code == 0
    updated, whole = files_of(out), files_of(tmp_path / "all")
    for name in ("archive.json", FILE, "masks/00000.jsonl"):
        assert updated[name] == whole[name]
