# SPDX-License-Identifier: MIT
"""The index: image embeddings of all photos in shards, by a CLIP model of open_clip or from precomputed embeddings.

index/photos.jsonl          names of the photos in order; the number of a photo is its line, from 0
index/00000.safetensors     image float16 [n, d], rows L2-normalized; photo int64 [n], numbers of the photos, ascending;
                            metadata {"protocol": activation and preprocessing of the CLIP model}
index/00000.errors.jsonl    photos of the shard without a row, with the reason
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from . import hub, registry, weights
from .config import IndexConfig
from .distributed import Worker
from .errors import DamagedFile, UserError, counted, first_line, listed
from .files import atomic_write, read_bytes
from .masks import ErrorRecord, errors_path, parse_photo, read_errors, read_lines, write_errors
from .photos import PhotoError, PhotoSource, decode_ahead, note_unlisted
from .threads import map_batches

if TYPE_CHECKING:
    import torch

MAX_ASPECT = 16  # of a photo that is resized for CLIP
CLIP_BATCH = {"cpu": 16, "cuda": 256}  # photos
TEXT_BATCH = {"cpu": 128, "cuda": 512}  # prompts
BATCH_BYTES = 1 << 28  # of the pixels of a batch, unless a single photo has more; 290 photos of 480 x 640
SAME_KERNELS = 4  # photos; from here on, the matrix products of ViT-B/32 or larger round alike, on a CPU

_Pixels = TypeVar("_Pixels", np.ndarray, "torch.Tensor")
Loaded = tuple[str, np.ndarray | PhotoError]  # a photo's name and pixels
Embedded = tuple[str, np.ndarray | PhotoError]  # a photo's name and embedding


class Embedder(Protocol):
    """Maps photos and category names to embeddings in the same space.

    Attributes:
        about: The model, its weights and its preprocessing in words.
        protocol: What the embeddings depend on besides photos and weights: activation and preprocessing. "" if unknown.
    """

    about: str
    protocol: str

    def images(self, source: PhotoSource, shards: Iterable[Sequence[str]]) -> Iterator[Embedded]:
        """Yields each name with the photo's embedding, float32 [d] L2-normalized, or with the photo's error, in order.

        Shards, the names of some photos each, are taken ahead of the results. Different shards share no batch.
        """

    def texts(self, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        """Returns one row per name, float32 [k, d], L2-normalized."""


def lists_other_photos(folder: Path, source: PhotoSource) -> bool:
    """Whether a source has other photos now than those in photos.jsonl, or others that cannot be listed, if there is
    such a list."""
    if not (folder / "photos.jsonl").exists():
        return False
    errors: list[ErrorRecord] = []
    pairs = itertools.zip_longest(read_photos(folder), source.names(note_unlisted(errors)))
    return any(before != now for before, now in pairs) or errors != listing_errors(folder)


def listing_errors(folder: Path) -> list[ErrorRecord]:
    """What could not be listed when the list of the photos was made."""
    path = errors_path(folder / "photos.jsonl")
    return list(read_errors(path)) if path.exists() else []


def list_photos(source: PhotoSource, folder: Path) -> None:
    """Writes photos.jsonl, and photos.errors.jsonl with the folders and shards that cannot be listed.

    Raises:
        UserError: If there are no photos. photos.jsonl is not written then.
    """
    errors: list[ErrorRecord] = []
    with atomic_write(folder / "photos.jsonl") as file:
        for name in source.names(note_unlisted(errors)):
            file.write(json.dumps({"photo": name}).encode() + b"\n")
        if not file.tell():
            raise UserError(f"there are no photos in {source.path}")
        write_errors(errors_path(folder / "photos.jsonl"), errors)


def read_photos(folder: Path) -> Iterator[str]:
    """Yields the names in photos.jsonl, in order. Raises DamagedFile if it is missing or at an invalid line."""
    path = folder / "photos.jsonl"
    try:
        if not path.stat().st_size:
            raise damaged_list(folder, "it is empty")
    except FileNotFoundError:
        raise damaged_list(folder, "it is missing") from None
    return read_lines(path, parse_photo, remedy(folder))


def damaged_list(folder: Path, reason: str) -> DamagedFile:
    """The error to raise if photos.jsonl in the folder of the index does not fit the index."""
    return DamagedFile(folder / "photos.jsonl", reason, remedy=remedy(folder))


def remedy(folder: Path) -> str:
    """What to do if a file of the index is damaged: all shards refer to the lines of photos.jsonl."""
    return f"make the index again with `namedmask index --out {folder.parent} --overwrite`"


def shard_path(folder: Path, shard: int) -> Path:
    """File of a shard of the index."""
    return folder / f"{shard:05}.safetensors"


def missing_shards(folder: Path, config: IndexConfig) -> list[int]:
    """Returns the numbers of the shards that do not exist yet.

    Raises:
        DamagedFile: If photos.jsonl is damaged or has fewer lines than the shards have photos.
    """
    count = sum(1 for _ in read_photos(folder))
    shards = -(-count // config.shard_size)
    last = shard_path(folder, shards - 1)
    if shard_path(folder, shards).exists() or (last.exists() and max(read_shard(last)[1], default=0) >= count):
        raise damaged_list(folder, "it has fewer lines than the index has photos")
    return [s for s in range(shards) if not shard_path(folder, s).exists()]


def read_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a shard: image float16 [n, d], photo int64 [n]. Raises DamagedFile if it is something else."""
    from safetensors.numpy import load

    try:
        shard = load(read_bytes(path))
        image, photo = shard["image"], shard["photo"]
    except Exception as error:  # safetensors has its own exceptions
        raise DamagedFile(path, error) from None
    fits = image.dtype == np.float16 and photo.dtype == np.int64 and image.ndim == 2 and photo.shape == image.shape[:1]
    if not fits or not np.isfinite(image).all():
        raise DamagedFile(path, "expected finite image float16 [n, d] and photo int64 [n]")
    return image, photo


class KnownEmbeddings:
    """The embeddings in indexes from before an update. They are known by the names of their photos.

    The names are held in memory, about 200 bytes each.

    Args:
        folders: Folders of the indexes.
        config: Settings of the index.

    Attributes:
        places: Shard and row of the embedding of each photo. A later folder goes over an earlier one.

    Raises:
        DamagedFile: If a file cannot be read.
    """

    def __init__(self, folders: Sequence[Path], config: IndexConfig):
        self.folders = [folder for folder in folders if (folder / "photos.jsonl").exists()]
        self.places: dict[str, tuple[Path, int]] = {}
        for folder in self.folders:
            names = read_photos(folder)
            for shard in itertools.count():
                if not (part := list(itertools.islice(names, config.shard_size))):
                    break
                if (path := shard_path(folder, shard)).exists():
                    first = shard * config.shard_size
                    for row, number in enumerate(read_shard(path)[1].tolist()):
                        self.places[part[number - first]] = path, row
        self._images = functools.lru_cache(maxsize=8)(lambda path: read_shard(path)[0])

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> np.ndarray:
        """The embedding of a photo, float16 [d]."""
        path, row = self.places[name]
        return self._images(path)[row]


def build_index(
    source: PhotoSource,
    folder: Path,
    config: IndexConfig,
    worker: Worker,
    device: str,
    advance: Callable[..., None],
    known: KnownEmbeddings | None = None,
) -> Embedder | None:
    """Embeds the photos of photos.jsonl, shard by shard. Existing shards are kept.

    Args:
        source: The photos.
        folder: Folder of the index.
        config: Settings of the index.
        worker: This process, which claims its shards.
        device: Device as torch names it.
        advance: Called as `advance(photos, existing=...)` after each shard; `existing`: they had embeddings already.
        known: Embeddings that are copied.

    Returns:
        The embedder; None if this worker had nothing to do.

    Raises:
        UserError: If the embedder cannot be created, or if existing shards are of another protocol.
    """
    known = known or KnownEmbeddings((), config)
    count = sum(1 for _ in read_photos(folder))
    shards = -(-count // config.shard_size)
    claimed: deque[tuple[int, list[str], int]] = deque()  # being embedded: shard, its photos, how many are new

    def new_photos() -> Iterator[list[str]]:
        """New photos of each shard that this worker claims, taken as the photos before them are decoded."""
        photos, at = read_photos(folder), 0  # claimed shards ascend, so one pass is enough
        for shard in worker.claim("index", shards):
            first, size = shard * config.shard_size, min(config.shard_size, count - shard * config.shard_size)
            if shard_path(folder, shard).exists():
                advance(size, existing=True)
                continue
            names = list(itertools.islice(photos, first - at, first - at + size))
            at = first + size
            new = [name for name in names if name not in known]
            if len(new) < size:
                advance(size - len(new), existing=True)
            if new:
                claimed.append((shard, names, len(new)))
                yield new
            else:
                path = known.places[names[0]][0]
                _write_shard(shard_path(folder, shard), first, [(name, known[name]) for name in names], _protocol(path))

    ahead = new_photos()
    first = next(ahead, None)
    if first is None:
        return None
    embedder = make_embedder(config, device)
    for index in (folder, *known.folders):
        expect_protocol(index, embedder)
    results = embedder.images(source, itertools.chain([first], ahead))
    for result in results:
        shard, names, new = claimed.popleft()
        found = iter([result, *itertools.islice(results, new - 1)])
        rows = [(name, known[name]) if name in known else next(found) for name in names]
        _write_shard(shard_path(folder, shard), shard * config.shard_size, rows, embedder.protocol)
        advance(new, existing=False)
    return embedder


def _write_shard(path: Path, first: int, results: list[Embedded], protocol: str) -> None:
    """Writes the embeddings and errors of consecutive photos, whose first has the number `first`."""
    from safetensors.numpy import save

    rows, numbers, errors = [], [], []
    for number, (name, result) in enumerate(results, first):
        if isinstance(result, PhotoError):
            errors.append(ErrorRecord(name, "index", result.reason))
        else:
            rows.append(result.astype(np.float16))
            numbers.append(number)
    image = np.stack(rows) if rows else np.zeros((0, 0), np.float16)
    write_errors(errors_path(path), errors)
    with atomic_write(path) as file:
        tensors: dict[str, np.ndarray] = {"image": image, "photo": np.array(numbers, np.int64)}
        file.write(save(tensors, {"protocol": protocol} if protocol else None))


def expect_protocol(folder: Path, embedder: Embedder) -> None:
    """Raises UserError if the shards of an index are of another protocol than an embedder's."""
    for path in sorted(folder.glob("*.safetensors")):
        if (used := _protocol(path)) != embedder.protocol:
            raise UserError(
                f"{path} was computed with {used or 'an unknown activation and preprocessing'}, but the model has "
                f"{embedder.protocol or 'none'}: their embeddings cannot be compared; {remedy(folder)}"
            )


def _protocol(path: Path) -> str:
    """The protocol of a shard. Raises DamagedFile if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("protocol", "")
    except (OSError, SafetensorError) as error:
        raise DamagedFile(path, error) from None


def make_embedder(config: IndexConfig, device: str) -> Embedder:
    """Creates the embedder of the settings.

    Raises:
        UserError: If the model is unknown, or its weights or the embeddings cannot be loaded.
    """
    return PrecomputedEmbeddings(config.embeddings) if config.embeddings else Clip(config, device)


class Clip:
    """A CLIP model of open_clip or of a plugin (see `registry`). An `Embedder`.

    Photos are embedded in float32 on a CPU and in bfloat16 on a GPU, texts always in float32. The protocol does not
    name the precision: elements of the two embeddings of a photo differ by less than 0.01, so an index may have both.
    """

    def __init__(self, config: IndexConfig, device: str):
        import open_clip
        import torch

        name, _, tag = config.clip_model.partition(":")
        if name not in open_clip.list_models():
            registry.load_plugins()
        if name not in open_clip.list_models():
            raise UserError(
                f"--clip-model {config.clip_model}: open_clip has no {name!r}; see open_clip.list_models()"
                f"{registry.failure_note()}"
            )
        download = hub.clip(config.clip_model)  # None without a tag
        file = config.clip_weights or (None if tag else registry.default_weights("clip", name))
        if not tag and not file:
            raise UserError(
                f"--clip-model {config.clip_model} names no weights; pass MODEL:PRETRAINED or --clip-weights FILE"
            )
        tag = tag or _implied_tag(name, config.clip_model)
        quick_gelu = bool(tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))

        def source(cfg: dict[str, Any]) -> weights.Weights:
            if file is not None or download is None:
                return weights.read(str(file), "--clip-weights")
            return weights.read(hub.fetch(download), "the published weights")

        torch.manual_seed(0)
        try:
            model = weights.clip_model(
                name, f"CLIP model {name!r}", source,
                pretrained=tag or file, device=device, precision="fp32", force_quick_gelu=quick_gelu,
            )  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # models with parts of other libraries have their own exceptions
            raise UserError(f"--clip-model {config.clip_model} cannot be created: {first_line(error)}") from error
        self.model, self.device = model.eval(), device
        self.kind = device.split(":")[0]
        self.use(torch.float32 if self.kind == "cpu" else torch.bfloat16)
        self.tokenizer = open_clip.get_tokenizer(name)
        activation = _activation(model)
        if quick_gelu and activation != "QuickGELU":
            raise UserError(f"--clip-model {config.clip_model}: its weights need QuickGELU, but it has {activation}")
        used = model.visual.preprocess_cfg
        colors = ", ".join(f"{part} {[round(value, 3) for value in used[part]]}" for part in ("mean", "std"))
        self.protocol = f"{activation}, {used['interpolation']}, {used['resize_mode']}, {colors}"
        self.about = (
            f"{name}: weights of {file or tag}, preprocessing of {tag or 'open_clip by default'} ({self.protocol})"
        )

    def use(self, dtype: torch.dtype) -> None:
        """Makes the image tower compute in `dtype`."""
        self.dtype = dtype
        self.model.visual.to(dtype)

    def prepare(self, photos: Sequence[np.ndarray | torch.Tensor]) -> torch.Tensor:
        """open_clip's preprocessing, on the device.

        Args:
            photos: uint8 [h, w, 3] each.

        Returns:
            [B, 3, H, W] in the dtype of the image tower. Before normalization, values differ by at most 1 level from
            those of Pillow, which open_clip uses, but for few in noise (see `resize`).
        """
        import torch

        from namedmask_kernels import Ragged, resize

        cfg = self.model.visual.preprocess_cfg
        size, mode = _pair(cfg["size"]), cfg["resize_mode"]
        fixed = mode == "shortest" and size[0] != size[1]  # open_clip does not pass the setting on there
        batch = Ragged.pack(photos)
        resized = resize(
            batch.with_rows(batch.rows.to(self.device)),
            [resized_size(photo.shape[:2], size, mode) for photo in photos],
            interpolation="bicubic" if fixed else cfg["interpolation"],
        )
        crops = torch.stack([_center(grid, size, cfg["fill_color"]) for grid in resized.grids()])
        return resize(
            Ragged.of_shapes(crops.flatten(0, 2), [size] * len(photos)),
            size, mean=cfg["mean"], std=cfg["std"], dtype=self.dtype,
        ).rows.view(crops.shape).permute(0, 3, 1, 2)  # fmt: skip

    def images(self, source: PhotoSource, shards: Iterable[Sequence[str]]) -> Iterator[Embedded]:
        import torch

        shard_of: deque[int] = deque()  # of the photos that are being decoded

        def names() -> Iterator[str]:
            for number, shard in enumerate(shards):
                for name in shard:
                    shard_of.append(number)
                    yield name

        def embed(batch: list[Loaded]) -> list[Embedded]:
            photos = [photo for _, photo in batch if not isinstance(photo, PhotoError)]
            if photos:
                with torch.inference_mode():
                    pixels = self.prepare(photos)
                    if self.kind == "cpu" and len(pixels) < SAME_KERNELS:
                        pixels = torch.cat([pixels, pixels.new_zeros(SAME_KERNELS - len(pixels), *pixels.shape[1:])])
                    embeddings = self.model.encode_image(pixels)[: len(photos)].float()
                    rows = iter(torch.nn.functional.normalize(embeddings, dim=-1).cpu().numpy())
            return [
                (name, photo if isinstance(photo, PhotoError) else _usable(name, next(rows))) for name, photo in batch
            ]

        loaded = decode_ahead(source, names(), lambda name: middle(source.decode(name).pixels))
        groups = itertools.groupby(loaded, lambda _: shard_of.popleft())
        batches = (batch for _, group in groups for batch in _batches(group, CLIP_BATCH[self.kind]))
        for batch in map_batches(embed, batches, self.device):
            yield from batch

    def texts(self, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        import torch

        rows: list[np.ndarray] = []
        together = max(1, TEXT_BATCH[self.kind] // max(1, len(prompts)))
        with torch.inference_mode():
            for first in range(0, len(names), together):
                some = names[first : first + together]
                tokens = self.tokenizer([prompt.format(name) for name in some for prompt in prompts]).to(self.device)
                embeddings = self.model.encode_text(tokens, normalize=True).float()
                means = embeddings.unflatten(0, (len(some), -1)).mean(1)
                rows.extend(torch.nn.functional.normalize(means, dim=1).cpu().numpy())
        for name, row in zip(names, rows, strict=True):
            if not is_direction(row):
                raise UserError(f"the CLIP model gives no finite embedding of the category {name!r}")
        return np.stack(rows)


def _batches(loaded: Iterator[Loaded], count: int) -> Iterator[list[Loaded]]:
    """Batches of at most `count` photos and `BATCH_BYTES`, but at least one photo."""
    batch: list[Loaded] = []
    used = 0
    for item in loaded:
        needed = 0 if isinstance(item[1], PhotoError) else item[1].nbytes
        if batch and (len(batch) == count or used + needed > BATCH_BYTES):
            yield batch
            batch, used = [], 0
        batch.append(item)
        used += needed
    if batch:
        yield batch


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resized_size(old: Sequence[int], size: tuple[int, int], mode: str) -> tuple[int, int]:
    """The height and width to which open_clip resizes a photo before it crops or pads it to `size`.

    Args:
        old: Height and width of the photo.
        size: Input of the network.
        mode: "shortest", "longest" or "squash".
    """
    if mode == "squash":
        return size
    if mode == "shortest" and size[0] == size[1]:  # torchvision's Resize
        h, w = (int(size[0] * side / min(old)) for side in old)
        return h, w
    ratio = (max if mode == "longest" else min)(side / new for side, new in zip(old, size, strict=True))
    h, w = (max(1, round(side / ratio)) for side in old)
    return h, w


def _center(image: torch.Tensor, size: tuple[int, int], fill: int) -> torch.Tensor:
    """The center [H, W, 3] of an image [h, w, 3], padded if it is smaller, as torchvision's CenterCrop."""
    import torch

    for axis, new in enumerate(size):
        old = image.shape[axis]
        if old >= new:
            image = image.narrow(axis, round((old - new) / 2), new)
        else:
            padding = [0, 0, 0, 0, 0, 0]  # from the last axis on
            before = (new - old) // 2
            padding[4 - 2 * axis : 6 - 2 * axis] = before, new - old - before
            image = torch.nn.functional.pad(image, padding, value=fill)
    return image


class PrecomputedEmbeddings:
    """Embeddings from a file. An `Embedder`.

    FILE.safetensors holds `image` [n, d] and `text` [k, d]. FILE.json lists the names of their rows as `image_files`
    and `names`.
    """

    def __init__(self, path: str):
        import torch

        names_path = Path(path).with_suffix(".json")
        tensors = weights.read(path, "--embeddings").tree
        try:
            lists = json.loads(read_bytes(names_path))
            image, text, files, names = tensors["image"], tensors["text"], lists["image_files"], lists["names"]
            for one in (files, names):
                if not isinstance(one, list) or not all(isinstance(name, str) for name in one):
                    raise ValueError(f"expected lists of names as image_files and names in {names_path.name}")
            if not isinstance(image, torch.Tensor) or not isinstance(text, torch.Tensor):
                raise ValueError("expected image and text to be tensors")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"--embeddings {path}: {error}") from None
        except KeyError as error:
            raise UserError(
                f"--embeddings {path}: {error.args[0]!r} is missing in it or in {names_path.name}"
            ) from None
        if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
            raise UserError(
                f"--embeddings {path}: expected image [n, d] and text [k, d], got {list(image.shape)} and "
                f"{list(text.shape)}"
            )
        if len(files) != len(image) or len(names) != len(text):
            raise UserError(
                f"--embeddings {path}: image has {counted(len(image), 'row')} and text {len(text)}, but "
                f"{names_path.name} lists {len(files)} in image_files and {len(names)} in names"
            )
        self.path, self.about, self.protocol = path, f"embeddings of {path}", ""
        self.image, self.rows = image, {file: row for row, file in enumerate(files)}
        self.text, self.names = text, {name: row for row, name in enumerate(names)}

    def images(self, source: PhotoSource, shards: Iterable[Sequence[str]]) -> Iterator[Embedded]:
        for name in itertools.chain.from_iterable(shards):
            row = self.rows.get(name)
            if row is None:
                yield name, PhotoError(name, f"{Path(self.path).name} has no embedding of this photo")
            else:
                yield name, _usable(name, _normalized(self.image[row]), f" in {Path(self.path).name}")

    def texts(self, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        if missing := [name for name in names if name not in self.names]:
            raise UserError(f"--embeddings {self.path} has no text embedding of {listed(missing)}")
        rows = [_normalized(self.text[self.names[name]]) for name in names]
        if unusable := [name for name, row in zip(names, rows, strict=True) if not is_direction(row)]:
            raise UserError(
                f"--embeddings {self.path}: the text embedding of {listed(unusable)} is NaN, infinite or zero"
            )
        return np.stack(rows)


def middle(pixels: _Pixels) -> _Pixels:
    """The middle of a photo [H, W, 3], array or tensor, if it is more than `MAX_ASPECT` times as long as wide.

    CLIP takes a square from the middle, but resizes the photo first: a line of single pixels would become gigabytes.
    """
    side = MAX_ASPECT * min(pixels.shape[:2])
    top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def _implied_tag(name: str, model: str) -> str:
    """The tag of published weights whose activation and preprocessing a file of weights without a tag has.

    Returns:
        One of the tags of the model `name`, if they all have the same ones; "" if there is none.

    Raises:
        UserError: If they differ. `model` is what the user gave.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    kinds = {_preprocessing(open_clip.get_pretrained_cfg(name, tag)): tag for tag in reversed(tags)}
    if len(kinds) > 1:
        raise UserError(
            f"--clip-model {model} --clip-weights FILE: the published weights of {name} differ in activation or "
            f"preprocessing; name those that the file's are like: {', '.join(f'{name}:{tag}' for tag in tags)}"
        )
    return next(iter(kinds.values()), "")


def _preprocessing(cfg: dict[str, Any]) -> tuple[Any, ...]:
    """What published weights require of the photos and of the network."""
    parts = [cfg.get(key) for key in ("mean", "std", "interpolation", "resize_mode")]
    return *(tuple(part) if isinstance(part, list) else part for part in parts), bool(cfg.get("quick_gelu"))


def _activation(model: torch.nn.Module) -> str:
    """The activation of the transformers of a CLIP model."""
    from open_clip.transformer import QuickGELU

    return "QuickGELU" if any(isinstance(module, QuickGELU) for module in model.modules()) else "GELU"


def is_direction(row: np.ndarray) -> bool:
    """Whether an embedding [d] has a cosine similarity to others: it is finite and not zero."""
    return bool(np.isfinite(row).all() and row.any())


def _usable(name: str, row: np.ndarray, place: str = "") -> np.ndarray | PhotoError:
    """The embedding of a photo, or an error if it has no direction."""
    return row if is_direction(row) else PhotoError(name, f"its embedding{place} is NaN, infinite or zero")


def _normalized(row: torch.Tensor) -> np.ndarray:
    """An embedding [d] of any floating-point format, L2-normalized, float32."""
    values = row.float().numpy()
    largest = np.abs(values).max(initial=0)
    if 0 < largest < 1e-12 or 1e12 < largest < np.inf:
        values = values / largest  # else the squares may underflow or overflow
    with np.errstate(invalid="ignore"):  # rows that are not finite are errors of their own
        return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
