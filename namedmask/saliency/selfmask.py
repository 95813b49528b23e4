# SPDX-License-Identifier: MIT
"""SelfMask: a transformer decoder predicts a mask and its objectness for each of several learned queries.

Shin, Albanie and Xie, "Unsupervised salient object detection with spectral cluster voting", CVPR Workshops 2022. The
tensors have the names of the authors' checkpoint. `selfmask_training` trains such a network.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from namedmask_kernels import Ragged

from .. import registry
from .. import weights as stored
from ..backbones import Backbone, Vit, untrained
from ..batches import Size, flipped, runs, sizes_of
from ..config import DetectorConfig
from ..errors import UserError
from .candidates import groups
from .detector import Detections, Detector, at_sizes, backbone_options, cells, centered, certainty

PROPOSALS = 2  # masks of single queries among the candidates, beside the detected one
UPSAMPLED = 2  # mask resolution: cells per side of a patch
MAX_QUERIES = 1000  # of a file; each takes about a megabyte per photo


class Objectness(nn.Module):
    """Three linear layers that map a query [..., C] to the logit that its mask is the object [...]."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)[..., 0]


class QueryLayer(nn.TransformerDecoderLayer):
    """A post-norm decoder layer that adds the query embeddings before each attention, as in DETR.

    It has the parameters of nn.TransformerDecoderLayer.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, 4 * width, dropout=0.0, batch_first=True)

    def decode(self, x: Tensor, tokens: Tensor, queries: Tensor) -> Tensor:
        """Updates the query states x [n, Q, C] from tokens [n, T, C] and query embeddings [n, Q, C]."""
        with_queries = x + queries
        x = self.norm1(x + self.self_attn(with_queries, with_queries, x, need_weights=False)[0])
        x = self.norm2(x + self.multihead_attn(x + queries, tokens, tokens, need_weights=False)[0])
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class SelfMask(nn.Module):
    """The SelfMask network.

    Args:
        encoder: A timm ViT with a final norm.
        queries: Number of queries.
        layers: Number of decoder layers.
    """

    def __init__(self, encoder: Vit, queries: int = 20, layers: int = 6):
        super().__init__()
        width: int = encoder.embed_dim
        self.encoder: Vit = encoder
        self.query_embed = nn.Parameter(torch.randn(queries, width))
        layer = QueryLayer(width, encoder.blocks[0].attn.num_heads)
        norm = nn.LayerNorm(width)
        # Initial mask logits of about 1: where all logits are far from 0, the Dice loss has no gradient.
        nn.init.constant_(norm.weight, width**-0.5)
        self.decoder = nn.TransformerDecoder(layer, layers, norm)
        self.ffn = Objectness(width)

    def decode(self, tokens: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Predicts masks from the tokens of the encoder.

        Args:
            tokens: [n, h * w, C].
            h: Rows of patches.
            w: Columns of patches.

        Returns:
            Mask logits [layers, n, Q, 2h, 2w] and objectness logits [layers, n, Q] of all decoder layers, which are all
            trained. The prediction is that of the last layer.
        """
        pixels = F.interpolate(tokens.mT.unflatten(2, (h, w)), scale_factor=UPSAMPLED, mode="bilinear")
        output = torch.stack(self._outputs(tokens))  # [layers, n, Q, C]
        return torch.einsum("lnqc,nchw->lnqhw", output, pixels), self.ffn(output)

    def best_masks(self, tokens: Tensor, h: int, w: int, count: int = 1) -> Tensor:
        """The mask logits [n, count, 2h, 2w] of the queries with the highest objectness, as from `decode`.

        The product with the queries is computed on the patches and then upsampled, which is the same up to rounding.
        """
        output = self._outputs(tokens)[-1]
        best = self.ffn(output).sort(dim=1, descending=True, stable=True).indices[:, :count]
        queries = output.gather(1, best[..., None].expand(-1, -1, output.shape[2]))  # [n, count, C]
        logits = (tokens @ queries.mT).mT.unflatten(2, (h, w))
        return F.interpolate(logits, scale_factor=UPSAMPLED, mode="bilinear")

    def _outputs(self, tokens: Tensor) -> list[Tensor]:
        """The states of the queries after each decoder layer, [n, Q, C], from tokens [n, T, C]."""
        queries = self.query_embed.expand(len(tokens), -1, -1)
        x, outputs = torch.zeros_like(queries), []
        layers: Iterable[Any] = self.decoder.layers
        norm: Any = self.decoder.norm
        for layer in layers:
            x = layer.decode(x, tokens, queries)
            outputs.append(norm(x))
        return outputs

    def position_tokens(self, h: int, w: int) -> Tensor:
        """CLS and the position embeddings of a grid of patches, [1 + h * w, C].

        The learned grid is resized without antialiasing, as in the authors' network; timm would apply antialiasing.
        """
        cls, grid = self.encoder.pos_embed[0, :1], self.encoder.pos_embed[0, 1:]
        side = int(len(grid) ** 0.5)
        if (h, w) != (side, side):
            grid = F.interpolate(grid.mT.unflatten(1, (side, side))[None], (h, w), mode="bicubic")[0].flatten(1).mT
        return torch.cat([self.encoder.cls_token[0] + cls, grid])

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized photos [n, 3, H, W], sides multiples of the patch size -> the result of `decode`."""
        patches = self.encoder.patch_embed(photos)  # [n, h, w, C]
        n, h, w, _ = patches.shape
        tokens = self.position_tokens(h, w)
        x = torch.cat([tokens[:1].expand(n, -1, -1), tokens[1:] + patches.flatten(1, 2)], 1)
        return self.decode(self.encoder.norm(self.encoder.blocks(x))[:, 1:], h, w)


class Encoder(Backbone):
    """The encoder of a SelfMask network as a `Backbone`."""

    def __init__(self, network: SelfMask, device: str, precision: str, **options: Any):
        super().__init__(network.encoder, torch.device(device), getattr(torch, precision), **options)
        self.network = network

    def _position_tokens(self, h: int, w: int) -> tuple[Tensor, None]:
        return self.network.position_tokens(h, w), None


class SelfMaskDetector(Detector):
    """Detects the object as the mask of the query with the highest objectness.

    With several scales or horizontal flips (test-time augmentation), the mask is the mean over all views of the photo.
    The confidence is the `certainty` of that mask, times the `agreement` of the views.
    """

    def __init__(self, config: DetectorConfig, device: str):
        self.network = load(config.backbone, config.weights).to(device).eval().requires_grad_(False)
        super().__init__(config, Encoder(self.network, **backbone_options(config, device)))
        sizes = [round(config.image_size * scale) for scale in config.scales]
        self.views = list(itertools.product(sizes, (False, True) if config.horizontal_flip else (False,)))
        self.bytes_per_pixel = 24 + 12 * len(self.views)

    def tokens(self, size: Size) -> int:
        return sum(math.prod(self.backbone.fit(size, image_size).grid) for image_size, _ in self.views)

    @torch.inference_mode()
    def detect(self, images: Ragged, sizes: Sequence[Size] | None = None) -> Detections:
        tokens = self._tokens(images)
        with self.step("decoder"):
            return self._from_tokens(tokens, images, sizes)

    @torch.inference_mode()
    def candidates(self, images: Ragged) -> Ragged:
        """The mask of `detect`, the best proposals for the first view, and `groups` of its tokens."""
        tokens = self._tokens(images)
        size = self.views[0][0]
        fits = [self.backbone.fit(photo, size) for photo in sizes_of(images)]
        sizes = [cells(fit, UPSAMPLED) for fit in fits]
        with self.step("decoder"):
            detected = self._from_tokens(tokens, images, sizes).masks
            count = sum(math.prod(fit.grid) for fit in fits)
            first = Ragged.of_shapes(tokens.rows[:count], [fit.grid for fit in fits])
            proposals = self._soft_masks(first, PROPOSALS)
        with self.step("candidates"):
            grouped = groups(centered(first), tau=0.0)
            parts = [proposals, grouped.with_rows(grouped.rows.float())]
            columns = [detected.rows[:, None], *(at_sizes(part, fits, sizes).rows for part in parts)]
            return detected.with_rows(torch.cat(columns, 1))

    def _tokens(self, images: Ragged) -> Ragged:
        """The tokens of the encoder [T, C] for all views, view after view."""
        with self.step("network"):
            mirrored = flipped(images) if self.config.horizontal_flip else images
            patches = [self.backbone.prepare(mirrored if flip else images, size) for size, flip in self.views]
            grids = [size for view in patches for size in sizes_of(view)]
            together = Ragged.of_shapes(torch.cat([view.rows for view in patches]), grids)
            return self.backbone.extract(together, ["tokens"])["tokens"]

    def _from_tokens(self, tokens: Ragged, images: Ragged, sizes: Sequence[Size] | None) -> Detections:
        """The objects from the tokens of all views, view after view."""
        fits = [self.backbone.fit(size, image_size) for image_size, _ in self.views for size in sizes_of(images)]
        wanted = sizes or sizes_of(images)
        best = self._soft_masks(tokens)
        softs = at_sizes(best.with_rows(best.rows[:, 0]), fits, [*wanted] * len(self.views))
        pixels = len(softs.rows) // len(self.views)
        views = [Ragged.of_shapes(rows, wanted) for rows in softs.rows.split(max(1, pixels))]
        views = [flipped(view) if flip else view for view, (_, flip) in zip(views, self.views, strict=True)]
        soft = views[0].with_rows(torch.stack([view.rows for view in views]).mean(0))
        if not soft.rows.isfinite().all():
            raise FloatingPointError("the predicted mask is NaN or infinite")
        return Detections(soft, certainty(soft) * agreement(views))

    def _soft_masks(self, tokens: Ragged, count: int = 1) -> Ragged:
        """The `count` best soft masks [cells, count], `UPSAMPLED` cells per side of a patch, from tokens [T, C]."""
        grids = [tokens.rows.new_zeros(0, min(count, len(self.network.query_embed)))]
        for images in runs(tokens):
            h, w = images.shape[1:3]
            masks = self.network.best_masks(images.flatten(1, 2), h, w, count).sigmoid()
            grids.append(masks.permute(0, 2, 3, 1).flatten(0, 2))
        return Ragged.of_shapes(torch.cat(grids), [(UPSAMPLED * h, UPSAMPLED * w) for h, w in sizes_of(tokens)])


def agreement(views: Sequence[Ragged]) -> Tensor:
    """Mean IoU of all pairs of soft masks [P] of a photo, thresholded at 0.5; 1 for a single mask. float64 [B]."""
    if len(views) == 1:
        return torch.ones(len(views[0].shapes), dtype=torch.float64, device=views[0].rows.device)
    means = []
    for softs in zip(*map(runs, views), strict=True):
        masks = (torch.stack(softs, 1) > 0.5).flatten(2).float()  # [n, views, h * w]
        overlap = masks @ masks.mT
        areas = overlap.diagonal(dim1=1, dim2=2)
        union = areas[:, :, None] + areas[:, None] - overlap
        i, j = torch.triu_indices(len(views), len(views), 1, device=masks.device)
        means.append((overlap / union.clamp_min(1))[:, i, j].double().mean(1))
    return torch.cat(means)


def load(backbone: str, weights: str | None, option: str = "--detector-weights") -> SelfMask:
    """Loads a SelfMask network.

    Args:
        backbone: Name of the ViT that is its encoder.
        weights: A .safetensors or .pth file with the tensors of the whole network, encoder included, under the authors'
            names. They may be nested as training codes write them (see `weights.load`). The numbers of queries and
            layers are those of the file. None: the default weights of a plugin (see `registry`).
        option: Option of the command that takes the file, for error messages.

    Raises:
        UserError: If there are no weights, or if they cannot be read or do not fit.
    """
    weights = weights or registry.default_weights("selfmask", backbone)
    if weights is None:
        raise UserError(
            "--detector selfmask needs --detector-weights FILE, from `namedmask train-saliency` or the authors' "
            "checkpoint (github.com/NoelShin/selfmask)"
        )
    found = stored.read(weights, option)
    state = stored.candidates(found.tree, {"query_embed", "decoder_norm_weight", "decoder_norm_bias"})[0]
    what = f"backbone {backbone!r}"
    encoder = untrained(backbone)
    queries, layers = _count(state, encoder, found.source, what)
    network = SelfMask(encoder, queries, layers)
    stored.load(network, stored.Weights(state, found.source), what)
    return network


def _count(state: stored.State, encoder: Vit, source: str, what: str) -> tuple[int, int]:
    """Numbers of queries and decoder layers of a file. No network is built before they agree with its tensors.

    Raises:
        UserError: If the file is no SelfMask network, or one of another width.
    """
    embedded = state.get("query_embed")
    layers = {int(match[1]) for name in state if (match := re.match(r"decoder\.layers\.(\d{1,6})\.", name))}
    if embedded is None or not layers:
        raise UserError(f"{source}: not a SelfMask network (no query_embed or decoder.layers)")
    width = encoder.embed_dim
    if embedded.ndim != 2 or embedded.shape[1] != width or not 0 < len(embedded) <= MAX_QUERIES:
        raise UserError(
            f"{source} does not fit {what}: query_embed is {list(embedded.shape)}, expected 1 to {MAX_QUERIES} queries "
            f"of {width} channels"
        )
    with torch.device("meta"):
        layer = QueryLayer(width, encoder.blocks[0].attn.num_heads).state_dict()
    for prefix in (f"decoder.layers.{number}." for number in range(len(layers))):
        own = {prefix + name: tensor for name, tensor in layer.items()}
        stored.expect(own, {name: t for name, t in state.items() if name.startswith(prefix)}, source, what)
    return len(embedded), len(layers)
