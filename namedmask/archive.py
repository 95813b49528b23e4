# SPDX-License-Identifier: MIT
"""Retrieval: the photos of the index that best match each category name, and archive.json, which stores them.

`curation` decides which of them get a place in the archive.
"""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .config import ArchiveConfig
from .curation import POOL, Candidate, Dropped, Flag, better_matches, fill_places, near_duplicates
from .errors import DamagedFile, UserError
from .files import read_bytes, write_json
from .formats import BACKGROUND
from .index import damaged_list, read_shard, remedy
from .threads import kernels_on_one_thread, map_ahead

if TYPE_CHECKING:
    import torch

SCENE_PROMPTS = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)

BLOCK = 512  # photos per matrix product
ROWS = 1 << 19  # embeddings of candidates that are held in memory, unless a single name has more; 0.8 GB of ViT-L/14's
STEP = 1e-6  # similarities are rounded to multiples of it, so that equal photos tie whichever shard they are in


class Retrieved(NamedTuple):
    """A photo of an archive."""

    photo: str
    score: float | None  # cosine similarity to the name; None if the category is the photo's folder


class Archive(NamedTuple):
    """The photos of each category."""

    categories: list[str]  # in the order of the user
    photos: dict[str, list[Retrieved]]  # best first; see `curation` for those that fill the last places


def expect_distinct(names: Iterable[str], where: str) -> None:
    """Checks category names.

    Args:
        names: The names.
        where: The option or folder that they are from, for the error.

    Raises:
        UserError: If a name is empty, the name of class 0, or equal to another one up to letter case and Unicode
            normalization form, which file systems, CLIP and readers take for the same.
    """
    known: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if not key.strip():
            raise UserError(f"{where}: a category has an empty name")
        if key == BACKGROUND:
            raise UserError(f"{where}: {name!r} is the name of class 0; choose another name")
        if key in known:
            if known[key] == name:
                raise UserError(f"{where}: the name {name!r} is listed twice")
            raise UserError(f"{where}: the names {name!r} and {known[key]!r} differ only in case or Unicode form")
        known[key] = name


def key_of(name: str) -> str:
    """Returns a name without letter case, spaces and punctuation: "TV/monitor" and "tvmonitor" are the same name.

    Marks stay: in many scripts, vowels are marks.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "CPZ")


def prompts() -> list[str]:
    """Returns CLIP's 80 ImageNet templates and the paper's 5, each with one ``{}`` for the name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES] + list(SCENE_PROMPTS)


def top_photos(shards: Iterable[tuple[np.ndarray, np.ndarray]], text: np.ndarray, count: int) -> list[list[Candidate]]:
    """Finds the `count` photos nearest to each text. The shards are streamed: memory does not grow with their number.

    Args:
        shards: Pairs of image embeddings, float16 or float32 [n, d] with L2-normalized rows, and photo numbers, int64
            [n]. The numbers ascend over all shards.
        text: Text embeddings, float32 [k, d], L2-normalized.
        count: Photos per text.

    Returns:
        k lists, best first. Similarities are rounded to 6 decimals; of equal ones the smaller photo number comes first.
    """
    import torch

    # The kernel of a matrix product depends on its sizes, and at odd sizes the bits of a row depend on its position.
    # Equal photos must tie, so names and photos are zero-padded to sizes without this effect.
    names = len(text)
    texts = torch.nn.functional.pad(torch.from_numpy(text), (0, 0, 0, -names % 16)).T.contiguous()

    def score(shard: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        image, photo = (torch.from_numpy(part) for part in shard)
        # The float32 copy of a block stays in the cache.
        blocks = [torch.nn.functional.pad(block, (0, 0, 0, BLOCK - len(block))) for block in image.split(BLOCK)]
        return torch.cat([block.float() @ texts for block in blocks])[: len(image), :names], photo

    best = _Best(len(text), count)
    with kernels_on_one_thread("cpu") as threads:
        for scores, photo in map_ahead(score, (shard for shard in shards if len(shard[1])), threads):
            best.offer(scores, photo)
    return best.result()


class _Best:
    """The best `count` entries of each name so far, and new candidates, which are merged in large groups.

    Photos come in ascending order, so a candidate that only equals the last entry of a full list loses to it. After the
    first few shards almost no photo passes this comparison, and the comparison is the whole cost of most photos.
    """

    def __init__(self, names: int, count: int):
        import torch

        self.count = count
        self.pending: list[tuple[torch.Tensor, ...]] = []  # of each shard, as `entries`
        self.pending_rows = 0
        self.floor = torch.full((names,), -torch.inf)
        integers, scores = torch.empty(0, dtype=torch.long), torch.empty(0)
        # Name, score, photo, the name that it matches best, score of that one.
        self.entries: tuple[torch.Tensor, ...] = (integers, scores, integers, integers, scores)

    def offer(self, scores: torch.Tensor, photo: torch.Tensor) -> None:
        """Adds a shard: scores float32 [n, names], photo numbers int64 [n]. Scores that are not finite never win."""
        scores = scores.masked_fill(~scores.isfinite(), -math.inf)  # topk counts NaN as the largest
        candidate = scores > self.floor - STEP  # with a margin, because rounding moves a score by up to half a step
        if int(candidate.sum()) > 2 * self.count * len(self.floor):  # the first shards, while lists are short
            best = scores.T.contiguous().topk(min(self.count, len(photo)), sorted=False).values
            candidate &= scores > best.amin(1) - STEP
        row, name = candidate.nonzero(as_tuple=True)
        score = (scores[row, name] / STEP).round_() * STEP
        better = score > self.floor[name]
        row, name, score = row[better], name[better], score[better]
        rows, place = row.unique(return_inverse=True)
        best_score, best = scores[rows].max(1)
        best_score = (best_score / STEP).round_() * STEP
        self.pending.append((name, score, photo[row], best[place], best_score[place]))
        self.pending_rows += len(row)
        if self.pending_rows > 4 * self.count * len(self.floor):
            self._merge()

    def _merge(self) -> None:
        import torch

        name, score, photo, *best = (torch.cat(parts) for parts in zip(self.entries, *self.pending, strict=True))
        # Stable sorts, from the least to the most important key.
        order = photo.argsort()
        order = order[score[order].argsort(descending=True, stable=True)]
        order = order[name[order].argsort(stable=True)]
        name = name[order]
        sizes = torch.bincount(name, minlength=len(self.floor))
        first = sizes.cumsum(0) - sizes
        rank = torch.arange(len(name)) - first[name]
        last = rank == self.count - 1
        self.floor[name[last]] = score[order[last]]
        keep = order[rank < self.count]
        self.entries = (name[rank < self.count], *(part[keep] for part in (score, photo, *best)))
        self.pending, self.pending_rows = [], 0

    def result(self) -> list[list[Candidate]]:
        self._merge()
        lists: list[list[Candidate]] = [[] for _ in range(len(self.floor))]
        for name, score, photo, best, best_score in zip(*(part.tolist() for part in self.entries), strict=True):
            lists[name].append(Candidate(photo, round(score, 6), best, round(best_score, 6)))
        return lists


def read_shards(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the shards of an index in order, as `top_photos` takes them.

    Raises:
        DamagedFile: If a shard cannot be read, or holds something else.
    """
    width, after = None, -1  # of the rows; the last photo of the shards before
    for path in sorted(folder.glob("*.safetensors"), key=lambda p: (len(p.name), p.name)):
        image, photo = read_shard(path)
        if len(photo):
            width = width or image.shape[1]
            if image.shape[1] != width or photo[0] <= after or (np.diff(photo) <= 0).any():
                raise DamagedFile(path, "its rows do not continue those of the shards before")
            after = int(photo[-1])
        yield image, photo


def search_index(
    folder: Path, categories: Sequence[str], text: np.ndarray, config: ArchiveConfig, names: Iterator[str]
) -> tuple[Archive, list[Dropped]]:
    """Retrieves the best photos of the index for each category.

    Args:
        folder: Folder of the index.
        categories: Category names.
        text: Their embeddings, float32 [k, d], L2-normalized.
        config: How many photos, and which of them lose their places. If any can, the `POOL` times as many best photos
            of each category are candidates.
        names: Names of all photos of the index, in order.

    Returns:
        The archive, and the photos that have lost their places, by category, best first.

    Raises:
        UserError: If a file of the index is damaged, or was made with another model than `text`.
    """

    def shards() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for image, photo in read_shards(folder):
            if len(photo) and image.shape[1] != text.shape[1]:
                raise UserError(
                    f"{folder}: embeddings have {image.shape[1]} dimensions, those of the names {text.shape[1]}; "
                    f"{remedy(folder)}"
                )
            yield image, photo

    count = config.photos_per_category
    best_match_only, distinct = config.best_match_only and len(categories) > 1, config.near_duplicate_threshold < 1
    results = top_photos(shards(), text, count * POOL if best_match_only or distinct else count)
    flags = [better_matches(one) if best_match_only else {} for one in results]
    if distinct:
        _find_near_duplicates(folder, results, flags, config)
    filled = [fill_places(len(one), why, count) for one, why in zip(results, flags, strict=True)]
    # Every photo that is named in the archive, or as a dropped one.
    shown = {one[n].photo for one, (places, lost) in zip(results, filled, strict=True) for n in (*places, *lost)}
    name_of = {number: name for number, name in enumerate(names) if number in shown}
    if len(name_of) < len(shown):
        raise damaged_list(folder, "it has fewer lines than the index has photos")
    archive, dropped = Archive(list(categories), {}), []
    for category, candidates, (places, lost) in zip(categories, results, filled, strict=True):
        archive.photos[category] = [Retrieved(name_of[candidates[n].photo], candidates[n].score) for n in places]
        for n, (reason, other, similarity) in lost.items():
            what = categories[other] if reason == "better-match" else name_of[candidates[other].photo]
            photo = candidates[n]
            dropped.append(Dropped(name_of[photo.photo], category, photo.score, reason, what, similarity))
    return archive, dropped


def _find_near_duplicates(
    folder: Path,
    results: Sequence[Sequence[Candidate]],
    flags: Sequence[dict[int, Flag]],
    config: ArchiveConfig,
) -> None:
    """Adds the near-duplicates among the candidates of each name that are not flagged yet. Reads the index again."""
    import torch

    free = [[n for n in range(len(one)) if n not in why] for one, why in zip(results, flags, strict=True)]
    photos = [np.array([one[n].photo for n in own], np.int64) for one, own in zip(results, free, strict=True)]
    ends = np.cumsum([len(own) for own in photos])
    for _, group in itertools.groupby(range(len(photos)), lambda name: ends[name] // ROWS):
        names = list(group)
        wanted = np.unique(np.concatenate([photos[name] for name in names]))
        image = _read_rows(folder, wanted)

        def compare(name: int, wanted: np.ndarray = wanted, image: np.ndarray = image) -> dict[int, Flag]:
            rows = torch.from_numpy(image[np.searchsorted(wanted, photos[name])]).float()
            rows = torch.nn.functional.normalize(rows, dim=1)
            return near_duplicates(rows, config.near_duplicate_threshold, config.photos_per_category)

        with kernels_on_one_thread("cpu") as threads:
            for name, found in zip(names, map_ahead(compare, names, threads), strict=True):
                for n, why in found.items():
                    flags[name][free[name][n]] = why._replace(other=free[name][why.other])


def _read_rows(folder: Path, photos: np.ndarray) -> np.ndarray:
    """The embeddings of these photos of the index, which ascend, [n, d]."""
    parts = []
    for image, photo in read_shards(folder):
        if len(photo):
            low, high = np.searchsorted(photos, [photo[0], photo[-1] + 1])
            parts.append(image[np.searchsorted(photo, photos[low:high])])
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float16)


def write_archive(path: Path, archive: Archive) -> None:
    """Writes archive.json; it appears whole or not at all."""
    photos = {category: [entry._asdict() for entry in entries] for category, entries in archive.photos.items()}
    write_json(path, {"categories": archive.categories, "photos": photos})


def read_archive(path: Path) -> Archive:
    """Reads archive.json, which may also be written by hand.

    Raises:
        UserError: If the file is missing or is not an archive.
    """
    try:
        data = json.loads(read_bytes(path))
        categories = data["categories"]
        photos = {c: [Retrieved(e["photo"], e.get("score")) for e in data["photos"][c]] for c in categories}
        if not isinstance(categories, list):
            raise ValueError("categories: expected a list of names")
        for name, entries in photos.items():
            for photo, score in entries:
                fits = score is None or (type(score) in (int, float) and math.isfinite(score))
                if not isinstance(name, str) or not isinstance(photo, str) or not fits:
                    raise ValueError(f"category {name!r}: expected photos with scores, got {photo!r} with {score!r}")
        expect_distinct(categories, str(path))
        return Archive(categories, photos)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; create it with `namedmask archive`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(path, f"this is not an archive ({type(error).__name__}: {error})") from None
