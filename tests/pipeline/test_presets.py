# SPDX-License-Identifier: MIT
"""Presets: valid settings, the published ones, from every command that takes them."""

from __future__ import annotations

import pytest
import torch

from namedmask.backbones import untrained_encoder
from namedmask.config import flatten, make_config, read_settings, settings
from namedmask.presets import PRESETS, benchmarks, describe, needs_names, preset
from namedmask.segmenter.deeplab import DeepLab, load_segmenter
from small_world import ENCODER, command, draw_photos

CATEGORIES = {"voc2012": 20, "coco2017": 80, "coca": 80, "cityscapes-object": 14}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_printed_and_read_again(name, tmp_path):
    result = command("presets", name)
    assert result.exit_code == 0
    (tmp_path / "preset.toml").write_text(result.stdout)
    assert flatten(read_settings(tmp_path / "preset.toml")) == flatten(preset(name))
    assert make_config({"photos": "x", **preset(name)})


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


SETTINGS = """
index.clip_model ViT-L-14-336-quickgelu:openai
archive.photos_per_category 500; archive.best_match_only False; archive.near_duplicate_threshold 1.0
experts.select all; experts.mode separate; experts.batch_size 8; experts.steps 5000
segmenter.paste_objects [0, 1]; segmenter.batch_size 16; segmenter.steps 20000; segmenter.held_out 0.0
segmenter.background_weight 1.0; segmenter.label_others False; segmenter.score_power 0.0; segmenter.ema_decay 0.0
"""
SELFMASK = """
detector.name selfmask; detector.select none; detector.backbone vit_small_patch8_224.dino; detector.image_size 512
detector.interpolation bilinear; detector.patch_fit pad; detector.scales [1.0]; detector.horizontal_flip False
detector.precision float32
refine.name bilateral; refine.size detector; refine.largest_component False; refine.fill_holes False
refine.sigma_spatial 16.0; refine.sigma_luma 16.0; refine.sigma_chroma 8.0; refine.smoothness 256.0
"""
TRAINING = """
encoder resnet50.dino; head_channels 256; dropout 0.1; dilations [12, 24, 36]; crop_size 384; scale [0.1, 1.0]
flip_prob 0.5
color_jitter [0.8, 0.8, 0.8, 0.2]; color_jitter_prob 0.8; grayscale_prob 0.2; blur_prob 0.5; blur_sigma [0.1, 2.0]
min_score 0.0; keep_fraction 1.0; per_category 0
empty_masks background; grad_accum_steps 1; lr 0.0005; encoder_lr 5e-05; encoder_bn_momentum 0.01
weight_decay 0.0002; poly_power 0.9; min_lr 1e-06; precision float32
"""
# What a published experiment does not say or use: files, seeds, how results are stored, and settings of other methods.
OPEN = """
photos; categories; index.clip_weights; index.embeddings; index.shard_size; detector.weights; detector.backbone_weights
detector.more_backbones; detector.features; detector.center_features; detector.tau; refine.crf.; refine.pamr.
pseudolabel.; saliency.; encoder_weights; allow_empty; seed; score_every; experts.paste_objects
"""


def listed(settings: str, section: str = "") -> dict[str, str]:
    lines = [line for line in settings.replace("\n", ";").split(";") if line.strip()]
    return {section + key: value for key, _, value in (line.strip().partition(" ") for line in lines)}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "best"])
def test_every_setting_is_the_published_one(name):
    settings = {key: str(value) for key, value in flatten(preset(name)).items() if key != "categories"}
    expected = listed(SELFMASK)
    if name != "selfmask":
        expected |= listed(SETTINGS) | listed(TRAINING, "experts.") | listed(TRAINING, "segmenter.")
    assert settings == expected


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("namedmask")])
def test_presets_are_complete(name):
    """A default that changes later does not change a published experiment."""
    open_ones = listed(OPEN)
    missing = [one.name for one in settings() if one.name not in flatten(preset(name))]
    left = [one for one in missing if not open_ones.keys() & {one, one.rpartition(".")[2]}]
    assert not [one for one in left if not one.startswith(tuple(key for key in open_ones if key.endswith(".")))]


def test_best_selects_and_draws_masks_by_name():
    config = make_config({"photos": "x", **preset("best")})
    assert (config.detector.name, config.detector.selection, config.experts.select) == ("spectral", "name", "name")
    assert (config.segmenter.score_power, config.segmenter.ema_decay) == (2.0, 0.999)
    assert config.archive.best_match_only and not config.categories
    assert "SelfMask" not in describe("best", ["a {}."])


def test_presets_are_copies_and_say_what_they_need():
    preset("selfmask")["refine"]["smoothness"] = preset("namedmask-coco")["experts"]["steps"] = 1
    assert preset("selfmask")["refine"]["smoothness"] == 256 and preset("namedmask-coco")["experts"]["steps"] == 5000
    assert [name for name in PRESETS if needs_names(name)] == [f"namedmask-imagenet-s{n}" for n in (50, 300, 919)]
    text = describe("namedmask-imagenet-s50", ["a {}.", "the {}."])
    assert text.startswith("# NamedMask on ImageNet-S50\n# category names: --categories-file FILE, in class order\n")
    assert "# 2 prompts per category, such as 'a NAME.'\n" in text
    assert "# category names" not in describe("namedmask-coco", ["{}"])
    assert "prompts" not in describe("selfmask", ["{}"])


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
