# SPDX-License-Identifier: MIT
"""Weights in all forms in which the authors and their trainers write them, through every command that takes weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from namedmask.backbones import untrained, untrained_encoder
from namedmask.config import DetectorConfig
from namedmask.saliency import make_detector
from namedmask.saliency.selfmask import SelfMask
from namedmask.segmenter.deeplab import DeepLab, load_segmenter
from small_world import ENCODER, command, draw_photos

VIT = "test_vit"


def trainer(state: dict) -> dict:
    """The checkpoint of a trainer, whose optimizer holds tensors as well."""
    moments = {"exp_avg": torch.zeros(3), "step": torch.tensor(7.0)}
    return {"model": state, "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-4}]}, "epoch": 12}


def parallel(state: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in state.items()}


FORMS = {
    "bare": lambda state: state,
    "model": trainer,
    "module": parallel,
    "model and module": lambda state: trainer(parallel(state)),
}


def write(path: Path, network: torch.nn.Module, form: str, old: bool) -> Path:
    torch.save(FORMS[form](network.state_dict()), path, _use_new_zipfile_serialization=not old)
    return path


def segmenter(classes: int) -> DeepLab:
    torch.manual_seed(classes)
    return DeepLab(untrained_encoder(ENCODER), classes, 16).eval()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old file format"])
@pytest.mark.parametrize("form", FORMS)
def test_segmenters_and_experts_load_in_every_form(form, old, tmp_path):
    for name, categories in (("namedmask_voc2012.pt", ["cat", "dog"]), ("expert_cat.pth", ["cat"])):
        network = segmenter(len(categories) + 1)
        loaded, names = load_segmenter(write(tmp_path / name, network, form, old), categories, ENCODER)
        assert names == categories
        assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old file format"])
@pytest.mark.parametrize("form", FORMS)
def test_selfmask_detects_in_every_form(form, old, tmp_path):
    torch.manual_seed(0)
    network = SelfMask(untrained(VIT), queries=3, layers=2).eval()
    path = write(tmp_path / "selfmask.pt", network, form, old)
    detector = make_detector(DetectorConfig(name="selfmask", backbone=VIT, weights=str(path), image_size=32), "cpu")
    state = detector.network.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in network.state_dict().items())


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A folder with the least common form of every network, photos, and ground truth."""
    root = tmp_path_factory.mktemp("released")
    write(root / "namedmask.pt", segmenter(3), "model and module", old=True)
    torch.manual_seed(0)
    write(root / "selfmask.pt", SelfMask(untrained(VIT), queries=3, layers=2), "model", old=True)
    (root / "truth").mkdir()
    for name in draw_photos(root / "photos", 2, (40, 30)):
        width, height = Image.open(root / "photos" / name).size
        Image.fromarray(np.full((height, width), 1, np.uint8)).save((root / "truth" / name).with_suffix(".png"))
    return root


def test_every_command_takes_released_weights(released, tmp_path):
    names = ["--categories", "cat,dog", "--encoder", ENCODER]
    done = command("segment", released / "namedmask.pt", released / "photos", "--out", tmp_path / "out", *names)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "categories.json").read_text()) == {"categories": ["cat", "dog"]}
    figures = tmp_path / "figures.json"
    arguments = ["--photos", released / "photos", *names, "--json", figures]
    done = command("evaluate", released / "namedmask.pt", released / "truth", *arguments)
    assert done.exit_code == 0 and "cat" in figures.read_text(), done.output
    done = command("export", released / "namedmask.pt", "--onnx", tmp_path / "model.onnx", *names)
    assert done.exit_code == 0 and (tmp_path / "model.onnx").exists(), done.output


def test_wrong_number_of_names_is_named_for_every_command(released, tmp_path):
    names = ["--categories", "cat", "--encoder", ENCODER]
    for words in (
        ["segment", released / "namedmask.pt", released / "photos", "--out", tmp_path / "out"],
        ["evaluate", released / "namedmask.pt", released / "truth", "--photos", released / "photos"],
        ["export", released / "namedmask.pt", "--onnx", tmp_path / "model.onnx"],
    ):
        done = command(*words, *names)
        assert done.exit_code == 2 and "has 3 classes, but 1 category" in done.output, done.output
