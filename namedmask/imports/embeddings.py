# SPDX-License-Identifier: MIT
"""Imports CLIP embeddings of photos as a file for --embeddings."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import weights
from ..config import IndexConfig
from ..errors import UserError, counted, quoted
from ..files import TEMPORARY_PREFIX, atomic_write, expect_writable, fitted, open_file
from ..index import is_direction, make_embedder
from ..photos import open_source
from ..progress import warn
from . import match_photos, match_stems, unreadable, without_suffix

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch's old file format, which `weights.read` reads


def import_embeddings(
    path: Path,
    out: Path,
    photos: str | os.PathLike | None = None,
    categories: Sequence[str] = (),
    clip: IndexConfig | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> int:
    """Writes `out` and the .json beside it, in the format of `index.PrecomputedEmbeddings`.

    Args:
        path: A pickle, a file of torch.save or a safetensors file with {photo: vector}, or an output folder of
            clip-retrieval, which has img_emb/*.npy and metadata/*.parquet with a column image_path.
        out: A .safetensors file.
        photos: The photos, to which the names in `path` are matched; None: the names are those of the photos already.
        categories: Names whose text embeddings are computed and stored as well.
        clip: The CLIP model that computes them, which must be the one that made the embeddings.
        allow_pickle: Load a pickle. Only arrays, tensors and plain values are accepted in it.
        overwrite: Replace `out`.

    Returns:
        The number of embeddings. A vector that is NaN, infinite or zero, or is of no photo, is left out with a warning.

    Raises:
        UserError: If `path` cannot be read, has no usable embedding, or is a pickle without `allow_pickle`.
    """
    names_path = out.with_suffix(".json")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: expected a file name that ends with .safetensors")
    existing = [file for file in (out, names_path) if file.exists()]
    killed = existing == [names_path] and _unfinished(out).exists()  # between the two, in `_write`
    if existing and not overwrite and not killed:
        raise UserError(f"{existing[0]} exists; --overwrite replaces it")
    expect_writable(out)
    try:
        names, image, unusable = _stacked(_vectors(path, allow_pickle))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if photos is not None:
        source = open_source(photos)
        listed = list(source.names(lambda _: None))
        matched, reasons = match_photos(names, listed, source.path)
        if keys := [name for name in reasons if without_suffix(name) == name]:  # clip-retrieval has keys of tars
            taken = set(matched.values())
            by_key, of_keys = match_stems(keys, (name for name in listed if name not in taken), source.path)
            matched |= by_key
            reasons = {name: of_keys.get(name, reason) for name, reason in reasons.items() if name not in by_key}
        rows = {matched[name]: row for row, name in enumerate(names) if name in matched}
        if not rows:
            first, reason = next(iter(reasons.items()))
            count = counted(len(names), "photo")
            raise UserError(f"{path}: {photos} has none of its {count}, such as {first!r} ({reason})")
        names, image = list(rows), image[list(rows.values())]
        if reasons:
            warn(f"{counted(len(reasons), 'embedding')} of no photo in {photos}: {quoted(reasons)}")
    if unusable:
        warn(f"{counted(len(unusable), 'embedding')} left out as NaN, infinite or zero: {quoted(unusable)}")
    text = np.zeros((0, image.shape[1]), np.float32)
    if categories:
        clip = clip or IndexConfig()
        text = _text(categories, clip)
        if text.shape[1] != image.shape[1]:
            raise UserError(
                f"{path} has embeddings of {image.shape[1]} dimensions, --clip-model {clip.clip_model} gives "
                f"{text.shape[1]}; pass the model that made them"
            )
    _write(out, names_path, {"image": image, "text": text}, {"image_files": names, "names": list(categories)})
    return len(names)


def _text(categories: Sequence[str], clip: IndexConfig) -> np.ndarray:
    from ..archive import expect_distinct, prompts

    expect_distinct(categories, "--categories")
    return make_embedder(clip, "cpu").texts(categories, prompts())


def _write(out: Path, names_path: Path, tensors: dict[str, np.ndarray], names: dict[str, list[str]]) -> None:
    from safetensors.numpy import save

    contents = {names_path: json.dumps(names).encode(), out: save(tensors)}
    new = {path: _unfinished(path) for path in contents}
    try:
        for path, data in contents.items():  # both are complete before the old ones go
            with atomic_write(new[path]) as file:
                file.write(data)
        out.unlink(missing_ok=True)  # never beside the names of others
        for path in contents:
            new[path].replace(path)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(fitted(f"{TEMPORARY_PREFIX}{path.name}"))


def _stacked(vectors: Iterator[tuple[Any, Any]]) -> tuple[list[str], np.ndarray, list[str]]:
    """The names and rows [n, d] of all usable vectors, float16 if all are, else float32; the names of the others."""
    rows: dict[str, np.ndarray] = {}
    unusable: list[str] = []
    width = None
    for name, value in vectors:
        if not isinstance(name, str):
            raise ValueError(f"expected names of photos, got {name!r:.60}")
        if name in rows:
            raise ValueError(f"{name!r} has two embeddings")
        row = _row(name, value)
        width = width or len(row)
        if len(row) != width:
            raise ValueError(f"{name!r} has {len(row)} dimensions, the photos before have {width}")
        if is_direction(row):
            rows[name] = row
        else:
            unusable.append(name)
    if not rows:
        raise ValueError(f"all embeddings are NaN, infinite or zero: {quoted(unusable)}" if unusable else "it is empty")
    return list(rows), np.stack(list(rows.values())), unusable


def _row(name: str, value: Any) -> np.ndarray:
    """A vector [d] or [1, d], float16 or float32."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dtype in FLOATS:
        value = value.detach().float().numpy() if value.dtype == torch.bfloat16 else value.detach().numpy()
    if isinstance(value, (np.ndarray, torch.Tensor)):
        kind = f"{value.dtype} {list(value.shape)}"
    if (
        not isinstance(value, np.ndarray)
        or value.dtype.kind != "f"
        or not 0 < value.size == max(value.shape, default=0)
    ):
        raise ValueError(f"{name!r}: expected a vector of floating-point numbers, got {kind}")
    with np.errstate(over="ignore"):  # becomes infinite, and is named
        return value.reshape(-1).astype(value.dtype if value.dtype == np.float16 else np.float32)


# -- readers -----------------------------------------------------------------------------------------------------------


def _vectors(path: Path, allow_pickle: bool) -> Iterator[tuple[Any, Any]]:
    """Yields the name and the vector of each photo. Raises ValueError, OSError or UserError."""
    if path.is_dir():
        return _clip_retrieval(path)
    with open_file(path) as file:
        head = file.read(len(TORCH_MAGIC))
    if head.startswith(b"PK") or head[8:9] == b"{" or head == TORCH_MAGIC:
        tree = weights.read(path).tree
        if tree.keys() == {"image", "text"}:
            raise UserError(f"{path} is in the format of --embeddings already; pass it there as it is")
        return iter(tree.items())
    if not allow_pickle:
        raise UserError(
            f"{path} is neither a safetensors file nor a file of torch.save; if it is a pickle, which could execute "
            "code, pass --allow-pickle to load the arrays in it, or convert it to safetensors (see the documentation)"
        )
    try:
        with open_file(path) as file:
            tree = _ArrayUnpickler(file).load()
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"it is no pickle of arrays: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"expected {{photo: vector}}, got {type(tree).__name__}")
    return iter(tree.items())


def _clip_retrieval(folder: Path) -> Iterator[tuple[Any, Any]]:
    images = {_number(file): file for file in sorted((folder / "img_emb").glob("*.npy"))}
    metadata = {_number(file): file for file in sorted((folder / "metadata").glob("*.parquet"))}
    if not images or images.keys() != metadata.keys():
        raise ValueError(
            f"expected the output of clip-retrieval, as many img_emb/*.npy as metadata/*.parquet, got {len(images)} "
            f"and {len(metadata)}"
        )
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{folder} has .parquet files: pip install 'namedmask[parquet]'") from None
    for number, file in sorted(images.items()):
        try:
            rows = np.lib.format.open_memmap(file, mode="r")  # np.load would also open an .npz of this name
        except (OSError, ValueError) as error:
            raise unreadable(file, error) from None
        table = parquet.ParquetFile(metadata[number])
        if "image_path" not in table.schema_arrow.names:
            raise ValueError(f"{metadata[number].name} has no column image_path")
        names = table.read(columns=["image_path"])["image_path"].to_pylist()
        if rows.ndim != 2 or len(rows) != len(names):
            count = counted(len(names), "row")
            raise ValueError(f"{file.name} is {list(rows.shape)}, {metadata[number].name} has {count}")
        yield from zip(names, rows, strict=True)


def _number(file: Path) -> int:
    digits = re.findall(r"\d{1,18}", file.stem)
    if not digits:
        raise ValueError(f"{file.name} has no number")
    return int(digits[-1])


class _ArrayUnpickler(pickle.Unpickler):
    """Loads dictionaries of numpy arrays and torch tensors, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = _ALLOWED.get((module.replace("numpy._core.", "numpy.core."), name))
        if known is None:
            raise ValueError(f"it holds {module}.{name}, which is neither an array nor a tensor")
        return known


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(1).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.empty(1).__reduce_ex__(5)[0],
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes of protocol 2
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): lambda data: torch.load(io.BytesIO(data), weights_only=True),
}
