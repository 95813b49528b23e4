# SPDX-License-Identifier: MIT
# Names are kept byte by byte: pathlib would normalize them ("./a", "a//b"), and it is slow for millions of names.
# ruff: noqa: PTH110, PTH112, PTH113, PTH116, PTH118, PTH119, PTH120, PTH123
"""Sources of photos, and safe decoding.

A `PhotoSource` is a folder, a list file or a tar shard. It streams the names of its photos in a fixed order and decodes
a photo by its name. Photos are untrusted: any problem with one raises `PhotoError`, and no content of a tar can make
the source read another file.
"""

import codecs
import functools
import io
import logging
import os
import stat
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from PIL import Image

from .threads import map_ahead, thread_count

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30

_Result = TypeVar("_Result")

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_SIGNATURES = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"GIF8": "GIF",
}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_UNPACK = "compressed archives cannot be read in place: unpack it into a folder or a plain .tar"

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's warnings about unusual photos must not disturb the progress bar. `warnings.catch_warnings` around each decode
# is no solution: it swaps global state, and several threads decode. (The line that libtiff itself prints for a damaged
# TIFF cannot be silenced from here.)
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class Photo(NamedTuple):
    """A decoded photo: its name in the source, and uint8 RGB pixels `[height, width, 3]`, C-contiguous and writable."""

    name: str
    pixels: np.ndarray


class PhotoError(Exception):
    """A photo, a shard or a folder that cannot be used.

    Attributes:
        photo: Its name.
        reason: Why it cannot be used, in one line.
    """

    def __init__(self, photo: str, reason: str):
        super().__init__(photo, " ".join(reason.split()))
        self.photo, self.reason = self.args

    def __str__(self) -> str:
        # repr: a name may contain newlines or bytes that a terminal cannot show.
        return f"{self.photo!r}: {self.reason}"


class PhotoSource:
    """The photos of a folder (with its subfolders), of a list file (`.txt`) or of one `.tar` shard.

    Names are `str`; bytes that are not UTF-8 are kept by surrogateescape, so `os.fsencode(name)` restores them.

    - Folder: the name of a photo is its path below the folder, with `/`. Photos are the files whose suffix is in
      `PHOTO_SUFFIXES`, in upper or lower case. Entries with a leading dot and `__MACOSX` are skipped. Links to folders
      are followed, except back into a folder that is being listed.
    - List: one path per line, absolute or relative to the folder of the list. The name is the line as it is, with any
      suffix. Blank lines are skipped; a path that is listed twice is yielded twice.
    - Tar (webdataset layout), as the source itself or inside a folder or a list: members are named
      `path/to/shard.tar/member.jpg` and selected like the files of a folder. Nothing is extracted: a member is a range
      of bytes in the shard. If several members have the same name, the last one counts, as in tar.

    The order is fixed: the entries of a folder, files and subfolders together, sorted by the bytes of their names; the
    lines of a list and the members of a tar in their own order. Only one folder (with its parents) or one tar is held
    in memory.

    A source is cheap to pickle, survives a fork and may be used from several threads.

    Args:
        path: The folder, list file or tar.
        max_pixels: Photos with more pixels are rejected before they are decoded. Pillow's own limit of 179 million
            pixels always applies.

    Raises:
        ValueError: If `path` is none of the three.
    """

    def __init__(self, path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS):
        self.path = os.fsdecode(path)
        self.max_pixels = max_pixels
        lower = self.path.lower()
        if os.path.isdir(self.path):
            self._kind, self._root = "folder", self.path
        elif not os.path.exists(self.path):
            raise ValueError(f"photos: {self.path!r} does not exist")
        elif lower.endswith(_COMPRESSED):
            raise ValueError(f"photos: {self.path!r}: {_UNPACK}")
        elif lower.endswith((".txt", ".tar")):
            self._kind, self._root = lower[-3:], os.path.dirname(self.path)
        else:
            raise ValueError(f"photos: {self.path!r} is not a folder, a .txt list or a .tar")

    def __iter__(self) -> Iterator[str]:
        """Yields the names in order. Raises PhotoError at the first folder or shard that cannot be listed."""

        def stop(error: PhotoError) -> None:
            raise error

        return self.names(stop)

    def names(self, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        """Yields the names in order. Calls `on_error` for a folder or shard that cannot be listed, and continues."""
        if self._kind == "folder":
            return self._folder_names(on_error)
        if self._kind == "tar":
            return self._tar_names(os.path.basename(self.path), on_error)
        return self._list_names(on_error)

    def categories(self, on_error: Callable[[PhotoError], None]) -> dict[str, list[str]]:
        """Reads class folders: each first-level folder is a category.

        Args:
            on_error: Called for each folder or shard that cannot be listed.

        Returns:
            For each category, in order, the names of its photos.

        Raises:
            ValueError: If the source is not a folder, or if it has photos or shards outside class folders.
        """
        if self._kind != "folder":
            raise ValueError(
                f"photos: {self.path!r} is not a folder with class folders: pass --categories or --categories-file"
            )
        groups: dict[str, list[str]] = {}
        loose: list[str] = []
        for name in self.names(on_error):
            category, slash, _ = name.partition("/")
            if slash and (category in groups or os.path.isdir(os.path.join(self._root, category))):
                groups.setdefault(category, []).append(name)
                continue
            loose.append(name)
            if len(loose) == 3:
                break
        if loose:
            raise ValueError(
                f"photos: {self.path!r} holds photos outside class folders ({', '.join(map(repr, loose))}): "
                "move each into a folder with the name of its category, or pass --categories or --categories-file"
            )
        return groups

    def read(self, name: str) -> bytes:
        """Reads the bytes of a photo's file.

        Raises:
            PhotoError: If the file cannot be read.
        """
        path, member = self._locate(name)
        try:
            status = os.stat(path)
            # Before opening: opening a FIFO waits for a writer, and opening a device may have side effects.
            if not stat.S_ISREG(status.st_mode):
                raise PhotoError(name, "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
            if member is None:
                offset, size = 0, status.st_size
            else:
                offset, size = _find_member(path, status, member, name)
            if size == 0:
                raise PhotoError(name, "empty file")
            if size > MAX_BYTES:
                raise PhotoError(name, f"{size} bytes, more than the limit of {MAX_BYTES}")
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except (FileNotFoundError, NotADirectoryError):
            raise PhotoError(name, "vanished") from None
        except OSError as error:
            raise PhotoError(name, f"cannot be read: {error.strerror or error}") from error
        except (ValueError, MemoryError) as error:  # ValueError: a name that no file can have (NUL, lone surrogates)
            raise PhotoError(name, f"cannot be read: {error or 'out of memory'}") from error
        if len(data) < size:
            raise PhotoError(name, f"truncated: {len(data)} of {size} bytes")
        return data

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a member of a tar, of this name. It may not be a readable photo."""
        try:
            path, member = self._locate(name)
            if member is not None:
                _find_member(path, os.stat(path), member, name)
            return os.path.isfile(path)
        except (PhotoError, OSError, ValueError):
            return False

    def decode(self, name: str) -> Photo:
        """Decodes a photo as a viewer shows it: the EXIF orientation is applied, so masks match the viewer.

        Transparent pixels are composited over white. Animations and multi-page files give their first frame. Grayscale
        with more than 8 bits is converted: 16-bit values keep their high byte, floats in [0, 1] are scaled by 255, any
        other range is stretched from its minimum to its maximum. Color profiles are ignored.

        Raises:
            PhotoError: If the photo cannot be decoded. No content of a file raises anything else.
        """
        data = self.read(name)
        try:
            return Photo(name, _decode(data, name, self.max_pixels))
        except PhotoError:
            raise
        except Exception as error:
            # Broad on purpose: for damaged or malicious bytes Pillow raises OSError, SyntaxError, ValueError,
            # struct.error, zlib.error, EOFError, IndexError, KeyError, MemoryError, DecompressionBombError and more.
            raise PhotoError(name, _explain(error, data)) from error

    def _folder_names(self, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        # An explicit stack of (identity, prefix, remaining entries): folders may be nested deeper than Python recurses.
        stack: list[tuple[tuple[int, int], str, Iterator[tuple[bytes, bool]]]] = []

        def enter(name: str) -> None:
            path = os.path.join(self._root, name)
            try:
                status = os.stat(path)
                identity = (status.st_dev, status.st_ino)
                if all(identity != above for above, _, _ in stack):
                    stack.append((identity, f"{name}/" if name else "", iter(_list_folder(path))))
            except OSError as error:
                on_error(PhotoError(name or self.path, f"folder cannot be listed: {error.strerror or error}"))

        enter("")
        while stack:
            _, prefix, entries = stack[-1]
            entry, is_folder = next(entries, (None, False))
            if entry is None:
                stack.pop()
                continue
            name = prefix + os.fsdecode(entry)
            if is_folder:
                enter(name)
            else:
                yield from self._file_names(name, on_error)

    def _list_names(self, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines):
                line = line.removeprefix(codecs.BOM_UTF8 if number == 0 else b"").rstrip(b"\r\n")
                if line.strip():
                    yield from self._file_names(os.fsdecode(line), on_error)

    def _file_names(self, name: str, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        """The names of a file in a folder or a list: its own, or those of the members of a shard."""
        lower = name.lower()
        if lower.endswith(_COMPRESSED):
            on_error(PhotoError(name, _UNPACK))
        elif lower.endswith(".tar"):
            yield from self._tar_names(name, on_error)
        else:
            yield name

    def _tar_names(self, name: str, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        path = os.path.join(self._root, name)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            index = _index_tar(path, status.st_size, status.st_mtime_ns)
        except (OSError, ValueError) as error:
            on_error(PhotoError(name, f"tar cannot be read: {getattr(error, 'strerror', None) or error}"))
            return
        for member in index.members:
            yield f"{name}/{member}"
        if index.problem:
            on_error(PhotoError(name, index.problem))

    def _locate(self, name: str) -> tuple[str, str | None]:
        """The file that holds a photo, and the member of the tar that the photo is (None: the file itself)."""
        parts = name.split("/")
        shard = len(parts)
        for end, part in enumerate(parts, 1):
            if part.lower().endswith(".tar"):
                shard = min(shard, end)
                path = os.path.join(self._root, "/".join(parts[:end]))
                if os.path.isfile(path):
                    return path, "/".join(parts[end:])
        # A path in a list is trusted up to a shard. All other parts are untrusted and must not leave the source.
        untrusted = parts[shard:] if self._kind == "txt" else parts
        if ".." in untrusted or (self._kind != "txt" and name.startswith("/")):
            raise PhotoError(name, "not a path inside the photo source")
        return os.path.join(self._root, name), None


def decode_ahead(load: Callable[[str], _Result], names: Iterable[str]) -> Iterator[tuple[str, _Result | PhotoError]]:
    """Loads photos in several threads ahead of the caller.

    Args:
        load: Loads a photo by its name.
        names: Names of the photos.

    Returns:
        An iterator over each name with the result of `load` or the PhotoError that it raised, in order. Other
        exceptions of `load` are raised.
    """

    def load_or_error(name: str) -> tuple[str, _Result | PhotoError]:
        try:
            return name, load(name)
        except PhotoError as error:
            return name, error

    return map_ahead(load_or_error, names, thread_count())


def _is_hidden(name: str) -> bool:
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def _list_folder(path: str) -> list[tuple[bytes, bool]]:
    """The folders, photos and archives in a folder as (name, is a folder), sorted by the bytes of their names."""
    entries = []
    with os.scandir(path) as scan:
        for entry in scan:
            if _is_hidden(entry.name):
                continue
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if is_folder or entry.name.lower().endswith((*PHOTO_SUFFIXES, ".tar", *_COMPRESSED)):
                entries.append((os.fsencode(entry.name), is_folder))
    return sorted(entries)


class _TarIndex(NamedTuple):
    members: dict[str, tuple[int, int] | None]  # name -> (offset, size); None: not a plain file, never followed
    problem: str | None  # what is wrong with the tar itself


# A cache of the module, so that sources stay cheap to pickle. Two threads may scan the same tar, which is harmless.
@functools.lru_cache(maxsize=32)
def _index_tar(path: str, size: int, mtime_ns: int) -> _TarIndex:
    """Positions of the photos in a tar. `size` and `mtime_ns` are part of the cache key: a tar may be rewritten."""
    members: dict[str, tuple[int, int] | None] = {}
    problem = None
    with open(path, "rb") as file:
        try:
            # Names must not depend on the user's locale.
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                reached = -1
                while (member := tar.next()) is not None:
                    if member.size < 0 or tar.offset <= reached:
                        raise tarfile.ReadError("header points backwards")
                    reached = tar.offset
                    cast(Any, tar).members.clear()  # tarfile keeps every header that it has read
                    hidden = any(_is_hidden(part) for part in member.name.split("/"))
                    if member.isdir() or hidden or not member.name.lower().endswith(PHOTO_SUFFIXES):
                        continue
                    plain = member.isreg() and not member.issparse()
                    members[member.name] = (member.offset_data, member.size) if plain else None
                # tarfile stops silently at a damaged header: the end is real only if it is marked.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset} of {size}")
        except Exception as error:
            # Broad on purpose: for damaged or malicious bytes tarfile raises far more than its own errors
            # (OverflowError, RecursionError, ...). The members before the damage are kept.
            problem = f"damaged tar, only the photos before the damage are listed: {error}"
    return _TarIndex(members, problem)


def _find_member(path: str, status: os.stat_result, member: str, name: str) -> tuple[int, int]:
    members = _index_tar(path, status.st_size, status.st_mtime_ns).members
    if member not in members:
        raise PhotoError(name, "vanished: no such photo in the tar")
    place = members[member]
    if place is None:
        raise PhotoError(name, "a link or special file in a tar; these are never followed")
    return place


def _decode(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            megapixels, limit = width * height / 1e6, max_pixels / 1e6
            raise PhotoError(name, f"{megapixels:.4g} megapixels, more than the limit of {limit:.4g}")
        image.load()
        # After load: the EXIF of a PNG may follow the pixels, and Pillow itself rotates TIFFs while loading.
        transpose = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image if transpose is None else image.transpose(transpose))
        width, height = rgb.size
        # The buffer of a BytesIO is writable, and CPython does not copy the bytes because there is no other reference.
        pixels = np.frombuffer(io.BytesIO(rgb.tobytes()).getbuffer(), np.uint8)
        return pixels.reshape(height, width, 3)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # Broad on purpose: damaged EXIF raises many exceptions, and must not make the photo unusable.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grayscale [h, w] of uint16, int32 or float32 -> uint8, by the rules of `PhotoSource.decode`."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if values.dtype.kind != "f" and low >= 0 and high <= 0xFFFF:
        return (values >> 8).astype(np.uint8)
    return np.rint((values - float(low)) * (255 / (float(high) - float(low) or 1))).astype(np.uint8)


def _explain(error: Exception, data: bytes) -> str:
    """The reason of a failure of Pillow, as a message for the user."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too many megapixels: {error}"
    if not isinstance(error, Image.UnidentifiedImageError):
        text = str(error) or type(error).__name__
        return f"truncated: {text}" if "truncated" in text.lower() else f"cannot be decoded: {text}"
    head = data[:40]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"not an image: text begins with {head.decode('ascii')!r}"
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return f"cannot be decoded: the header of this {kind} file is damaged"
    return f"not an image in a supported format: begins with bytes {head[:16].hex(' ')}"
