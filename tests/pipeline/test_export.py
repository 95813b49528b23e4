# SPDX-License-Identifier: MIT
"""ONNX export: onnxruntime's results equal torch's at any size, and a model that differs is not written."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import onnxruntime
import pytest
import timm
import torch

from namedmask import backbones
from namedmask.backbones import untrained_encoder
from namedmask.errors import UserError
from namedmask.segmenter import export
from namedmask.segmenter.deeplab import DeepLab, save_segmenter
from namedmask.segmenter.predict import Segmenter
from small_world import command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    torch.manual_seed(0)
    save_segmenter(folder, DeepLab(untrained_encoder("test_resnet"), 3, head_channels=16), ["cat", "traffic light"])
    return folder


def test_export_command(weights, tmp_path):
    path = tmp_path / "model.onnx"
    done = command("export", weights, "--onnx", path)
    assert done.exit_code == 0 and "differ from torch's by at most" in done.output, done.output
    session = onnxruntime.InferenceSession(path)
    names = json.loads(session.get_modelmeta().custom_metadata_map["names"])
    assert names == ["background", "cat", "traffic light"]
    segmenter = Segmenter.load(weights)
    for n, height, width in ((1, 50, 71), (3, 33, 200), (1, 8, 8)):
        photos = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)
        labels, logits = session.run(["labels", "logits"], {"photos": photos.transpose(0, 3, 1, 2)})
        np.testing.assert_allclose(logits, segmenter.coarse_logits(list(photos)), atol=1e-4)
        assert labels.shape == (n, height, width)
        assert (labels == np.stack(segmenter.masks(list(photos)))).mean() > 0.995


@pytest.mark.parametrize("name", ["resnet_namedmask_demo", "vit_namedmask_demo", "vit_small_patch16_dinov3"])
def test_every_kind_of_encoder_exports(name, tmp_path, monkeypatch):
    """One that needs padding, a ViT with position embeddings, and one with rotary embeddings."""
    if name == "vit_small_patch16_dinov3":
        narrow = {"depth": 2, "embed_dim": 96, "num_heads": 3}
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **narrow)
        monkeypatch.setattr(backbones, "untrained", lambda _: vit)
    torch.manual_seed(0)
    segmenter = Segmenter(DeepLab(backbones.untrained_encoder(name), 2, head_channels=16), ["cat"])
    export.export_onnx(segmenter, tmp_path / "model.onnx")
    photos = np.random.default_rng(0).integers(0, 256, (1, 40, 211, 3), np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(["logits"], {"photos": photos.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(logits, segmenter.coarse_logits(list(photos)), atol=1e-4)


def test_model_that_differs_is_not_written(weights, tmp_path, monkeypatch):
    """The network is changed after the export, before the verification, by more than the tolerance for logits."""
    network, check = Segmenter.load(weights), export._difference

    def changed(exported, session):
        last = exported.network.classifier.classifier[3]
        last.weight.data *= 1.01
        last.bias.data *= 1.01
        return check(exported, session)

    monkeypatch.setattr(export, "_difference", changed)
    with pytest.raises(UserError, match=r"model\.onnx was not written: onnxruntime's logits differ"):
        export.export_onnx(network, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    for path in (tmp_path, tmp_path / "none" / "model.onnx"):
        with pytest.raises(UserError, match="cannot be written"):
            export.export_onnx(network, path)


@pytest.mark.parametrize(
    ("margin", "error", "flipped", "expected"),
    [(0.2, 0.0, False, 0.0), (0.2, 0.05, False, 0.005), (0.2, 0.0, True, np.inf), (0.05, 0.05, True, 0.005)],
)
def test_labels_may_differ_where_logits_are_close(monkeypatch, margin, error, flipped, expected):
    """The largest logit is 10, so labels may differ for margins up to 0.1."""
    monkeypatch.setattr(export, "CHECKED_SHAPES", ((1, 4, 4), (2, 4, 4)))

    def network(photos):
        assert photos.dtype == torch.uint8 and photos.shape[1:] == (3, 4, 4)
        logits = torch.full((len(photos), 3, 2, 2), 10.0)
        logits[:, 1], logits[:, 2] = 10 - margin, 0
        return torch.zeros(len(photos), 4, 4, dtype=torch.int64), logits

    def run(names, inputs):
        labels, logits = (output.numpy() for output in network(torch.from_numpy(inputs["photos"])))
        logits[0, 2, 0, 0] -= error
        labels[-1, 1, 2] = flipped
        return labels, logits

    assert export._difference(network, types.SimpleNamespace(run=run)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("normalize", ["separate", "max", "min"])
@pytest.mark.parametrize("offset", [0.0, 0.25])
def test_grid_of_rotary_embeddings_equals_that_of_timm(normalize, offset):
    options = {"grid_type": "centered", "normalize_coords": normalize, "grid_offset": offset}
    for indexing in ("ij", "xy"):
        expected = export._timm_grid((3, 5), grid_indexing=indexing, **options)
        torch.testing.assert_close(export._grid((3, 5), grid_indexing=indexing, **options), expected)
    torch.testing.assert_close(export._grid((3, 5)), export._timm_grid((3, 5)))


def test_encoders_that_cannot_be_exported_are_named(weights, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("unsupported operator\nmore lines")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"'test_resnet' cannot be exported .*\(unsupported operator\)$"):
        export.export_onnx(Segmenter.load(weights), tmp_path / "model.onnx")


def test_missing_packages_raise_user_error(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'namedmask\[onnx\]'"):
        export.export_onnx(Segmenter.load(weights), tmp_path / "model.onnx")
