# SPDX-License-Identifier: MIT
"""The settings: defaults and limits are published, so that a change must be deliberate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from namedmask import config
from namedmask.config import (
    DetectorConfig,
    ExpertTraining,
    IndexConfig,
    RunConfig,
    SegmenterTraining,
    Setting,
    find_setting,
    flatten,
    make_config,
    merge,
    nearest,
    nest,
    read_settings,
    settings,
    to_toml,
)
from namedmask.errors import UserError

LISTING = Path(__file__).with_name("settings.txt")


def listing() -> str:
    """All settings with limits, default and option, one per line."""
    return "".join(f"{s.name} | {limits(s)} | {s.default} | {s.choices or s.flag}\n" for s in settings())


def limits(one: Setting) -> str:
    """Limits of a setting, of the number of its elements, and of each element."""
    lengths = [repr(m) for m in one.field.metadata if "Len" in repr(m)]
    elements = [
        repr(m.metadata)
        for arg in get_args(one.kind)
        for m in getattr(arg, "__metadata__", ())
        if one.is_list and hasattr(m, "metadata")
    ]
    return ", ".join(filter(None, [one.limits, *lengths, *elements]))


def test_names_limits_and_defaults_are_the_published_ones():
    assert listing() == LISTING.read_text(encoding="utf-8"), f"if this is intended, run python {__file__}"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("segmenter.scale", [(0.001, 0.001), (0.5, 100), (100, 100)], [(0.0009, 1), (1, 0.99), (1, 100.1), (0, 1)]),
        ("segmenter.blur_sigma", [(0.001, 100)], [(2, 1)]),
        ("saliency.scale", [(0.001, 1), (1, 1)], [(0.5, 1.01), (0.0005, 1)]),
        ("segmenter.paste_objects", [(0, 0), (0, 100), (100, 100), (2, 2)], [(-1, 0), (1, 0), (0, 101)]),
        ("experts.paste_objects", [(0, 0)], [(0, 1), (1, 1)]),
        (
            "segmenter.color_jitter",
            [(0, 0, 0, 0), (10, 10, 10, 0.5)],
            [(-0.1, 0, 0, 0), (10.1, 0, 0, 0), (0, 10.1, 0, 0), (0, 0, 10.1, 0), (0, 0, 0, 0.51), (0, 0, 0, -0.1)],
        ),
    ],
)
def test_ranges_are_checked(name, good, bad):
    for value in good:
        made = make_config({"photos": "p", **nest({name: value})})
        assert flatten(made.model_dump())[name] == value
        assert find_setting(name).parse(",".join(map(str, value))) == value
    for value in bad:
        with pytest.raises(UserError, match=rf"^wrong settings: {name}.*: (expected|an expert)"):
            make_config({"photos": "p", **nest({name: value})})


def test_sections_are_strict_and_fixed():
    made = IndexConfig()
    with pytest.raises(ValidationError):
        made.shard_size = 3
    for values in ({"index": {"shard_size": "5"}}, {"detector": {"horizontal_flip": 1}}, {"photos": 3}):
        with pytest.raises(UserError, match="wrong settings"):
            make_config({"photos": "p", **values})
    assert make_config({"photos": "p", "detector": {"tau": 1, "weights": ""}}).detector.weights is None
    with pytest.raises(ValidationError):
        DetectorConfig(more_backbones=["a"])
    assert DetectorConfig(name="cluster-vote", more_backbones=["a"]).more_backbones == ["a"]


def test_settings_without_files():
    made = IndexConfig(clip_weights="/w", embeddings="/e")
    assert made.without_files() == {"clip_model": IndexConfig().clip_model, "shard_size": 1024}
    assert "encoder" in SegmenterTraining().without_files() and "mode" in ExpertTraining().without_files()


@pytest.mark.parametrize(
    ("name", "flag", "metavar", "limits", "default"),
    [
        ("photos", None, "PHOTOS", "", ...),
        ("categories", "--categories", "NAME,...", "", []),
        ("index.clip_weights", "--clip-weights", "FILE", "", None),
        ("index.embeddings", "--embeddings", "FILE", "", None),
        ("detector.name", "--detector", "spectral|cluster-vote|selfmask", "", "spectral"),
        ("detector.more_backbones", "--more-backbones", "NAME[=FILE],...", "", []),
        ("detector.tau", "--tau", "NUMBER", "-1<=x<=1", 0.2),
        ("detector.scales", "--scales", "NUMBER,...", "", [1.0]),
        ("detector.horizontal_flip", "--horizontal-flip", "true|false", "", False),
        ("refine.crf.confidence", None, "NUMBER", "0.5<x<1", 0.999),
        ("segmenter.scale", "--scale", "NUMBER,NUMBER", "", [0.1, 1.0]),
        ("segmenter.paste_objects", "--paste-objects", "INTEGER,INTEGER", "", [0, 1]),
        ("segmenter.dropout", "--dropout", "NUMBER", "0<=x<1", 0.1),
        ("segmenter.seed", "--seed", "INTEGER", "0<=x<=4294967295", 0),
    ],
)
def test_a_setting_describes_itself(name, flag, metavar, limits, default):
    one = find_setting(name)
    assert (one.flag, one.metavar, one.limits, one.is_list) == (flag, metavar, limits, "," in metavar)
    assert name == "photos" or one.default == default
    assert bool(one.files) == ("FILE" in metavar) and one.choices == tuple(
        metavar.split("|") if name == "detector.name" else ()
    )
    assert (one.files.companions if one.files else ()) == ((".json",) if name == "index.embeddings" else ())


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("categories", "cat, traffic light,,", ["cat", "traffic light"]),
        ("categories", "[cat]", ["[cat]"]),
        ("detector.scales", "[1, 0.5]", [1.0, 0.5]),
        ("detector.scales", "1,0.5", [1.0, 0.5]),
        ("segmenter.scale", "[0.5,1]", (0.5, 1.0)),
        ("index.clip_weights", "", None),
        ("index.clip_weights", "NONE", None),
        ("index.clip_weights", "w", "/here/w"),
        ("detector.more_backbones", "a,b=w,c=", ["a", "b=/here/w", "c="]),
        ("detector.backbone", "none", "none"),
        ("detector.center_features", "yes", True),
        ("archive.photos_per_category", "7", 7),
    ],
)
def test_texts_are_parsed(name, text, value, monkeypatch):
    monkeypatch.setattr(config, "absolute", lambda path: f"/here/{path}")
    assert find_setting(name).parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("detector.scales", "[1,2", "detector.scales (--scales): expected a valid number, got '[1'"),
        ("detector.scales", "", "detector.scales (--scales): "),
        ("detector.name", "selfmsk", "or 'selfmask', got 'selfmsk'; did you mean 'selfmask'?"),
        ("detector.name", "yolo", "or 'selfmask', got 'yolo'"),
        ("refine.crf.iterations", "x", "refine.crf.iterations: expected a valid integer, got 'x'"),
        ("segmenter.scale", "1", "segmenter.scale (--scale): required"),
    ],
)
def test_wrong_texts_are_named(name, text, message):
    one = find_setting(name)
    with pytest.raises(UserError) as caught:
        make_config({"photos": "p", **nest({name: one.parse(text)})})
    assert str(caught.value).startswith(f"wrong settings: {name}") and message in str(caught.value)
    assert str(caught.value).endswith("?") == ("did you mean" in message)


@pytest.mark.parametrize("value", [False, 1, None, ["crf"], {"name": "crf"}])
@pytest.mark.parametrize("one", [one for one in settings() if one.choices], ids=lambda one: one.name)
def test_choices_of_another_type_are_named(one, value):
    with pytest.raises(UserError, match=f"wrong settings: {re.escape(one.name)}"):
        make_config({"photos": "p", **nest({one.name: value})})


def test_all_wrong_values_are_named():
    values = {"detector": {"scales": [1.0, 9.0], "tau": 5}, "refine": {"crf": {"odd": 1}}}
    values |= {"spead": 1, "refine.name": "crf"}
    with pytest.raises(UserError) as caught:
        make_config(values)
    assert str(caught.value).startswith("wrong settings: ") and str(caught.value).count("; ") == 7
    for line in (
        "detector.scales (--scales): expected at most 4, got 9.0",
        "detector.tau (--tau): expected at most 1, got 5",
        "photos: required",
        "there is no setting 'refine.name'; write it without quotes",
        "there is no setting 'refine.crf.odd'; did you mean 'refine.crf.confidence'?",
        "there is no setting 'spead'",
    ):
        assert line in str(caught.value)


def test_nearest_name():
    known = ["detector.tau", "refine.size", "detector.size", "archive.photos_per_category"]
    assert nearest("tau", known) == nearest("detector.tua", known) == "; did you mean 'detector.tau'?"
    assert nearest("size", known) == "; did you mean 'refine.size'?" and nearest("zzz", known) == ""
    with pytest.raises(UserError, match=r"^there is no setting 'zzzz'$"):
        find_setting("zzzz")


def test_nested_and_flat_settings():
    nested = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert flatten(nested) == {"a.b.c": 1, "a.d": 2, "e": 3} and nest(flatten(nested)) == nested
    assert merge(nested, {"a": {"b": {"c": 7}}}, {"e": 4, "f": {}}) == {"a": {"b": {"c": 7}, "d": 2}, "e": 4}


def test_settings_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "absolute", lambda path: f"/here/{path}")
    made = RunConfig(photos="p", detector=DetectorConfig(weights="w"))
    text = to_toml(made, {"index": {"torch": "2"}})
    assert "made_with" in text and "made_with" not in to_toml(made) and 'clip_weights = ""' in text
    (tmp_path / "a.toml").write_text(text)
    read = read_settings(tmp_path / "a.toml")
    assert read["photos"] == "/here/p" and read["detector"]["weights"] == "/here/w" and "made_with" not in read
    assert make_config(merge(read, {"photos": "p", "detector": {"weights": "w"}})) == made
    (tmp_path / "b.toml").write_text("[detector]\ntau = 0.5\n")
    assert read_settings(tmp_path / "b.toml") == {"detector": {"tau": 0.5}}
    (tmp_path / "b.toml").write_bytes(b"\xef\xbb\xbf[detector]\r\ntau = 0.5\r\n")  # as Windows' Notepad saves it
    assert read_settings(tmp_path / "b.toml") == {"detector": {"tau": 0.5}}
    for text, message in (("[detector]\ntau = 7\n", "expected at most 1, got 7"), ("x = ", "--config .*c.toml: ")):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_settings(tmp_path / "c.toml")
    with pytest.raises(UserError, match=r"--config .*none.toml: there is no such file$"):
        read_settings(tmp_path / "none.toml")


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
