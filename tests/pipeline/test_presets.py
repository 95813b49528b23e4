# SPDX-License-Identifier: MIT
"""Presets: valid settings, the published ones, from every command that takes them."""

from __future__ import annotations

import pytest
import torch

from namedmask.backbones import untrained_encoder
from namedmask.config import flatten, make_config, read_settings
from namedmask.presets import PRESETS, benchmarks, preset
from namedmask.segmenter.deeplab import DeepLab, load_segmenter
from small_world import ENCODER, command, draw_photos

CATEGORIES = {"voc2012": 20, "coco2017": 80, "coca": 80, "cityscapes-object": 14}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_printed_and_read_again(name, tmp_path):
    result = command("presets", name)
    assert result.exit_code == 0
    (tmp_path / "preset.toml").write_text(result.stdout)
    read, settings = flatten(read_settings(tmp_path / "preset.toml")), flatten(preset(name))
    assert read == settings and make_config({"photos": "x", **preset(name)})


def test_all_presets_are_listed():
    result = command("presets")
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(PRESETS)
    assert command("presets", "namedmask-voc201").stderr.count("did you mean 'namedmask-voc2012'?") == 1


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("namedmask")])
def test_the_paper(name):
    config = make_config({"photos": "x", **preset(name)})
    assert len(config.categories) == len(set(config.categories)) == CATEGORIES.get(PRESETS[name][1], 0)
    assert config.index.clip_model == "ViT-L-14-336-quickgelu:openai" and config.archive.photos_per_category == 500
    assert (config.experts.mode, config.experts.steps, config.experts.batch_size) == ("separate", 5000, 8)
    assert (config.segmenter.steps, config.segmenter.batch_size, config.segmenter.paste_objects) == (20000, 16, (0, 1))
    assert config.segmenter.empty_masks == "background" and config.segmenter.dropout == config.experts.dropout == 0.1


def test_label_ids_are_those_of_the_names():
    city = benchmarks()["cityscapes-object"]
    assert dict(zip(city["names"], city["label_ids"], strict=True))["person"] == 24


def test_options_go_over_the_preset(tmp_path, monkeypatch):
    draw_photos(tmp_path / "photos", 1)
    given = {}
    monkeypatch.setattr("namedmask.run.start", lambda out, settings, *_: given.update(settings) or True)
    words = ["run", tmp_path / "photos", "--out", tmp_path / "run", "--preset", "namedmask-coca"]
    result = command(*words, "--image-size", 384, "--set", "refine.smoothness=100", "--categories", "cat,dog")
    assert result.exit_code == 0, result.stderr
    config = make_config(given)
    assert config.detector.name == "selfmask" and config.detector.image_size == 384
    assert config.refine.smoothness == 100 and config.refine.size == "detector" and config.categories == ["cat", "dog"]


def test_imagenet_s_needs_names(tmp_path):
    draw_photos(tmp_path / "photos" / "n01440764", 1)  # without names, a folder of class folders would be taken
    words = ["run", tmp_path / "photos", "--out", tmp_path / "run", "--preset", "namedmask-imagenet-s50"]
    result = command(*words)
    assert result.exit_code == 2 and "pass its category names as --categories-file FILE" in result.stderr
    assert not (tmp_path / "run" / "run.toml").exists()
    result = command("segment", tmp_path / "x.pt", tmp_path, "--out", tmp_path / "out", *words[-2:])
    assert result.exit_code == 2 and "has no category names" in result.stderr


def test_commands_without_stages_take_the_names(tmp_path):
    torch.save(DeepLab(untrained_encoder(ENCODER), 21, 16).state_dict(), tmp_path / "namedmask.pt")
    words = ["export", tmp_path / "namedmask.pt", "--encoder", ENCODER, "--onnx", tmp_path / "x.onnx"]
    result = command(*words, "--preset", "namedmask-coca")
    assert result.exit_code == 2 and "has 21 classes, but 80 categories" in result.stderr
    result = command(*words, "--preset", "namedmask-voc2012", "--categories", "cat")
    assert result.exit_code == 2 and "only one of them" in result.stderr
    _, names = load_segmenter(tmp_path / "namedmask.pt", preset("namedmask-voc2012")["categories"], ENCODER)
    assert names[0] == "aeroplane" and names[-1] == "tv/monitor"
