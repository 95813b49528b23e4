# SPDX-License-Identifier: MIT
"""SelfMask: learned queries ask a ViT's patch tokens for the salient object, and the network ranks their answers.

Shin, Albanie and Xie, "Unsupervised salient object detection with spectral cluster voting", CVPR Workshops 2022. The
tensors of a state dict are named as in the authors' checkpoint. `selfmask_training` makes such weights without one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import registry
from ..backbones import Backbone, read_weights, untrained
from ..config import DetectorConfig
from ..errors import UserError
from ..photos import Photo
from . import Detection, Detector

UPSAMPLED = 2  # cells of a mask on the side of a patch


class Objectness(nn.Module):
    """Three linear layers: a query [..., C] -> the logit of how likely its mask is the object [...]."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)[..., 0]


class QueryLayer(nn.TransformerDecoderLayer):
    """A post-norm decoder layer in which the queries' own embeddings are added anew before each attention (DETR)."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, tokens: Tensor, queries: Tensor) -> Tensor:
        """x, what the queries know so far [n, Q, C]; tokens [n, T, C]; queries, their embeddings [n, Q, C] -> x."""
        asking = x + queries
        x = self.norm1(x + self.self_attn(asking, asking, x, need_weights=False)[0])
        x = self.norm2(x + self.multihead_attn(x + queries, tokens, tokens, need_weights=False)[0])
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class SelfMask(nn.Module):
    """The network; `encoder` is a timm ViT whose norm comes last."""

    def __init__(self, encoder: nn.Module, queries: int = 20, layers: int = 6):
        super().__init__()
        width = encoder.embed_dim
        self.encoder = encoder
        self.query_embed = nn.Parameter(torch.randn(queries, width))
        layer = QueryLayer(width, encoder.blocks[0].attn.num_heads)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        # Mask logits of about 1 to begin with: where all are far from 0, the Dice loss has no gradient.
        nn.init.constant_(self.decoder.norm.weight, width**-0.5)
        self.ffn = Objectness(width)

    def decode(self, tokens: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """tokens [n, h * w, C] -> mask logits [layers, n, Q, 2h, 2w] and objectness logits [layers, n, Q].

        The last layer's are the answer; the others are trained as well.
        """
        pixels = F.interpolate(tokens.mT.unflatten(2, (h, w)), scale_factor=UPSAMPLED, mode="bilinear")
        queries = self.query_embed.expand(len(tokens), -1, -1)
        x, answers = torch.zeros_like(queries), []
        for layer in self.decoder.layers:
            x = layer(x, tokens, queries)
            answers.append(self.decoder.norm(x))
        answer = torch.stack(answers)  # [layers, n, Q, C]
        return torch.einsum("lnqc,nchw->lnqhw", answer, pixels), self.ffn(answer)

    def places(self, h: int, w: int) -> Tensor:
        """What the encoder adds to CLS and a grid of patches [1 + h * w, C].

        The learned grid is resized without antialiasing, as in the authors' network; timm would antialias.
        """
        cls, grid = self.encoder.pos_embed[0, :1], self.encoder.pos_embed[0, 1:]
        side = int(len(grid) ** 0.5)
        if (h, w) != (side, side):
            grid = F.interpolate(grid.mT.unflatten(1, (side, side))[None], (h, w), mode="bicubic")[0].flatten(1).mT
        return torch.cat([self.encoder.cls_token[0] + cls, grid])

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """photos normalized [n, 3, H, W], sides whole patches -> as `decode`."""
        patches = self.encoder.patch_embed(photos)  # [n, h, w, C]
        n, h, w, _ = patches.shape
        places = self.places(h, w)
        x = torch.cat([places[:1].expand(n, -1, -1), places[1:] + patches.flatten(1, 2)], 1)
        return self.decode(self.encoder.norm(self.encoder.blocks(x))[:, 1:], h, w)


class Encoder(Backbone):
    """SelfMask's encoder on ragged batches."""

    def __init__(self, network: SelfMask, device: torch.device, dtype: torch.dtype):
        super().__init__(network.encoder, device, dtype)
        self.network = network

    def _places(self, h: int, w: int) -> tuple[Tensor, None]:
        return self.network.places(h, w), None


class SelfMaskDetector(Detector):
    """Finds the object of each photo as the mask of the query with the highest objectness.

    With several scales, or mirrored too, it looks several times: the mask is the mean of what each look finds. Its
    confidence is the `certainty` of that mask, times the looks' `agreement`.
    """

    def __init__(self, config: DetectorConfig, device: str):
        self.network = load(config.backbone, config.weights).to(device).eval().requires_grad_(False)
        super().__init__(config, Encoder(self.network, torch.device(device), getattr(torch, config.precision)))
        sizes = [round(config.image_size * scale) for scale in config.scales]
        self.looks = list(itertools.product(sizes, (False, True) if config.mirror else (False,)))

    def tokens(self, photo: Photo) -> int:
        return sum(math.prod(self.backbone.grid(photo.pixels, size)) for size, _ in self.looks)

    @torch.inference_mode()
    def detect(self, photos: Sequence[Photo]) -> list[Detection]:
        views = []
        for photo in photos:
            for size, mirrored in self.looks:
                pixels = np.ascontiguousarray(photo.pixels[:, ::-1]) if mirrored else photo.pixels
                views.append(self.backbone.prepare(pixels, size))
        grids = iter(self.backbone.extract(views, ["tokens"])["tokens"].grids())
        found = []
        for photo in photos:
            softs = [self._look(next(grids), mirrored, photo.pixels.shape[:2]) for _, mirrored in self.looks]
            soft = torch.stack(softs).mean(0)
            found.append(Detection(soft.cpu(), certainty(soft) * agreement(softs)))
        return found

    def _look(self, tokens: Tensor, mirrored: bool, size: tuple[int, int]) -> Tensor:
        """tokens [h, w, C] of one look -> what it finds, in [0, 1], laid on the photo [H, W]."""
        masks, objectness = self.network.decode(tokens.flatten(0, 1)[None], *tokens.shape[:2])
        soft = masks[-1, 0, objectness[-1, 0].argmax()].sigmoid()  # [2h, 2w]
        return F.interpolate((soft.flip(1) if mirrored else soft)[None, None], size, mode="bilinear")[0, 0]


def agreement(softs: Sequence[Tensor]) -> float:
    """The mean IoU of all pairs of soft masks [h, w] at 0.5; 1 for a single one."""
    masks = torch.stack(list(softs)).flatten(1) > 0.5
    overlap = masks.float() @ masks.float().T
    union = overlap.diagonal()[:, None] + overlap.diagonal() - overlap
    i, j = torch.triu_indices(len(softs), len(softs), 1, device=masks.device)
    return float((overlap / union.clamp_min(1))[i, j].mean()) if len(softs) > 1 else 1.0


def certainty(soft: Tensor) -> float:
    """How much a soft mask [h, w] looks like that of an object, in [0, 1]: decided pixels times a compact outline.

    The Dice coefficient of the mask and its own threshold at 0.5, times the outline of a square of its area over its
    own outline (total variation), at most 1: a network that is wrong is often ragged.
    """
    hard = soft > 0.5
    if not hard.any():
        return 0.0
    padded = F.pad(soft, (1, 1, 1, 1))
    outline = padded.diff(dim=0).abs().sum() + padded.diff(dim=1).abs().sum()
    decided = 2 * soft[hard].sum() / (soft.sum() + hard.sum())
    return float(decided * (4 * soft.sum().sqrt() / outline).clamp_max(1.0))


def load(backbone: str, weights: str | None) -> SelfMask:
    """The network with the weights of a file: numbers of queries and layers are the file's, its encoder is `backbone`.

    weights: .safetensors or .pth with the authors' names of tensors. Raises UserError where they do not fit.
    """
    weights = weights or registry.default_weights("selfmask", backbone)
    if weights is None:
        raise UserError(
            "--detector selfmask needs --detector-weights FILE, made by `namedmask train-saliency`, or the authors' "
            "checkpoint (github.com/NoelShin/selfmask)"
        )
    state = read_weights(weights, "--detector-weights")
    layers = 1 + max((int(name.split(".")[2]) for name in state if name.startswith("decoder.layers.")), default=-1)
    if not layers or "query_embed" not in state:
        raise UserError(f"--detector-weights {weights}: not a SelfMask network (no query_embed or decoder.layers)")
    network = SelfMask(untrained(backbone), len(state["query_embed"]), layers)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"--detector-weights {weights} does not fit backbone {backbone!r}: {reason}") from None
    return network
