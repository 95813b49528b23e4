# SPDX-License-Identifier: MIT
"""How likely CLIP finds the name of a category inside a mask.

Each mask is embedded as a square crop of the photo in which everything outside of the mask is blurred. The score is the
softmax probability of the name among the categories of the run and a few names of backgrounds, without which a run with
a single category would have nothing to compare it with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from namedmask_kernels import Ragged, resize

from .archive import prompts
from .batches import runs, sizes_of
from .config import IndexConfig, RunConfig
from .errors import UserError
from .index import CLIP_BATCH, Clip, middle
from .saliency.candidates import column

BACKGROUNDS = ("background", "wall", "floor", "sky", "texture")
MARGIN = 0.1  # around a mask, relative to the longer side of its bounding box
BLURRED_CELLS = 10  # along the short side of a photo that is blurred


def expect_clip(config: RunConfig) -> None:
    """Raises UserError if the run has no CLIP model: only embeddings of whole photos, or a file that is gone."""
    if config.index.embeddings:
        raise UserError("--select name embeds parts of photos, so it needs a CLIP model instead of --embeddings")
    if (file := config.index.clip_weights) and not Path(file).exists():
        raise UserError(f"--select name needs the CLIP model, but --clip-weights {file} is gone: put it back")


class NameScorer:
    """Scores masks by a CLIP model. Costs one pass of the image tower per mask.

    Args:
        config: The CLIP model.
        categories: Names of all categories of the run.
        device: Device as torch names it.

    Raises:
        UserError: If the CLIP model cannot be loaded.
    """

    bytes_per_pixel = 24  # of a photo, with the crops of one shortlist; estimated from the tensors

    def __init__(self, config: IndexConfig, categories: Sequence[str], device: str):
        self.clip = Clip(config, device)
        self.numbers = {name: number for number, name in enumerate(categories)}
        backgrounds = [name for name in BACKGROUNDS if name not in {category.casefold() for category in categories}]
        texts = self.clip.texts([*categories, *backgrounds], prompts())
        self.texts = torch.from_numpy(texts).to(device)
        self.scale = float(self.clip.model.logit_scale.detach().exp())

    def score(
        self,
        images: Ragged,
        masks: Ragged,
        numbers: Tensor,
        categories: Sequence[str],
        blurred: Ragged | None = None,
    ) -> Tensor:
        """Scores masks of each photo. On a CPU, results do not depend on the other photos of the batch.

        Args:
            images: Photos, uint8 [P, 3].
            masks: Candidate masks, float32 [T, K] in [0, 1] on grids that cover the photos.
            numbers: The candidates to score, int64 [B, n]; -1 for none.
            categories: A category for each photo.
            blurred: The photos after `blur`, if that is done.

        Returns:
            Probability of the category's name, float32 [B, n] in [0, 1]; 0 for an empty mask and for none.
        """
        sizes, blurred = sizes_of(images), blur(images) if blurred is None else blurred
        crops: list[list[Tensor]] = [[] for _ in sizes]
        scored = torch.zeros(numbers.shape, dtype=torch.bool)
        for place, candidates in enumerate(numbers.unbind(1)):
            wanted = (candidates >= 0).tolist()
            if not any(wanted):
                continue
            mask = column(masks, candidates.clamp_min(0))
            inside = resize(mask, sizes).rows > 0.5
            shown = images.with_rows(torch.where(inside[:, None], images.rows, blurred.rows))
            grids = Ragged(mask.rows.cpu() > 0.5, mask.offsets, mask.shapes).grids()
            for photo, (grid, pixels) in enumerate(zip(grids, shown.grids(), strict=True)):
                if wanted[photo] and grid.any():
                    scored[photo, place] = True
                    crops[photo].append(_crop(pixels, grid.numpy()))
        names = torch.tensor([self.numbers[name] for name in categories], device=self.texts.device)
        photos = scored.nonzero()[:, 0].to(names.device)  # of each crop
        found = torch.zeros(numbers.shape, device=names.device)
        found[scored] = self._probabilities(crops).gather(1, names[photos, None])[:, 0]
        return found

    def _probabilities(self, crops: list[list[Tensor]]) -> Tensor:
        """Probabilities of all names for the crops of each photo, float32 [crops, names].

        On a CPU, the crops of a photo are a batch of their own, since rounding depends on the size of a batch.
        """
        batches: Iterator[list[Tensor]] = filter(None, crops)
        if self.clip.kind != "cpu":
            rest = itertools.chain.from_iterable(crops)
            batches = iter(lambda: list(itertools.islice(rest, CLIP_BATCH[self.clip.kind])), [])
        parts = [self.texts.new_zeros(0, len(self.texts))]
        for batch in batches:
            embeddings = F.normalize(self.clip.model.encode_image(self.clip.prepare(batch)).float(), dim=-1)
            parts.append((self.scale * embeddings @ self.texts.T).softmax(-1))
        return torch.cat(parts)


def blur(images: Ragged) -> Ragged:
    """Photos, uint8 [P, 3], reduced to `BLURRED_CELLS` along the short side and enlarged again."""
    parts = [images.rows[:0]]
    for photos in runs(images):
        size = photos.shape[1:3]
        cells = [max(1, round(side * BLURRED_CELLS / min(size))) for side in size]
        means = F.interpolate(photos.permute(0, 3, 1, 2).float(), size=cells, mode="area")
        smooth = F.interpolate(means, size=size, mode="bilinear")
        parts.append(smooth.round().to(torch.uint8).permute(0, 2, 3, 1).flatten(0, 2))
    return images.with_rows(torch.cat(parts))


def _crop(pixels: Tensor, mask: np.ndarray) -> Tensor:
    """A square of a photo [H, W, 3] around a mask, bool [h, w] on a grid that covers it; all of it if it is empty.

    The square is moved into the photo, and cut where it is larger than the photo. Of a strip, its `middle`.
    """
    sides = []
    for axis, length in enumerate(pixels.shape[:2]):
        hits = np.flatnonzero(mask.any(1 - axis))
        cell = length / mask.shape[axis]
        sides.append((hits[0] * cell, (hits[-1] + 1) * cell) if len(hits) else (0.0, float(length)))
    side = math.ceil((1 + 2 * MARGIN) * max(end - begin for begin, end in sides))
    for axis, (begin, end) in enumerate(sides):
        length = min(side, pixels.shape[axis])
        start = min(max(0, round((begin + end - length) / 2)), pixels.shape[axis] - length)
        pixels = pixels.narrow(axis, start, length)
    return middle(pixels)
