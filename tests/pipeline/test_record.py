# SPDX-License-Identifier: MIT
"""stages.json: what is recorded, what counts as a difference, and records that are damaged."""

from __future__ import annotations

import json
import os

import pytest

from namedmask import record
from namedmask.config import RunConfig, find_setting
from namedmask.errors import DamagedFile, UserError
from namedmask.record import (
    Digests,
    RunRecord,
    StageRecord,
    expect_no_files,
    read_config,
    read_record,
    stage_record,
)

STAGE = {"settings": {}, "upstream": {}, "files": {}, "made_with": {}}


def test_differences_are_one_line_each():
    old = StageRecord({"detector.tau": 0.3}, {"archive.photos_per_category": 5})
    assert old.differences(StageRecord({"detector.tau": 0.3}, {"archive.photos_per_category": 5})) == []
    assert old.differences(StageRecord({"detector.tau": 0.5}, {"archive.photos_per_category": 7})) == [
        "archive.photos_per_category: 5 -> 7",
        "detector.tau: 0.3 -> 0.5",
    ]
    # What is not recorded had its default; own settings count, not those of earlier stages.
    assert old.differences(StageRecord({"detector.image_size": 448})) == []
    assert old.differences(StageRecord({"detector.image_size": 480})) == ["detector.image_size: 448 -> 480"]
    assert StageRecord({"detector.tau": 1}, {"detector.tau": 2}).differences(StageRecord({"detector.tau": 1})) == []


def test_files_are_compared_by_content():
    old = StageRecord({"detector.weights": "/a"}, files={"detector.weights": "1"})
    assert old.differences(StageRecord({"detector.weights": "/b"}, files={"detector.weights": "1"})) == []
    changed = old.differences(StageRecord({"detector.weights": "/a"}, files={"detector.weights": "2"}))
    assert changed == ["detector.weights: '/a' -> '/a' (different content)"]
    assert old.differences(StageRecord({"detector.weights": None})) == ["detector.weights: '/a' -> None"]
    assert StageRecord().differences(old) == ["detector.weights: None -> '/a'"]


def test_what_is_no_file_is_named(tmp_path):
    one = find_setting("detector.weights")
    for path, reason in ((tmp_path, "not a regular file"), (tmp_path / "none", "there is no such file")):
        with pytest.raises(UserError, match=f"^--detector-weights {path}: {reason}$"):
            list(Digests().of(one, str(path)))


def test_long_values_are_shortened():
    old, new = StageRecord({"categories": "x" * 58}), StageRecord({"categories": "y" * 59})
    assert old.differences(new) == [f"categories: {'x' * 58!r} -> '{'y' * 56}..."]


@pytest.mark.parametrize("kind", [list, "/".join])
def test_shortened_values_show_where_they_differ(kind):
    names = [f"category {number}" for number in range(30)]
    before, after = (kind(one) for one in (names, [*names[:20], "another one", *names[21:]]))
    (line,) = StageRecord({"categories": before}).differences(StageRecord({"categories": after}))
    old, new = line.removeprefix("categories: ").split(" -> ")
    assert "category 20" in old and "another one" in new and len(old) == len(new) == 60
    assert old.startswith("...") and old.endswith("...")


def test_digest_is_computed_again_when_the_file_changes(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(record, "sha256", lambda path: computed.append(path) or f"digest {len(computed)}")
    one, path, digests = find_setting("detector.weights"), tmp_path / "w", Digests()
    with pytest.raises(UserError, match=r"--detector-weights .*w: there is no such file"):
        list(digests.of(one, str(path)))
    path.write_text("1")
    assert list(digests.of(one, str(path))) == list(digests.of(one, str(path))) == ["digest 1"]
    os.utime(path, ns=(1, 1))
    assert list(digests.of(one, str(path))) == ["digest 2"] and digests[str(path)] == (1, 1, "digest 2")
    path.write_text("22")
    os.utime(path, ns=(1, 1))
    assert list(digests.of(one, str(path))) == ["digest 3"]
    path.unlink()
    assert list(digests.of(one, str(path))) == ["digest 3"]


def test_stage_record_holds_settings_and_digests(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "sha256", lambda path: f"<{path.name}>")
    for name in ("e.safetensors", "e.json", "a", "b"):
        (tmp_path / name).touch()
    config = RunConfig.model_validate(
        {
            "photos": "p",
            "index": {"embeddings": str(tmp_path / "e.safetensors")},
            "detector": {"name": "cluster-vote", "more_backbones": [f"x={tmp_path}/a", "y", f"z={tmp_path}/b"]},
        }
    )
    made = stage_record(config, ["index", "categories"], Digests())
    assert made.files == {"index.embeddings": "<e.safetensors> <e.json>"} and made.upstream == made.made_with == {}
    assert {name.partition(".")[0] for name in made.settings} == {"index", "categories"}
    made = stage_record(config, ["detector", "experts"], Digests())
    assert made.files == {"detector.more_backbones": "x <a> y z <b>"}
    assert made.settings["detector.tau"] == 0.2 and made.settings["experts.scale"] == [0.1, 1.0]


def test_own_settings_of_a_stage_count():
    """Not what later stages recorded of them."""
    stages = {
        "archive": StageRecord({"archive.photos_per_category": 5}, {"index.shard_size": 1}),
        "pseudolabel": StageRecord({"detector.tau": 0.3}, {"archive.photos_per_category": 6, "index.shard_size": 2}),
    }
    assert RunRecord("p", stages).settings() == {
        "archive.photos_per_category": 5,
        "detector.tau": 0.3,
        "index.shard_size": 2,
    }


def test_record_round_trip(tmp_path):
    assert read_record(tmp_path) == RunRecord() == read_record(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not a run folder \(stages.json is missing\)"):
        read_config(tmp_path)
    stage = StageRecord({"detector.tau": 0.3}, {"categories": ["cat"]}, {"detector.weights": "1"}, {"torch": "2"})
    replaced = RunRecord("old", {"archive": StageRecord()})
    written = RunRecord("/p", {"pseudolabel": stage}, Digests({"/w": (1, 2, "3")}), replaced)
    written.write(tmp_path)
    assert read_record(tmp_path) == written
    written.write(tmp_path, "segment.json")
    assert read_record(tmp_path, "segment.json") == written
    config = read_config(tmp_path)
    assert (config.photos, config.detector.tau, config.categories) == ("/p", 0.3, ["cat"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder; choose another --out"):
        read_record(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"photos": 3}, "photos: expected a path"),
        ({"stages": {"a": STAGE | {"settings": []}}}, "of another type"),
        ({"stages": {"a": STAGE | {"made_with": {"torch": 2}}}}, "of another type"),
        ({"stages": {"a": STAGE | {"files": {"w": None}}}}, "of another type"),
        ({"stages": {"a": STAGE | {"odd": {}}}}, "TypeError"),
        ({"stages": {"a": STAGE | {"settings": {"a": 1, "a.b": 2}}}}, "TypeError"),
        ({"digests": {"/w": [1, "2", "3"]}}, "digests: expected"),
        ({"digests": {"/w": [1, 2]}}, "digests: expected"),
        ({"digests": []}, "AttributeError"),
        ({"replaced": {"photos": 3, "stages": {}}}, "photos: expected a path"),
        ({"replaced": {"photos": "p"}}, "KeyError: 'stages'"),
        ({"outdating": ["b"]}, "outdating: expected names of stages"),
        ({"photos": float("nan")}, "NaN is not JSON"),
    ],
)
def test_damaged_record_is_named(tmp_path, change, reason):
    good = {"photos": "p", "stages": {"archive": STAGE}, "digests": {"/w": [1, 2, "3"]}, "replaced": None}
    good |= {"outdating": []}
    (tmp_path / "stages.json").write_text(json.dumps(good))
    assert read_record(tmp_path).photos == "p"
    (tmp_path / "stages.json").write_text(json.dumps(good | change))
    with pytest.raises(DamagedFile, match=f"stages.json: .*{reason}.*: choose another --out, or restore"):
        read_record(tmp_path)


def test_recorded_settings_that_do_not_fit_are_named(tmp_path):
    RunRecord("p", {"pseudolabel": StageRecord({"detector.tau": 7.0})}).write(tmp_path)
    with pytest.raises(DamagedFile, match=r"stages.json: .*detector.tau .*expected at most 1, got 7.0"):
        read_config(tmp_path)


def test_files_that_no_run_has_made_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    expect_no_files(tmp_path, ["none", "empty", "link"])
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "to_file").symlink_to("file")
    for name in ("file", "full", "to_file"):
        message = rf"{name} exists and was not made by a run \(.*segment.json does not list it\)"
        with pytest.raises(UserError, match=message):
            expect_no_files(tmp_path, ["none", name], "segment.json")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="dangling is a link to nowhere, which does not exist"):
        expect_no_files(tmp_path, ["dangling"])


def test_device_is_recorded(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    for available, device in ((True, "card"), (False, f"cpu ({os.uname().machine})")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        made = record.made_with()
        assert made["device"] == device and made["torch"] == torch.__version__
