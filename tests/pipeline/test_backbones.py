# SPDX-License-Identifier: MIT
import pytest
import timm
import torch

from namedmask import backbones
from namedmask.errors import UserError

FAMILIES = [
    "vit_small_patch8_224.dino",
    "vit_small_patch16_224.dino",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "eva02_tiny_patch14_224",
    "vit_base_patch16_clip_224.openai",
]


def make(name: str, depth: int = 3) -> backbones.Backbone:
    """The architecture with random weights, LayerScale and biases included, cut to a few blocks."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=depth)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return backbones.Backbone(model, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_timm(name):
    backbone = make(name)
    photos = [torch.randn(3, backbone.patch * h, backbone.patch * w) for h, w in ((5, 7), (9, 4), (1, 6))]
    found = backbone.extract(photos, "tokens")
    for photo, grid in zip(photos, found.grids(), strict=True):
        with torch.inference_mode():
            expected = backbone.model.forward_features(photo[None])[0, backbone.prefix :]
        torch.testing.assert_close(grid.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_equal_a_hook_on_timm(name):
    backbone = make(name)
    photo = torch.randn(3, backbone.patch * 4, backbone.patch * 6)
    seen = {}
    attention = backbone.model.blocks[-1].attn
    hook = backbone.model.blocks[-1].norm1.register_forward_hook(lambda *io: seen.update(x=io[2][0]))
    with torch.inference_mode():
        backbone.model.forward_features(photo[None])
    hook.remove()
    weight, bias = backbones._qkv(attention)
    expected = torch.nn.functional.linear(seen["x"], weight, bias).chunk(3, -1)[1][backbone.prefix :]
    torch.testing.assert_close(backbone.extract([photo], "keys").rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", ["tokens", "keys"])
def test_a_photo_in_a_batch_equals_the_photo_alone(features):
    backbone = make("vit_small_patch16_dinov3.lvd1689m")
    photos = [torch.randn(3, backbone.patch * h, backbone.patch * w) for h, w in ((12, 7), (5, 20), (12, 7))]
    together = backbone.extract(photos, features)
    for photo, grid in zip(photos, together.grids(), strict=True):
        assert torch.equal(backbone.extract([photo], features).rows, grid.flatten(0, 1))


def test_grid_keeps_the_aspect_to_a_patch_and_bounds_strips():
    import numpy as np

    backbone = make("vit_small_patch16_224.dino", depth=1)
    size = lambda h, w: backbone.grid(np.empty((h, w, 3), np.uint8), 448)  # noqa: E731
    assert size(480, 640) == (28, 37)
    assert size(640, 480) == (37, 28)
    assert size(1, 1) == (28, 28)
    assert size(10, 4000) == (1, 112)  # the long side stops at four short sides
    assert backbone.prepare(np.zeros((10, 4000, 3), np.uint8), 448).shape == (3, 16, 112 * 16)


def test_weights_come_from_a_local_file(backbone_weights):
    backbone = backbones.load("vit_tiny_patch16_224", str(backbone_weights))
    from safetensors.torch import load_file

    expected = load_file(backbone_weights)
    assert all(torch.equal(value, expected[key]) for key, value in backbone.model.state_dict().items())


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path, backbone_weights):
    with pytest.raises(UserError, match="'vit_smal_patch8' is no timm model; similar: "):
        backbones.load("vit_smal_patch8")
    with pytest.raises(UserError, match="there is no such file"):
        backbones.load("vit_tiny_patch16_224", str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="does not fit"):
        backbones.load("vit_small_patch16_224.dino", str(backbone_weights))
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(UserError, match="does not fit"):
        backbones.load("vit_tiny_patch16_224", str(tmp_path / "text.safetensors"))
    with pytest.raises(UserError, match="not a ViT"):
        backbones.load("resnet18", str(backbone_weights))
