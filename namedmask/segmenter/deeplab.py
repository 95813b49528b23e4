# SPDX-License-Identifier: MIT
"""DeepLabv3+ on encoders of output stride 8.

Chen et al., "Encoder-decoder with atrous separable convolution for semantic image segmentation", ECCV 2018. The tensors
of a state dict have the names of NamedMask's released weights.

A trained network is stored in a folder as
  model.safetensors   its tensors after the last step
  best.safetensors    those with the best agreement with held-out masks, if photos were held out (see `training`)
  categories.json     {"categories": names, "encoder": timm name, "dilations": of the head, "masks": digest of the masks
                      it was trained on}; class 0 is the background, i + 1 the i-th name
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from .. import weights as stored
from ..backbones import Encoder, padded, untrained_encoder
from ..errors import DamagedFile, UserError, counted
from ..files import read_bytes, write_json
from .augment import IGNORE

DILATIONS = (12, 24, 36)  # at output stride 8, as published

Network = TypeVar("Network", bound=nn.Module)


def conv_bn_relu(in_channels: int, out_channels: int, dilation: int | None = None) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dilation: Dilation of a separable 3 x 3 convolution; None: a 1 x 1 convolution.
    """
    if dilation is None:
        conv: nn.Module = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    else:
        conv = SeparableConv(in_channels, out_channels, dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3 x 3 convolution that keeps the size: [n, channels, h, w] -> [n, channels, h, w]."""

    def __init__(self, channels: int, dilation: int):
        super().__init__(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.requires_grad and torch.is_grad_enabled():
            return _DepthwiseOnCpu.apply(x, self.weight, self.dilation)
        return super().forward(x)


class _DepthwiseOnCpu(torch.autograd.Function):
    """The convolution, with its gradient for x computed as the convolution with flipped weights.

    On one core of a Zen 4, oneDNN takes 1 to 8 ms for that instead of 12 to 17 (16 x 512 x 12 x 12, dilations 2 to 6).
    No other processor has been measured.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = {"padding": dilation, "dilation": dilation, "groups": len(weight)}
        return F.conv2d(x, weight, **ctx.options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)  # autocast has rounded them like that
        of_x = F.conv2d(gradient, weight.flip(2, 3), **ctx.options)
        return of_x, conv2d_weight(x, weight.shape, gradient, **ctx.options), None


class SeparableConv(nn.Module):
    """Depthwise 3 x 3 convolution, then a pointwise one: [n, in_channels, h, w] -> [n, out_channels, h, w]."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int):
        super().__init__()
        pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.body = nn.Sequential(DepthwiseConv(in_channels, dilation), pointwise)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class SampleDropout(nn.Module):
    """Dropout whose mask for a sample depends on nothing but the seed of that sample.

    A training that derives the seeds from the numbers of its samples gets the same masks after an interruption, and
    whichever worker or part of a batch a sample is in. Masks on a GPU differ from those on the CPU. Setting the seeds
    does not make the CPU wait for a GPU.

    Args:
        probability: Probability that an element is set to 0; the others are scaled to keep the mean.

    Attributes:
        seeds: Seed of each sample of the next batch, integers in [0, 2**64). None: masks come from torch's global
            generator, as in nn.Dropout.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability
        self.seeds: Sequence[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[n, ...] -> [n, ...]; in eval mode, x itself. Raises ValueError if there are not n seeds."""
        if not self.training or not self.probability or self.seeds is None:
            return F.dropout(x, self.probability, self.training)
        if len(self.seeds) != len(x):
            raise ValueError(f"SampleDropout: {len(self.seeds)} seeds for a batch of {len(x)}")
        kept, generator = torch.empty(x.shape, device=x.device), torch.Generator(x.device)
        for sample, seed in zip(kept, self.seeds, strict=True):
            sample.bernoulli_(1 - self.probability, generator=generator.manual_seed(seed))
        return x * kept.div_(1 - self.probability).to(x.dtype)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: [n, in_channels, h, w] -> [n, out_channels, h, w].

    Concatenates a 1 x 1 convolution, separable convolutions of several dilations, and the global average; projects them
    and applies dropout.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, dilations: Sequence[int]):
        super().__init__()
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels))
        branches = [conv_bn_relu(in_channels, out_channels, dilation) for dilation in dilations]
        self.convs = nn.ModuleList([conv_bn_relu(in_channels, out_channels), *branches, pooled])
        self.project = conv_bn_relu(len(self.convs) * out_channels, out_channels)
        self.dropout = SampleDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        features = [conv(x) for conv in self.convs]
        features[-1] = features[-1].expand_as(features[0])
        return self.dropout(self.project(torch.cat(features, 1)))


class Head(nn.Module):
    """Decoder: features of strides 4 and 8 -> logits of stride 4."""

    def __init__(
        self,
        in_channels: tuple[int, int],
        classes: int,
        channels: int,
        dropout: float = 0.1,
        dilations: Sequence[int] = DILATIONS,
    ):
        super().__init__()
        fine_channels = 3 * channels // 16  # few, so that they do not outweigh the ASPP features
        self.project = conv_bn_relu(in_channels[0], fine_channels)
        self.aspp = ASPP(in_channels[1], channels, dropout, dilations)
        self.classifier = nn.Sequential(
            *conv_bn_relu(fine_channels + channels, channels, dilation=1), nn.Conv2d(channels, classes, 1)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """fine [n, C, h, w], coarse [n, D, ceil(h / 2), ceil(w / 2)] -> [n, classes, h, w]."""
        context = F.interpolate(self.aspp(coarse), fine.shape[2:], mode="bilinear")
        return self.classifier(torch.cat([self.project(fine), context], 1))


class DeepLab(nn.Module):
    """DeepLabv3+.

    Args:
        encoder: The encoder.
        classes: Number of classes, including the background.
        head_channels: Channels of the head, at least 16. The paper has 256; a small encoder needs fewer.
        encoder_bn_momentum: Momentum of the encoder's BatchNorm statistics. It is low, because the photos of a small
            archive should change them only slowly.
        dropout: Probability of dropout after the ASPP projection, in training mode.
        dilations: Dilations of the ASPP, in features of stride 8.

    Attributes:
        background_weight: Weight of pixels with the label 0 in `loss`; 1 unless it is set.
    """

    mean: Tensor
    std: Tensor
    background_weight: float = 1.0

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        head_channels: int = 256,
        encoder_bn_momentum: float = 0.01,
        dropout: float = 0.1,
        dilations: Sequence[int] = DILATIONS,
    ):
        super().__init__()
        self.encoder, self.classes, self.head_channels = encoder.name, classes, head_channels
        self.dilations = tuple(dilations)
        self.backbone, self.feature_indices, self.multiple = encoder.network, encoder.taken, encoder.multiple
        self.classifier = Head(encoder.channels, classes, head_channels, dropout, dilations)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(encoder, name)).view(3, 1, 1), persistent=False)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = encoder_bn_momentum

    def normalized(self, photos: Tensor) -> Tensor:
        """Normalizes photos by the color mean and standard deviation that the encoder expects.

        Args:
            photos: uint8 [n, 3, H, W].

        Returns:
            float32 [n, 3, H, W].
        """
        return (photos.float() / 255 - self.mean) / self.std

    def coarse_logits(self, photos: Tensor) -> Tensor:
        """Logits at stride 4.

        Args:
            photos: Normalized photos [n, 3, H, W], of any size.

        Returns:
            [n, classes, ceil(H / 4), ceil(W / 4)].
        """
        features = self.backbone(padded(photos, self.multiple))
        logits = self.classifier(*(features[index] for index in self.feature_indices))
        if self.multiple == 1:
            return logits
        height, width = photos.shape[2:]
        return logits[:, :, : (height + 3) // 4, : (width + 3) // 4]

    def forward(self, photos: Tensor) -> Tensor:
        """Logits at full resolution.

        Args:
            photos: Normalized photos [n, 3, H, W], of any size.

        Returns:
            [n, classes, H, W]; class 0 is the background.
        """
        return F.interpolate(self.coarse_logits(photos), photos.shape[2:], mode="bilinear")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, summed over the labeled pixels with their weights.

        Args:
            logits: The output of `forward`, [n, classes, H, W].
            labels: int32 [n, H, W]; pixels with the label IGNORE are left out.

        Returns:
            float32 scalar.
        """
        weight = None
        if self.background_weight != 1:
            weight = torch.ones(self.classes, device=logits.device)
            weight[0] = self.background_weight
        return F.cross_entropy(logits.float(), labels.long(), weight, ignore_index=IGNORE, reduction="sum")


def on_device(network: Network, device: str | torch.device) -> Network:
    """Moves a network to a device, in place: channels last on a GPU, for cuDNN (not measured), else channels first."""
    gpu = torch.device(device).type == "cuda"
    return network.to(device).to(memory_format=torch.channels_last if gpu else torch.contiguous_format)


def save_segmenter(folder: Path, network: DeepLab, categories: Sequence[str], masks: str | None = None) -> Path:
    """Writes a trained network to a folder, its weights last.

    Args:
        folder: An existing folder.
        network: The network.
        categories: Names of classes 1, 2, ...
        masks: Digest of the masks it was trained on.

    Returns:
        The file of weights.
    """
    about = {
        "categories": list(categories),
        "encoder": network.encoder,
        "dilations": list(network.dilations),
        "masks": masks,
    }
    write_json(folder / "categories.json", about)
    path = folder / "model.safetensors"
    stored.write(path, network)
    return path


def read_about(path: Path, remedy: str) -> dict[str, Any]:
    """Reads the categories.json of a segmenter.

    Raises:
        DamagedFile: If it cannot be read or holds something else; ends with `remedy`.
    """
    try:
        about = json.loads(read_bytes(path))
        names, encoder = about["categories"], about["encoder"]
        dilations = about.setdefault("dilations", list(DILATIONS))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(path, error, remedy=remedy) from None
    if not isinstance(encoder, str) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DamagedFile(path, "categories: expected a list of names; encoder: expected a name", remedy=remedy)
    if not isinstance(dilations, list) or not all(type(d) is int and d > 0 for d in dilations):
        raise DamagedFile(path, "dilations: expected a list of whole numbers above 0", remedy=remedy)
    return about


def load_segmenter(
    path: str | Path, categories: Sequence[str] | None = None, encoder: str = "resnet50"
) -> tuple[DeepLab, list[str]]:
    """Loads a trained network.

    Args:
        path: Folder of a segmenter, its model.safetensors, or any file of weights with the same names of tensors.
        categories: Names of classes 1, 2, ..., for weights without a categories.json beside them, such as NamedMask's
            released ones.
        encoder: Encoder of such weights, by its timm name.

    Returns:
        The network in eval mode on the CPU, and the names of its categories.

    Raises:
        UserError: If a file is missing or damaged, or if weights, names and encoder do not match.
    """
    path, dilations = Path(path), DILATIONS
    if path.is_dir():
        path = path / "model.safetensors"
    found = stored.read(path)
    about_path = path.parent / "categories.json"
    if about_path.exists():
        about = read_about(about_path, "delete it and pass --categories or --categories-file, and --encoder")
        names, encoder, dilations = about["categories"], about["encoder"], about["dilations"]
    elif categories is not None:
        names = list(categories)
    else:
        raise UserError(f"{about_path} is missing; pass --categories or --categories-file")
    return network_of(found, path, len(names) + 1, encoder, dilations), names


def network_of(
    found: stored.Weights, path: Path, classes: int, encoder: str, dilations: Sequence[int] = DILATIONS
) -> DeepLab:
    """The network of a file of weights, in eval mode on the CPU.

    Args:
        found: The weights.
        path: Their file, for messages.
        classes: Number of classes, including the background.
        encoder: timm name of the encoder.
        dilations: Dilations of the head.

    Raises:
        UserError: If weights, classes and encoder do not match.
    """
    last = "classifier.classifier.3.weight"  # [classes, head_channels, 1, 1]
    state = stored.candidates(found.tree, {stored.flat(last)})[0]
    if last not in state or state[last].ndim != 4:
        raise UserError(f"{path}: not a DeepLabv3+ network (no {last})")
    stored_classes, head_channels = state[last].shape[:2]
    if stored_classes != classes:
        raise UserError(
            f"{path} has {stored_classes} classes, but {counted(classes - 1, 'category')} and the background were given"
        )
    built, what = untrained_encoder(encoder), f"encoder {encoder!r}"
    with torch.device("meta"):  # the number of channels is the file's: all shapes are compared before the head is built
        head = nn.ModuleDict({"classifier": Head(built.channels, classes, max(16, head_channels), 0, dilations)})
    stored.expect(head.state_dict(), state, found.source, what, stored.parameters_and_statistics(head))
    network = DeepLab(built, classes, head_channels, dilations=dilations)
    stored.load(network, stored.Weights(state, found.source), what)
    return network.eval()
