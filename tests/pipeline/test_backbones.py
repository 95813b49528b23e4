# SPDX-License-Identifier: MIT
import copy

import numpy as np
import pytest
import timm
import torch
from torchvision.transforms.v2 import functional as TF

from namedmask import backbones, linear
from namedmask.errors import UserError
from namedmask_kernels import Ragged

FAMILIES = [
    "vit_small_patch8_224.dino",
    "vit_small_patch16_224.dino",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "eva02_tiny_patch14_224",
    "vit_base_patch16_clip_quickgelu_224.openai",
]


def make(name: str, depth: int = 3, dtype: torch.dtype = torch.float32, width: int = 96) -> backbones.Backbone:
    """The architecture with a few narrow blocks and random weights, LayerScale and biases included."""
    torch.manual_seed(0)
    narrow = {"depth": depth, "embed_dim": width, "num_heads": width // 32}
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **narrow)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return backbones.Backbone(model, torch.device("cpu"), dtype)


def photos_for(backbone, *grids):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(3, backbone.patch * h, backbone.patch * w, generator=generator).to(backbone.dtype) for h, w in grids
    ]


def patches_of(backbone, photos):
    """The patches of normalized photos [3, h, w], as `Backbone.prepare` packs them."""
    size = backbone.patch
    rows = [photo.new_empty(0, 3 * size**2) for photo in photos[:1] or [torch.empty(0)]]
    rows += [torch.nn.functional.unfold(photo[None], size, stride=size)[0].T for photo in photos]
    return Ragged.of_shapes(torch.cat(rows), [(p.shape[1] // size, p.shape[2] // size) for p in photos])


@torch.inference_mode()
def timm_taps(model, photo):
    """Every tap of every block in timm's own forward pass, recorded by hooks: {"keys.1": [N, C], ...}."""
    recorded, hooks = {}, []

    def watch(module, name, select):
        hooks.append(module.register_forward_hook(lambda _, given, out: recorded.update({name: select(given, out)})))

    for b, block in enumerate(model.blocks):
        block.attn.fused_attn = False  # so that the weights exist
        watch(block, f"tokens.{b}", lambda given, out: out[0])
        watch(block.attn.q_norm, f"queries.{b}", lambda given, out: out[0].transpose(0, 1).flatten(1))
        watch(block.attn.k_norm, f"keys.{b}", lambda given, out: out[0].transpose(0, 1).flatten(1))
        watch(block.attn.attn_drop, f"cls_attention.{b}", lambda given, out: out[0, :, 0].T)
        watch(
            block.norm1,
            f"values.{b}",
            lambda given, out, a=block.attn: out[0] @ value_weights(a)[0].T + value_weights(a)[1],
        )
    last = model.forward_features(photo[None])[0]
    recorded[f"tokens.{len(model.blocks) - 1}"] = last
    for hook in hooks:
        hook.remove()
    return {name: value[model.num_prefix_tokens :] for name, value in recorded.items()}


def value_weights(attn):
    bias = (
        attn.qkv.bias if getattr(attn, "v_bias", None) is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    )
    width = len(attn.qkv.weight) // 3
    return attn.qkv.weight[2 * width :], torch.zeros(width) if bias is None else bias[2 * width :]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tap_equals_timm(name):
    backbone = make(name)
    photos = photos_for(backbone, (5, 7), (9, 4), (1, 6))
    taps = [f"{tap}.{b}" for tap in backbones.TAPS for b in range(3)]
    features = backbone.extract(patches_of(backbone, photos), taps)
    assert list(features) == taps
    for at, photo in enumerate(photos):
        expected = timm_taps(backbone.model, photo)
        for tap in taps:
            rows = features[tap].grids()[at].flatten(0, 1)
            torch.testing.assert_close(rows, expected[tap], rtol=1e-4, atol=2e-5, msg=lambda m, t=tap: f"{t}: {m}")


@pytest.mark.parametrize("tap", backbones.TAPS)
def test_taps_do_not_depend_on_each_other(tap):
    backbone = make(FAMILIES[4])
    photos = photos_for(backbone, (5, 7), (9, 4))
    everything = backbone.extract(patches_of(backbone, photos), [*backbones.TAPS, f"{tap}.1", f"{tap}.2"])
    for name in (tap, f"{tap}.1", f"{tap}.2"):
        torch.testing.assert_close(
            backbone.extract(patches_of(backbone, photos), [name])[name].rows, everything[name].rows
        )


def test_last_block_computes_only_the_requested_taps():
    backbone = make(FAMILIES[0])
    last, ran = backbone.model.blocks[-1], []
    middle = backbone.model.blocks[1]
    for module in (last.norm1, last.norm2, last.mlp.norm, last.attn.norm, backbone.model.norm, middle.mlp.norm):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    backbone.extract(
        patches_of(backbone, photos_for(backbone, (4, 6))), ["keys", "queries", "values", "cls_attention", "tokens.1"]
    )
    assert ran == [middle.mlp.norm, last.norm1]
    ran.clear()
    backbone.extract(patches_of(backbone, photos_for(backbone, (4, 6))), ["keys.0"])
    assert ran == []


SIXTEEN = [(h, w) for h in (3, 5, 8, 13) for w in (4, 7, 9, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [FAMILIES[3], FAMILIES[4]])
def test_results_do_not_depend_on_batch_composition(name, dtype):
    backbone = make(name, dtype=dtype)
    photos = photos_for(backbone, *SIXTEEN)
    together = backbone.extract(patches_of(backbone, photos), backbones.TAPS)
    for at, photo in enumerate(photos):
        alone = backbone.extract(patches_of(backbone, [photo]), backbones.TAPS)
        for tap in backbones.TAPS:
            assert together[tap].shapes[at].tolist() == list(SIXTEEN[at])
            assert torch.equal(alone[tap].rows, together[tap].grids()[at].flatten(0, 1)), tap


@pytest.fixture(params=[False, True], ids=["torch", "oneDNN"])
def library(request, monkeypatch):
    """The library of linear layers; both run on any CPU."""
    monkeypatch.setattr(linear, "rates", lambda: linear.Rates(True, request.param, 256, "a test"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("library")
def test_tiny_photos_do_not_depend_on_batch_composition(dtype, threads):
    """At the real width, where a BLAS sums in another order for few rows than for many."""
    backbone = make(FAMILIES[0], depth=2, dtype=dtype, width=384)
    photos = photos_for(backbone, (1, 1), (2, 3), (20, 21), (1, 2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = backbone.extract(patches_of(backbone, photos), backbones.TAPS)
        for at, photo in enumerate(photos):
            alone = backbone.extract(patches_of(backbone, [photo]), backbones.TAPS)
            for tap in backbones.TAPS:
                assert torch.equal(alone[tap].grids()[0], together[tap].grids()[at]), tap
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32 layers", "bfloat16 layers"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_accurate_as_timm(name, bfloat16, monkeypatch):
    """With linear layers in the dtype of either kind of CPU; both run on any CPU."""
    monkeypatch.setattr(linear, "rates", lambda: linear.Rates(bfloat16, bfloat16, 256, "a test"))
    backbone = make(name, dtype=torch.bfloat16)
    assert (backbone.dtype, backbone.attention_dtype) == (torch.bfloat16 if bfloat16 else torch.float32, torch.bfloat16)
    photo, model = photos_for(backbone, (9, 11))[0], make(name).model
    features = backbone.extract(patches_of(backbone, [photo]), backbones.TAPS)
    exact, theirs = timm_taps(model, photo.float()), timm_taps(copy.deepcopy(model).bfloat16(), photo.bfloat16())
    for tap in backbones.TAPS:
        ours, timms_own = (x.float() - exact[f"{tap}.2"] for x in (features[tap].rows, theirs[f"{tap}.2"]))
        assert ours.norm() <= 1.5 * timms_own.norm(), tap


def test_no_photos_and_no_taps():
    backbone = make(FAMILIES[4])
    empty = backbone.extract(patches_of(backbone, []), backbones.TAPS)
    assert all(features.rows.shape[0] == 0 and features.offsets.tolist() == [0] for features in empty.values())
    assert empty["cls_attention"].rows.shape == (0, 3) and empty["tokens"].rows.shape == (0, 96)
    assert backbone.extract(patches_of(backbone, photos_for(backbone, (2, 2))), []) == {}


def test_photos_with_gradients_raise_runtime_error():
    backbone = make(FAMILIES[0])
    photos = [photo.requires_grad_() for photo in photos_for(backbone, (2, 2))]
    with pytest.raises(RuntimeError, match="extract has no gradient; pass detached patches"):
        backbone.extract(patches_of(backbone, photos), ["keys"])


def test_features_that_are_not_finite_raise_an_error():
    backbone = make(FAMILIES[0], depth=1)
    photos = photos_for(backbone, (2, 2), (3, 2))
    photos[1][0, 0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="features are NaN or infinite"):
        backbone.extract(patches_of(backbone, photos), ["tokens"])
    assert backbone.extract(patches_of(backbone, photos[:1]), ["tokens"])["tokens"].rows.isfinite().all()


def test_unknown_taps_raise_value_error():
    backbone = make(FAMILIES[0])
    for tap in ("attention", "keys.3", "keys.-1", "keys.x", ""):
        message = r"extract: expected a tap of tokens, .* from 0 to 2 as in 'keys\.2', got " + repr(tap)
        with pytest.raises(ValueError, match=message):
            backbone.extract(patches_of(backbone, []), ["tokens", tap])
    without = make("vit_base_patch16_siglip_224.webli")
    with pytest.raises(UserError, match="no CLS token"):
        without.extract(patches_of(without, []), ["cls_attention"])
    patches = patches_of(without, photos_for(without, (2, 3)))
    assert without.extract(patches, ["keys"])["keys"].rows.shape == (6, 96)


def test_grid_keeps_the_aspect_ratio_up_to_a_patch_and_bounds_strips():
    backbone = make("vit_small_patch16_224.dino", depth=1)
    size = lambda h, w: backbone.fit((h, w), 448).grid  # noqa: E731
    assert size(480, 640) == (28, 37)
    assert size(640, 480) == (37, 28)
    assert size(1, 1) == (28, 28)
    assert size(10, 4000) == (1, 112)  # the long side is limited to four short sides
    strip = Ragged.pack([np.zeros((10, 4000, 3), np.uint8)])
    assert backbone.prepare(strip, 448).shapes.tolist() == [[1, 112]]


@pytest.mark.parametrize(
    ("patch_fit", "sides", "image_size", "size", "grid"),
    [
        ("stretch", (480, 640), 448, (448, 592), (28, 37)),
        ("stretch", (10, 4000), 448, (16, 1792), (1, 112)),
        ("pad", (480, 640), 512, (512, 682), (32, 43)),  # 682.67 is rounded down
        ("pad", (640, 480), 512, (682, 512), (43, 32)),
        ("pad", (10, 4000), 448, (4, 1792), (1, 112)),
        ("pad", (64, 64), 64, (64, 64), (4, 4)),
    ],
)
def test_fit(patch_fit, sides, image_size, size, grid):
    backbone = make("vit_small_patch16_224.dino", depth=1)
    backbone.patch_fit = patch_fit
    image = Ragged.pack([np.full((*sides, 3), 200, np.uint8)])
    assert backbone.fit(sides, image_size) == (size, grid, 16)
    assert backbone.resize(image, image_size).shapes.tolist() == [list(size)]
    patches = backbone.prepare(image, image_size)
    assert patches.shapes.tolist() == [list(grid)] and patches.rows.shape[1] == 3 * 16 * 16
    photo = patches.grids()[0].unflatten(2, (3, 16, 16)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    inside = photo[:, : size[0], : size[1]]
    assert (inside == inside[:, :1, :1]).all() and photo.count_nonzero() == inside.numel()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("patch_fit", ["stretch", "pad"])
def test_prepare(interpolation, patch_fit):
    """Patches of photos of any shapes: those of torchvision's resized and normalized photos, up to 1 level."""
    backbone = make("vit_small_patch16_224.dino", depth=1)
    backbone.interpolation, backbone.patch_fit = interpolation, patch_fit
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((97, 131), (50, 40), (1, 3), (97, 131))]
    patches = backbone.prepare(Ragged.pack(images), 64)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (backbone.mean, backbone.std))
    expected = []
    for image in images:
        mode, size = TF.InterpolationMode(interpolation), backbone.fit(image.shape[:2], 64).size
        photo = TF.resize(torch.from_numpy(image).permute(2, 0, 1), size, mode, antialias=True)
        normalized = (photo.float() / 255 - mean) / std
        expected.append(torch.nn.functional.pad(normalized, (0, -size[1] % 16, 0, -size[0] % 16)))
    expected = patches_of(backbone, expected)
    assert torch.equal(patches.shapes, expected.shapes) and patches.rows.dtype == backbone.dtype
    level = 1.01 / 255 / min(backbone.std)
    torch.testing.assert_close(patches.rows, expected.rows, rtol=0, atol=level)


def test_encoders_take_the_middle_and_the_last_block():
    vit = timm.create_model("vit_tiny_patch16_224", depth=4)
    assert backbones.TokenPyramid(vit).taken == [1, 3]


def test_weights_from_a_local_file(backbone_weights):
    backbone = backbones.load("vit_tiny_patch16_224", str(backbone_weights))
    from safetensors.torch import load_file

    expected = load_file(backbone_weights)
    assert all(torch.equal(value, expected[key]) for key, value in backbone.model.state_dict().items())


def test_only_networks_of_the_computed_layers_are_supported():
    """Post-norm blocks and differential attention have fused projections, too, and would give wrong features."""
    unsupported = ["vit_base_patch16_rpn_224", "eva02_enormous_patch14_clip_224", "vit_dwee_patch16_reg1_gap_256"]
    unsupported += ["vit_small_r26_s32_224", "vit_small_patch16_rope_mixed_224"]
    for name in [*unsupported, *FAMILIES]:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
        assert backbones.is_supported(model) == (name not in unsupported), name


def test_load_errors_say_what_is_wrong(tmp_path, backbone_weights):
    with pytest.raises(UserError, match="'vit_smal_patch8' is no timm model; similar: "):
        backbones.load("vit_smal_patch8")
    with pytest.raises(UserError, match="there is no such file"):
        backbones.load("vit_tiny_patch16_224", str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="does not fit"):
        backbones.load("vit_small_patch16_224.dino", str(backbone_weights))
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(UserError, match=r"text\.safetensors cannot be read: it is neither"):
        backbones.load("vit_tiny_patch16_224", str(tmp_path / "text.safetensors"))
    with pytest.raises(UserError, match="not a ViT"):
        backbones.load("resnet18", str(backbone_weights))
    from safetensors.torch import save_file

    name = "vit_small_patch16_rope_mixed_224.naver_in1k"  # its rotary tables differ between blocks
    save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "mixed.safetensors")
    with pytest.raises(UserError, match="not a ViT"):
        backbones.load(name, str(tmp_path / "mixed.safetensors"))
