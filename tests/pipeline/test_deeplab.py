# SPDX-License-Identifier: MIT
"""DeepLabv3+ against the authors' code, its encoders, and saving and loading."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from golden import GOLDEN, fill_weights
from namedmask.backbones import load_encoder, untrained, untrained_encoder
from namedmask.config import IndexConfig
from namedmask.errors import UserError
from namedmask.index import Clip
from namedmask.saliency.selfmask import SelfMask
from namedmask.segmenter.deeplab import DeepLab, DepthwiseConv, SampleDropout, load_segmenter, on_device, save_segmenter

TINY = "test_resnet"  # timm's, for tests


def shapes(network: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def authors_network() -> DeepLab:
    return fill_weights(DeepLab(untrained_encoder("resnet50"), 21).eval())


def test_dilations_are_those_of_output_stride_8():
    convs = [m for m in DeepLab(untrained_encoder("test_resnet"), 2, 16).modules() if isinstance(m, torch.nn.Conv2d)]
    dilated = [conv.dilation[0] for conv in convs if conv.groups > 1 and conv.dilation[0] > 1]
    assert dilated == [12, 24, 36] and all(conv.padding[0] == conv.dilation[0] for conv in convs if conv.groups > 1)


def test_names_of_tensors_equal_the_authors(authors_network):
    assert shapes(authors_network) == json.loads((GOLDEN / "deeplabv3plus_resnet50_keys.json").read_text())
    assert shapes(authors_network.backbone) == json.loads((GOLDEN / "dino_resnet50_keys.json").read_text())


@pytest.mark.parametrize("shape, dilation", [((2, 3, 7, 10), 1), ((1, 5, 4, 4), 2), ((3, 2, 5, 1), 6)])
def test_depthwise_convolution_has_the_gradients_of_torch(shape, dilation):
    torch.manual_seed(0)
    conv = DepthwiseConv(shape[1], dilation).double()
    x, gradient = torch.randn(2, *shape, dtype=torch.float64)
    x.requires_grad_()
    plain = torch.nn.functional.conv2d(x, conv.weight, padding=dilation, dilation=dilation, groups=shape[1])
    expected = torch.autograd.grad(plain, (x, conv.weight), gradient)
    result = conv(x)
    torch.testing.assert_close(result, plain)
    for own, other in zip(torch.autograd.grad(result, (x, conv.weight), gradient), expected, strict=True):
        torch.testing.assert_close(own, other)
    assert torch.autograd.gradcheck(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        low = conv.float()(x.float())
    own = torch.autograd.grad(low, (x, conv.weight), gradient.to(low.dtype))
    assert low.dtype == torch.bfloat16 and own[1].dtype == torch.float32
    for rounded, exact in zip((low, *own), (plain, *expected), strict=True):
        torch.testing.assert_close(rounded.double(), exact, rtol=0.03, atol=0.1)


def test_dropout_of_a_sample_depends_on_its_seed_only():
    dropout = SampleDropout(0.25)
    x = torch.rand(4, 8, 16, 16) + 1
    dropout.seeds = [5, 6, 2**64 - 1, 5]
    first = dropout(x)
    torch.rand(3)
    assert torch.equal(dropout(x), first)  # torch's generator plays no part
    assert torch.equal(first[0] == 0, first[3] == 0) and not torch.equal(first[0] == 0, first[1] == 0)
    torch.testing.assert_close(first[first != 0], x[first != 0] / 0.75)
    assert float((first == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    dropout.seeds = [2**64 - 1, 6]
    assert torch.equal(dropout(x[[2, 1]]), first[[2, 1]])
    low = dropout(x[[2, 1]].bfloat16())
    assert low.dtype == torch.bfloat16 and torch.equal(low == 0, first[[2, 1]] == 0)
    with pytest.raises(ValueError, match="2 seeds for a batch of 4"):
        dropout(x)
    assert torch.equal(dropout.eval()(x), x) and torch.equal(SampleDropout(0.0)(x), x)


def test_dropout_follows_the_projection_of_aspp():
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(TINY), 2, 16, dropout=0.5).eval()
    photos, projected = torch.rand(1, 3, 64, 64), []
    network.classifier.aspp.project.register_forward_hook(lambda module, args, output: projected.append(output))
    network.classifier.aspp.register_forward_hook(lambda module, args, output: projected.append(output))
    plain = network(photos)
    assert torch.equal(*projected)  # none in eval mode
    network.classifier.aspp.dropout.train()
    assert not torch.equal(network(photos), plain)
    kept = projected[3] != 0
    torch.testing.assert_close(projected[3][kept], 2 * projected[2][kept])
    assert 0.4 < float(kept[projected[2] != 0].float().mean()) < 0.6


def test_forward_equals_the_authors(authors_network):
    with np.load(GOLDEN / "deeplab_forward.npz") as golden, torch.inference_mode():
        photos = torch.from_numpy(golden["input"])
        coarse, logits = authors_network.coarse_logits(photos), authors_network(photos)
        assert coarse.shape[2:] == (25, 33) and logits.shape[2:] == photos.shape[2:] == (97, 129)
        np.testing.assert_allclose(coarse, golden["logits_lowres"], atol=1e-4)
        np.testing.assert_allclose(logits[:, :, ::4, ::4], golden["logits_s4"], atol=1e-4)
        np.testing.assert_allclose(logits.mean((2, 3)), golden["logits_mean"], atol=1e-4)
        best, second = logits[0].topk(2, dim=0).values
        clear = best - second > 1e-3  # no near tie
        assert torch.equal(logits[0].argmax(0)[clear], torch.from_numpy(golden["argmax"]).long()[clear])


def test_encoder_loads_the_published_file(authors_network, tmp_path):
    """DINO's ResNet-50 in torch's format, without the counters of BatchNorm and with a classifier, which is ignored."""
    state = {k: v for k, v in authors_network.backbone.state_dict().items() if "num_batches" not in k}
    torch.save({**state, "fc.weight": torch.zeros(3, 2048)}, tmp_path / "dino.pth")
    encoder = load_encoder("resnet50.dino", str(tmp_path / "dino.pth"))
    for name, tensor in encoder.network.state_dict().items():
        assert torch.equal(tensor, authors_network.backbone.state_dict()[name])
    torch.save({k: v for k, v in state.items() if k != "layer3.1.conv2.weight"}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part.pth does not fit encoder 'resnet50.dino'.*layer3.1.conv2.weight"):
        load_encoder("resnet50.dino", str(tmp_path / "part.pth"))


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "test_efficientnet"])
def test_encoders_load_weights_of_timm_models(name, tmp_path):
    import timm

    model = timm.create_model(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = load_encoder(name, str(tmp_path / "model.safetensors"))
    expected = {k.replace(".", "_"): v for k, v in model.state_dict().items()}
    for key, tensor in encoder.network.state_dict().items():
        assert torch.equal(tensor, expected[key.replace(".", "_")])
    with torch.inference_mode():
        features = encoder.network.eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(features[index].shape[1:]) for index in encoder.taken] == [
        (encoder.channels[0], 16, 24),
        (encoder.channels[1], 8, 12),
    ]


def test_vit_encoder_loads_vit_and_selfmask_weights(tmp_path):
    torch.manual_seed(0)
    vit = untrained("vit_namedmask_demo").eval()
    photos = torch.randn(1, 3, 50, 91)  # 6.25 x 11.4 patches
    with torch.inference_mode():
        expected = vit.forward_features(F.pad(photos, (0, 5, 0, 6)))[:, 1:].mT.unflatten(2, (7, 12))
    files = {"vit": vit.state_dict(), "selfmask": SelfMask(vit, queries=2, layers=1).state_dict()}
    for name, state in files.items():
        path = str(tmp_path / f"{name}.safetensors")
        save_file(state, path)
        encoder = load_encoder("vit_namedmask_demo", path)
        with torch.inference_mode():
            fine, coarse = encoder.network.eval()(photos)
        torch.testing.assert_close(coarse, expected, atol=1e-5, rtol=0)
        assert encoder.taken == (0, 1) and encoder.channels == (96, 96) and fine.shape == (1, 96, 13, 23)
    network = DeepLab(encoder, 3, head_channels=16).eval()
    assert network(photos).shape == (1, 3, 50, 91)


def test_demo_encoder_equals_its_clip():
    encoder = load_encoder("resnet_namedmask_demo")
    tower, photos = Clip(IndexConfig(clip_model="namedmask-demo"), "cpu").model.visual, torch.randn(1, 3, 64, 80)
    with torch.inference_mode():
        fine = tower.layer1(tower.stem(photos))
        assert torch.equal(encoder.network.eval()(photos)[encoder.taken[0]], fine)


def test_photos_are_normalized_as_the_encoder_expects():
    network = DeepLab(untrained_encoder(TINY), 2, 16)
    photos = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = (torch.tensor(timm.create_model(TINY).pretrained_cfg[key]) for key in ("mean", "std"))
    expected = (torch.tensor([0, 128 / 255, 1]) - mean) / std
    torch.testing.assert_close(network.normalized(photos).flatten(), expected)


def test_layout_on_the_cpu_is_channels_first():
    network = DeepLab(untrained_encoder(TINY), 2, 16).to(memory_format=torch.channels_last)
    weights = [tensor for tensor in on_device(network, "cpu").parameters() if tensor.ndim == 4]
    assert weights and all(weight.is_contiguous() for weight in weights)


def test_unsuitable_encoders_raise_user_error():
    for name in ("vgg11", "swin_tiny_patch4_window7_224"):
        with pytest.raises(UserError, match=f"'{name}' cannot be dilated to output stride 8"):
            untrained_encoder(name)
    with pytest.raises(UserError, match="is no timm model; similar"):
        untrained_encoder("resnet51")


FAMILIES = [
    "resnet18", "resnet26d", "resnet50_clip.openai", "resnet_namedmask_demo", "resnetv2_50", "seresnet18",
    "convnext_atto", "mobilenetv3_small_050", "regnetx_002", "vit_namedmask_demo", "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_encoder_takes_photos_of_any_size(name):
    """422 is the side at which networks that round sizes down fail: 422 / 4 is odd."""
    network = DeepLab(untrained_encoder(name), 2, head_channels=16).eval()
    with torch.inference_mode():
        for height, width in ((1, 1), (7, 64), (40, 422)):
            coarse = network.coarse_logits(torch.randn(1, 3, height, width))
            fine = -(-height // 4), -(-width // 4)
            if name.startswith("vit_"):
                patch = network.backbone.patch
                fine = -(-2 * height // patch), -(-2 * width // patch)
            assert coarse.shape == (1, 2, *fine) and coarse.isfinite().all()


def test_padding_changes_nothing_where_it_is_not_needed():
    """Photos whose sides are multiples of the stride, and encoders that round sizes up."""
    photos = {"resnet_namedmask_demo": torch.randn(1, 3, 40, 64), TINY: torch.randn(1, 3, 41, 63)}
    for name, given in photos.items():
        encoder = untrained_encoder(name)
        network = DeepLab(encoder, 2, head_channels=16).eval()
        features = encoder.network(given)
        expected = network.classifier(*(features[index] for index in encoder.taken))
        assert torch.equal(network.coarse_logits(given), expected)
    assert encoder.multiple == 1 and untrained_encoder("resnet_namedmask_demo").multiple == 8


def test_encoders_that_cannot_take_any_size_are_rejected_at_once():
    with pytest.raises(UserError, match=r"'vit_small_r26_s32_224' cannot process photos of any size .*choose a ResNet"):
        untrained_encoder("vit_small_r26_s32_224")


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (33, 34)])
def test_logits_have_the_size_of_the_photo(size):
    network = DeepLab(untrained_encoder(TINY), 3, head_channels=16).eval()
    photos = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    with torch.inference_mode():
        logits = network(network.normalized(photos))
    assert logits.shape == (2, 3, *size) and logits.isfinite().all()


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(TINY), 3, head_channels=32).eval()
    path = save_segmenter(tmp_path, network, ["cat", "łoś"])
    photos = torch.randn(1, 3, 40, 50)
    for saved in (tmp_path, path, str(path)):
        loaded, categories = load_segmenter(saved)
        assert categories == ["cat", "łoś"] and torch.equal(loaded(photos), network(photos))
    (tmp_path / "categories.json").unlink()
    with pytest.raises(UserError, match=r"categories.json is missing"):
        load_segmenter(path)
    loaded, _ = load_segmenter(path, ["a", "b"], TINY)  # only weights, like the authors' files
    assert torch.equal(loaded(photos), network(photos))
    with pytest.raises(UserError, match="has 3 classes, but 1 category"):
        load_segmenter(path, ["a"], TINY)
    with pytest.raises(UserError, match="does not fit encoder 'resnet10t'"):
        load_segmenter(path, ["a", "b"], "resnet10t")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a DeepLabv3"):
        load_segmenter(path, ["a", "b"], TINY)


def test_dilations_are_kept_and_checked(tmp_path):
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(TINY), 3, 16, dilations=[1, 3]).eval()
    path, photos = save_segmenter(tmp_path, network, ["cat", "dog"]), torch.randn(1, 3, 60, 70)
    loaded, _ = load_segmenter(path)
    assert loaded.dilations == (1, 3) and torch.equal(loaded(photos), network(photos))
    about = json.loads((tmp_path / "categories.json").read_text())
    for wrong in (3, [0], [1.5], [True]):
        (tmp_path / "categories.json").write_text(json.dumps(about | {"dilations": wrong}))
        with pytest.raises(UserError, match="dilations: expected a list of whole numbers above 0"):
            load_segmenter(path)
    (tmp_path / "categories.json").write_text(json.dumps(about | {"dilations": [1, 2, 3]}))
    with pytest.raises(UserError, match="does not fit"):
        load_segmenter(path)


def test_batch_norm_momentum_of_the_encoder():
    network = DeepLab(untrained_encoder(TINY), 3, head_channels=16)
    momenta = {
        part: {m.momentum for m in getattr(network, part).modules() if isinstance(m, torch.nn.BatchNorm2d)}
        for part in ("backbone", "classifier")
    }
    assert momenta == {"backbone": {0.01}, "classifier": {0.1}}


def test_head_is_initialized_as_published():
    """Kaiming's normal distribution by the inputs of a weight, of which a depthwise convolution has nine."""
    torch.manual_seed(0)
    for module in DeepLab(untrained_encoder(TINY), 3).classifier.modules():
        if isinstance(module, torch.nn.Conv2d):
            weight = module.weight.detach()
            expected, error = (2 / weight[0].numel()) ** 0.5, (2 * weight.numel()) ** -0.5
            assert float(weight.std()) == pytest.approx(expected, rel=4 * error)


def test_defaults_are_those_of_the_paper():
    network = DeepLab(untrained_encoder(TINY), 3)
    assert network.head_channels == 256 and network.classifier.aspp.dropout.probability == 0.1
    assert network.classifier.project[0].out_channels == 48
