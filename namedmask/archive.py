# SPDX-License-Identifier: MIT
"""Names -> prompts -> text embeddings -> the best photos per name, and archive.json, where they are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import UserError
from .files import atomic_write
from .threads import kernels_on_one_thread, map_ahead

SCENE_PROMPTS = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)


BLOCK = 512  # photos that are scored at once
STEP = 1e-6  # similarities are rounded to it, so that equal photos tie whatever shard they stand in


class Retrieved(NamedTuple):
    """A photo of an archive; score: cosine similarity to the name, None where the folder named the category."""

    photo: str
    score: float | None


class Archive(NamedTuple):
    """categories in the user's order; photos: each category's photos, best first."""

    categories: list[str]
    photos: dict[str, list[Retrieved]]


def prompts() -> list[str]:
    """CLIP's 80 ImageNet templates and the paper's 5, each with one {} for the name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES] + list(SCENE_PROMPTS)


def top_photos(shards: Iterable[tuple[np.ndarray, np.ndarray]], text: np.ndarray, count: int) -> list[list[tuple]]:
    """The `count` photos nearest to each text, streamed: memory does not grow with the number of photos.

    shards: (image float16 or float32 [n, d], photo int64 [n]) each, rows L2-normalized; photos in ascending order over
            all shards
    text:   float32 [k, d], L2-normalized
    Returns k lists of (photo, cosine similarity), best first. Similarities are rounded to 6 decimals; of equals the
    photo with the smaller number comes first.
    """
    import torch

    # The kernels of a matrix product depend on its sizes, and at odd ones a row's bits depend on where it stands. Equal
    # photos must tie, so names and photos are filled up with zeros to sizes at which they do.
    names = len(text)
    texts = torch.nn.functional.pad(torch.from_numpy(text), (0, 0, 0, -names % 16)).T.contiguous()

    def score(shard: tuple[np.ndarray, np.ndarray]) -> tuple:
        image, photo = (torch.from_numpy(part) for part in shard)
        # In blocks whose float32 copy stays in the cache.
        blocks = [torch.nn.functional.pad(block, (0, 0, 0, BLOCK - len(block))) for block in image.split(BLOCK)]
        return torch.cat([block.float() @ texts for block in blocks])[: len(image), :names], photo

    best = _Best(len(text), count)
    with kernels_on_one_thread("cpu") as threads:
        for scores, photo in map_ahead(score, (shard for shard in shards if len(shard[1])), threads):
            best.offer(scores, photo)
    return best.result()


class _Best:
    """The best `count` entries of each name so far, and new candidates that are merged when enough have come.

    Photos come in ascending order, so a candidate that only equals the last of a full list has lost to it already:
    after the first few shards almost nothing passes the comparison, and that comparison is all that most photos cost.
    """

    def __init__(self, names: int, count: int):
        import torch

        self.count = count
        self.pending: list[tuple] = []  # (name, score, photo) tensors of one shard
        self.pending_rows = 0
        self.floor = torch.full((names,), -torch.inf)
        self.entries = (torch.empty(0, dtype=torch.long), torch.empty(0), torch.empty(0, dtype=torch.long))

    def offer(self, scores, photo) -> None:
        """scores float32 [n, names], photo int64 [n]."""
        near = scores > self.floor - STEP  # rounding moves a score by half a step: none that counts is left out
        if int(near.sum()) > 2 * self.count * len(self.floor):  # the first shards, while lists are short
            best = scores.T.contiguous().topk(min(self.count, len(photo)), sorted=False).values
            near &= scores > best.amin(1) - STEP
        row, name = near.nonzero(as_tuple=True)
        score = (scores[row, name] / STEP).round_() * STEP
        better = score > self.floor[name]
        self.pending.append((name[better], score[better], photo[row[better]]))
        self.pending_rows += int(better.sum())
        if self.pending_rows > 4 * self.count * len(self.floor):
            self._merge()

    def _merge(self) -> None:
        import torch

        name, score, photo = (torch.cat(parts) for parts in zip(self.entries, *self.pending, strict=True))
        # Stable sorts from the least important key to the most important one.
        order = photo.argsort()
        order = order[score[order].argsort(descending=True, stable=True)]
        order = order[name[order].argsort(stable=True)]
        name, score, photo = name[order], score[order], photo[order]
        sizes = torch.bincount(name, minlength=len(self.floor))
        first = sizes.cumsum(0) - sizes
        rank = torch.arange(len(name)) - first[name]
        keep = rank < self.count
        last = rank == self.count - 1
        self.floor[name[last]] = score[last]
        self.entries = (name[keep], score[keep], photo[keep])
        self.pending, self.pending_rows = [], 0

    def result(self) -> list[list[tuple]]:
        self._merge()
        lists: list[list[tuple]] = [[] for _ in range(len(self.floor))]
        for name, score, photo in zip(*(part.tolist() for part in self.entries), strict=True):
            lists[name].append((photo, round(score, 6)))
        return lists


def read_shards(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The shards of an index in order, as `top_photos` takes them."""
    from safetensors.numpy import load_file

    for path in sorted(folder.glob("*.safetensors"), key=lambda p: (len(p.name), p.name)):
        shard = load_file(path)
        yield shard["image"], shard["photo"]


def search_index(
    folder: Path, categories: Sequence[str], text: np.ndarray, count: int, names: Iterator[str]
) -> Archive:
    """The best `count` photos of the index for each category; `names` are the photos' names in order."""
    found = top_photos(read_shards(folder), text, count)
    wanted = {photo for entries in found for photo, _ in entries}
    called = {number: name for number, name in enumerate(names) if number in wanted}
    return Archive(
        list(categories),
        {
            category: [Retrieved(called[photo], score) for photo, score in entries]
            for category, entries in zip(categories, found, strict=True)
        },
    )


def write_archive(path: Path, archive: Archive) -> None:
    photos = {category: [entry._asdict() for entry in entries] for category, entries in archive.photos.items()}
    with atomic_write(path) as file:
        file.write(json.dumps({"categories": archive.categories, "photos": photos}, indent=1).encode())


def read_archive(path: Path) -> Archive:
    """Reads archive.json, one made by hand too. Raises UserError where it is missing or does not say what it must."""
    try:
        data = json.loads(path.read_bytes())
        photos = {c: [Retrieved(e["photo"], e.get("score")) for e in data["photos"][c]] for c in data["categories"]}
        return Archive(data["categories"], photos)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it with `namedmask archive`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no archive ({type(error).__name__}: {error})") from None
