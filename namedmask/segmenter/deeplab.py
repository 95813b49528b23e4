# SPDX-License-Identifier: MIT
"""DeepLabv3+: atrous convolutions look at the last features at several scales, finer features sharpen the edges.

Chen et al., "Encoder-decoder with atrous separable convolution for semantic image segmentation", ECCV 2018, on an
encoder of output stride 8. The tensors of a state dict are named as in NamedMask's released weights.

A trained network lies in a folder as
  model.safetensors   its tensors
  categories.json     {"categories": names, "encoder": its timm name, "masks": a digest of those it was trained on};
                      class 0 is the background, i + 1 the i-th name
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ..backbones import Encoder, read_weights, untrained_encoder
from ..errors import UserError
from ..files import atomic_write
from .augment import IGNORE

DILATIONS = (12, 24, 36)  # at output stride 8


def conv_norm(channels: int, width: int, dilation: int | None = None) -> nn.Sequential:
    """1x1 convolution, or with `dilation` a separable 3x3 one, then BatchNorm and ReLU."""
    conv = nn.Conv2d(channels, width, 1, bias=False) if dilation is None else Separable(channels, width, dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Separable(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 one over channels: [n, C, h, w] -> [n, width, h, w]."""

    def __init__(self, channels: int, width: int, dilation: int):
        super().__init__()
        each = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False)
        self.body = nn.Sequential(each, nn.Conv2d(channels, width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class AtrousPyramid(nn.Module):
    """What stands around a place, nearer and farther, and in the whole photo: [n, C, h, w] -> [n, width, h, w]."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm(channels, width))
        around = [conv_norm(channels, width, dilation) for dilation in DILATIONS]
        self.convs = nn.ModuleList([conv_norm(channels, width), *around, whole])
        self.project = conv_norm(len(self.convs) * width, width)

    def forward(self, x: Tensor) -> Tensor:
        found = [conv(x) for conv in self.convs]
        found[-1] = found[-1].expand_as(found[0])
        return self.project(torch.cat(found, 1))


class Head(nn.Module):
    """Features of stride 4 [n, C, h, w] and 8 [n, D, ceil(h / 2), ceil(w / 2)] -> logits [n, classes, h, w]."""

    def __init__(self, channels: tuple[int, int], classes: int, width: int):
        super().__init__()
        fine = 3 * width // 16  # few, lest they outweigh what the pyramid knows
        self.project = conv_norm(channels[0], fine)
        self.aspp = AtrousPyramid(channels[1], width)
        self.classifier = nn.Sequential(*conv_norm(fine + width, width, dilation=1), nn.Conv2d(width, classes, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        around = F.interpolate(self.aspp(coarse), fine.shape[2:], mode="bilinear")
        return self.classifier(torch.cat([self.project(fine), around], 1))


class DeepLab(nn.Module):
    """The network. `width`, at least 16: channels of the head, 256 in the paper; a small encoder wants fewer.

    encoder_bn_momentum: of the encoder's BatchNorm statistics, which photos of a small archive are to move slowly.
    """

    def __init__(self, encoder: Encoder, classes: int, head_channels: int = 256, encoder_bn_momentum: float = 0.01):
        super().__init__()
        self.encoder, self.classes, self.head_channels = encoder.name, classes, head_channels
        self.backbone, self.taken = encoder.network, encoder.taken
        self.classifier = Head(encoder.channels, classes, head_channels)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(encoder, name)).view(3, 1, 1), persistent=False)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = encoder_bn_momentum

    def normalized(self, photos: Tensor) -> Tensor:
        """photos uint8 [n, 3, H, W] -> float32, with the mean and spread of colors that the encoder wants."""
        return (photos.float() / 255 - self.mean) / self.std

    def coarse_logits(self, photos: Tensor) -> Tensor:
        """photos normalized [n, 3, H, W], of any size -> logits [n, classes, ceil(H / 4), ceil(W / 4)]."""
        features = self.backbone(photos)
        return self.classifier(*(features[place] for place in self.taken))

    def forward(self, photos: Tensor) -> Tensor:
        """photos normalized [n, 3, H, W], of any size -> logits [n, classes, H, W]; class 0 is the background."""
        return F.interpolate(self.coarse_logits(photos), photos.shape[2:], mode="bilinear")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, summed over the labeled pixels: what `forward` gives, against labels int32 [n, H, W]."""
        return F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORE, reduction="sum")


def on_device(network: nn.Module, device: str | torch.device) -> nn.Module:
    """The network on a device: channels last on a GPU, as cuDNN wants them (not measured), channels first on a CPU."""
    gpu = torch.device(device).type == "cuda"
    return network.to(device, memory_format=torch.channels_last if gpu else torch.contiguous_format)


def save_segmenter(folder: Path, network: DeepLab, categories: Sequence[str], masks: str | None = None) -> Path:
    """Writes a trained network, the weights last; returns their path. masks: a digest of what it was trained on."""
    about = {"categories": list(categories), "encoder": network.encoder, "masks": masks}
    with atomic_write(folder / "categories.json") as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False).encode())
    path = folder / "model.safetensors"
    with atomic_write(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))
    return path


def load_segmenter(
    path: str | Path, categories: Sequence[str] | None = None, encoder: str = "resnet50"
) -> tuple[DeepLab, list[str]]:
    """A trained network in eval mode, on the CPU, and its categories.

    path:       the folder, or its model.safetensors, or any file of weights with the same names of tensors
    categories: names in the order of the classes, for weights without a categories.json (as NamedMask's released ones
                are), whose encoder is `encoder`
    Errors:     UserError where weights, names and encoder do not fit together.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    state = read_weights(str(path), "the segmenter")
    if (path.parent / "categories.json").exists():
        about = json.loads((path.parent / "categories.json").read_text(encoding="utf-8"))
        categories, encoder = about["categories"], about["encoder"]
    elif categories is None:
        raise UserError(f"{path.parent / 'categories.json'} is missing; give the names of the categories")
    last = state.get("classifier.classifier.3.weight")  # [classes, width, 1, 1]
    if last is None:
        raise UserError(f"{path}: not a DeepLabv3+ network (no classifier.classifier.3.weight)")
    if len(last) != len(categories) + 1:
        raise UserError(
            f"{path} tells {len(last)} classes apart; {len(categories)} categories and the background given"
        )
    network = DeepLab(untrained_encoder(encoder), *last.shape[:2])
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not fit encoder {encoder!r}: {reason}") from None
    return network.eval(), list(categories)
