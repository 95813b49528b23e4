# SPDX-License-Identifier: MIT
"""The index: image embeddings of all photos in shards, by a CLIP model of open_clip or from precomputed embeddings.

index/photos.jsonl          names of the photos in order; the number of a photo is its line, from 0
index/00000.safetensors     image float16 [n, d], rows L2-normalized; photo int64 [n], numbers of the photos, ascending
index/00000.errors.jsonl    photos of the shard without a row, with the reason
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from . import registry
from .config import IndexConfig
from .distributed import Worker
from .errors import UserError
from .files import atomic_write
from .masks import ErrorRecord, errors_path, write_errors
from .photos import PhotoError, PhotoSource, decode_ahead
from .threads import kernels_on_one_thread, map_ahead

MAX_ASPECT = 16  # of a photo that is resized for CLIP
CLIP_BATCH = {"cpu": 16, "cuda": 256}


class Embedder(Protocol):
    """Maps photos and category names to embeddings in the same space."""

    def images(self, source: PhotoSource, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray | PhotoError]]:
        """Yields each name with the photo's embedding, float32 [d] L2-normalized, or with the photo's error."""

    def texts(self, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        """Returns one row per name, float32 [k, d], L2-normalized."""


def list_photos(source: PhotoSource, folder: Path) -> None:
    """Writes photos.jsonl, and photos.errors.jsonl with the folders and shards that cannot be listed."""
    errors: list[ErrorRecord] = []
    with atomic_write(folder / "photos.jsonl") as file:
        for name in source.names(lambda e: errors.append(ErrorRecord(e.photo, "list", e.reason))):
            file.write(json.dumps({"photo": name}).encode() + b"\n")
        write_errors(errors_path(folder / "photos.jsonl"), errors)


def read_photos(folder: Path) -> Iterator[str]:
    """Yields the names in photos.jsonl, in order."""
    with (folder / "photos.jsonl").open("rb") as lines:
        for line in lines:
            yield json.loads(line)["photo"]


def shard_path(folder: Path, shard: int) -> Path:
    """File of a shard of the index."""
    return folder / f"{shard:05}.safetensors"


def missing_shards(folder: Path, config: IndexConfig) -> list[int]:
    """Returns the numbers of the shards that do not exist yet."""
    count = sum(1 for _ in read_photos(folder))
    return [s for s in range(-(-count // config.shard_size)) if not shard_path(folder, s).exists()]


def build_index(
    source: PhotoSource,
    folder: Path,
    config: IndexConfig,
    worker: Worker,
    device: str,
    advance: Callable[..., None],
) -> None:
    """Embeds the photos of photos.jsonl, shard by shard. Existing shards are kept.

    Args:
        source: The photos.
        folder: Folder of the index.
        config: Settings of the index.
        worker: This process, which claims its shards.
        device: Device as torch names it.
        advance: Called as `advance(photos, existing=...)` after each shard; `existing`: the shard existed already.

    Raises:
        UserError: If the embedder cannot be created.
    """
    count = sum(1 for _ in read_photos(folder))
    shards = -(-count // config.shard_size)
    names, at = read_photos(folder), 0  # claimed shards ascend, so one pass over the names is enough
    embedder = None
    for shard in worker.claim("index", shards):
        first, size = shard * config.shard_size, min(config.shard_size, count - shard * config.shard_size)
        exists = shard_path(folder, shard).exists()
        if not exists:
            embedder = embedder or make_embedder(config, device)
            batch = list(itertools.islice(names, first - at, first - at + size))
            at = first + size
            _embed_shard(embedder, source, batch, first, shard_path(folder, shard))
        advance(size, existing=exists)


def _embed_shard(embedder: Embedder, source: PhotoSource, names: list[str], first: int, path: Path) -> None:
    from safetensors.numpy import save

    rows, numbers, errors = [], [], []
    for number, (name, result) in enumerate(embedder.images(source, names), first):
        if isinstance(result, PhotoError):
            errors.append(ErrorRecord(name, "index", result.reason))
        else:
            rows.append(result.astype(np.float16))
            numbers.append(number)
    image = np.stack(rows) if rows else np.zeros((0, 0), np.float16)
    write_errors(errors_path(path), errors)
    with atomic_write(path) as file:
        file.write(save({"image": image, "photo": np.array(numbers, np.int64)}))


def make_embedder(config: IndexConfig, device: str) -> Embedder:
    """Creates the embedder of the settings.

    Raises:
        UserError: If the model is unknown, or its weights or the embeddings cannot be loaded.
    """
    return PrecomputedEmbeddings(config.embeddings) if config.embeddings else Clip(config, device)


class Clip:
    """A CLIP model of open_clip or of a plugin (see `registry`), in float32. An `Embedder`."""

    def __init__(self, config: IndexConfig, device: str):
        import open_clip
        import torch

        name, _, pretrained = config.clip_model.partition(":")
        if name not in open_clip.list_models():
            registry.load_plugins()
        if name not in open_clip.list_models():
            raise UserError(
                f"--clip-model {config.clip_model}: open_clip has no {name!r}; see open_clip.list_models()"
                f"{registry.failure_note()}"
            )
        weights = config.clip_weights or pretrained or registry.default_weights("clip", name)
        if config.clip_weights and not Path(config.clip_weights).is_file():
            raise UserError(f"--clip-weights {config.clip_weights}: there is no such file")
        if not weights:
            raise UserError(
                f"--clip-model {config.clip_model} names no weights; pass MODEL:PRETRAINED or --clip-weights FILE"
            )
        torch.manual_seed(0)
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained=weights, device=device, precision="fp32"
            )
        except Exception as error:  # hub, network, file format and key mismatches each have their own exception
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--clip-model {config.clip_model}: its weights could not be loaded ({reason}); download the model's "
                "open_clip_pytorch_model.bin or model.safetensors and pass it as --clip-weights FILE, or pass "
                "precomputed --embeddings FILE"
            ) from error
        self.model, self.device = model.eval(), device
        self.tokenizer = open_clip.get_tokenizer(name)

    def images(self, source: PhotoSource, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray | PhotoError]]:
        import torch
        from PIL import Image

        def load(name: str) -> torch.Tensor:
            return self.preprocess(Image.fromarray(middle(source.decode(name).pixels)))

        def embed(batch: list[tuple[str, torch.Tensor | PhotoError]]) -> list[tuple[str, np.ndarray | PhotoError]]:
            photos = [photo for _, photo in batch if not isinstance(photo, PhotoError)]
            if photos:
                with torch.inference_mode():
                    embeddings = self.model.encode_image(torch.stack(photos).to(self.device), normalize=True)
                rows = iter(embeddings.float().cpu().numpy())
            return [(name, photo if isinstance(photo, PhotoError) else next(rows)) for name, photo in batch]

        loaded = decode_ahead(source, names, load)
        batches = iter(lambda: list(itertools.islice(loaded, CLIP_BATCH[self.device.split(":")[0]])), [])
        with kernels_on_one_thread(self.device) as threads:
            for batch in map_ahead(embed, batches, threads):
                yield from batch

    def texts(self, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        import torch

        rows = []
        with torch.inference_mode():
            for name in names:
                tokens = self.tokenizer([prompt.format(name) for prompt in prompts]).to(self.device)
                mean = self.model.encode_text(tokens, normalize=True).float().mean(0)
                rows.append(torch.nn.functional.normalize(mean, dim=0))
        return torch.stack(rows).cpu().numpy()


class PrecomputedEmbeddings:
    """Embeddings from a file. An `Embedder`.

    FILE.safetensors holds `image` [n, d] and `text` [k, d]. FILE.json lists the names of their rows as `image_files`
    and `names`.
    """

    def __init__(self, path: str):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        names_path = Path(path).with_suffix(".json")
        try:
            tensors, lists = load_file(path), json.loads(names_path.read_bytes())
            image, text, files, names = tensors["image"], tensors["text"], lists["image_files"], lists["names"]
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(f"--embeddings {path}: {error}") from None
        except KeyError as error:
            raise UserError(
                f"--embeddings {path}: {error.args[0]!r} is missing in it or in {names_path.name}"
            ) from None
        if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
            raise UserError(
                f"--embeddings {path}: expected image [n, d] and text [k, d], got {image.shape} and {text.shape}"
            )
        if len(files) != len(image) or len(names) != len(text):
            raise UserError(
                f"--embeddings {path}: {len(image)} image and {len(text)} text rows, "
                f"but {names_path.name} lists {len(files)} image_files and {len(names)} names"
            )
        self.path = path
        self.image, self.rows = image, {file: row for row, file in enumerate(files)}
        self.text, self.names = _normalized(text.astype(np.float32)), {name: row for row, name in enumerate(names)}

    def images(self, source: PhotoSource, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray | PhotoError]]:
        for name in names:
            row = self.rows.get(name)
            if row is None:
                yield name, PhotoError(name, f"{Path(self.path).name} has no embedding of this photo")
            else:
                yield name, _normalized(self.image[row].astype(np.float32))

    def texts(self, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        if missing := [name for name in names if name not in self.names]:
            raise UserError(f"--embeddings {self.path} has no text embedding of {', '.join(missing)}")
        return self.text[[self.names[name] for name in names]]


def middle(pixels: np.ndarray) -> np.ndarray:
    """The middle of a photo [H, W, 3] that is more than `MAX_ASPECT` times as long as wide, else all of it.

    CLIP takes a square from the middle, but resizes the photo first: a line of single pixels would become gigabytes.
    """
    side = MAX_ASPECT * min(pixels.shape[:2])
    top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def _normalized(rows: np.ndarray) -> np.ndarray:
    """L2-normalized rows."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
