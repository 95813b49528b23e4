# SPDX-License-Identifier: MIT
# Names are kept byte by byte: pathlib would normalize them ("./a", "a//b"), and it is slow for millions of names.
# ruff: noqa: PTH110, PTH112, PTH113, PTH116, PTH118, PTH119, PTH120, PTH123
"""Sources of photos, and safe decoding.

A `PhotoSource` is a folder, a list file or a tar shard. It streams the names of its photos in a fixed order and decodes
a photo by its name. Photos are untrusted: any problem with one raises `PhotoError`, and no content of a tar can make
the source read another file.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import logging
import os
import stat
import tarfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np
from PIL import Image, features

from .memory import DECODE_SHARE, photo_budget
from .threads import map_ahead, thread_count

# HEIC and AVIF are read if Pillow can, see `_formats`.
PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".heic", ".heif", ".hif", ".avif"),
)
# Photos that are listed as errors, so that nobody believes that they were used.
UNREAD_SUFFIXES = (
    *(".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".psd", ".exr", ".hdr", ".tga"),
    *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr"),
)
SEGMENT_RECORD = "segment.json"  # in the output folders of `namedmask segment`
MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30
DECODING_BYTES = 16  # per pixel at the peak of decoding; measured: 10 (JPEG) to 18 (WebP)

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
# The beginning of the brand in a container of HEIC, AVIF or videos.
_BRANDS = {b"avi": ".avif", b"hei": ".heic", b"hev": ".heic", b"mif": ".heic", b"msf": ".heic"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_LISTED = (*PHOTO_SUFFIXES, *UNREAD_SUFFIXES, ".tar", *_COMPRESSED)  # photos and archives
_CONVERT = "format that is not read: convert it to JPEG or PNG"
_HEIC = "HEIC photo: install pillow-heif (pip install 'namedmask[heif]'), or convert it to JPEG"
_AVIF = "AVIF photo: install pillow 11.3 or later, or convert it to JPEG"
_NESTED = "a tar inside a tar is not read: unpack the outer one"
_UNPACK = "compressed archives cannot be read in place: unpack it into a folder or a plain .tar"

_ARRAYS = {(dtype, 1) for dtype in ("bool", "uint8", "uint16", "int32", "float32")} | {("uint8", c) for c in (2, 3, 4)}
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
_SWAPPING = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)

# The inverse for arrays.
_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: np.rot90,
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: lambda pixels: np.rot90(pixels, -1),
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

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


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


class RepeatedPhotos(PhotoError):
    """A note that a list names photos more than once. They are used once, so nothing is lost."""


class PhotoSource:
    """The photos of a folder (with its subfolders), of a list file (`.txt`) or of one `.tar` shard.

    Names are `str`; bytes that are not UTF-8 are kept by surrogateescape, so `os.fsencode(name)` restores them.

    - Folder: the name of a photo is its path below the folder, with `/`. Photos are the files whose suffix is in
      `PHOTO_SUFFIXES`, in upper or lower case. Entries with a leading dot, `__MACOSX`, and the masks and overlays that
      `namedmask segment` has written are skipped. Links to folders are followed, except back into a folder that is
      being listed.
    - List: one path per line, absolute or relative to the folder of the list. The name is the line as it is, with any
      suffix. Blank lines are skipped. A path that is listed again is yielded once; its lines are counted in an error.
    - Tar (webdataset layout), as the source itself or inside a folder or a list: members are named
      `path/to/shard.tar/member.jpg` and selected like the files of a folder. Nothing is extracted: a member is a range
      of bytes in the shard. If several members have the same name, the last one counts, as in tar. Hard links to
      earlier photos of the tar are resolved; symbolic links and sparse members are errors. Concatenated tars are read
      to the end.

    Photos in formats that cannot be read (`UNREAD_SUFFIXES`, and HEIC or AVIF without a decoder) are errors.

    The order is fixed: the entries of a folder, files and subfolders together, sorted by the bytes of their names; the
    lines of a list and the members of a tar in their own order. Only one folder (with its parents) or one tar is held
    in memory, and about 100 bytes per line of a list.

    A source is cheap to pickle, survives a fork and may be used from several threads.

    Args:
        path: The folder, list file or tar.
        max_pixels: Photos with more pixels are rejected before they are decoded. Pillow's own limit of 179 million
            pixels always applies.
        upright: Apply the EXIF orientation of photos. Benchmarks label the pixels as they are stored.

    Raises:
        ValueError: If `path` is none of the three.
    """

    def __init__(self, path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, upright: bool = True):
        self.path = os.fsdecode(path)
        self.max_pixels = max_pixels
        self.upright = upright
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
        """Yields the names in order. Raises PhotoError at the first photo, folder or shard that cannot be read."""

        def stop(error: PhotoError) -> None:
            if not isinstance(error, RepeatedPhotos):
                raise error

        return self.names(stop)

    def names(self, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        """Yields the names in order. Calls `on_error` for whatever cannot be read, as far as its name or the listing of
        its folder or shard shows, and continues."""
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
        with self._opened(name) as (part, size):
            if size > MAX_BYTES:
                raise PhotoError(name, f"{size} bytes, more than the limit of {MAX_BYTES}")
            data = part.read(size)
        if len(data) < size:
            raise PhotoError(name, f"truncated: {len(data)} of {size} bytes")
        return data

    def decoding_cost(self, name: str) -> int:
        """Returns about how many bytes of memory `decode` takes at its peak. It reads only the header of the file.

        Raises:
            PhotoError: If the file cannot be read, or if `decode` would reject its header.
        """
        with self._image(name) as (image, size):
            return size + image.width * image.height * DECODING_BYTES

    def size(self, name: str) -> tuple[int, int]:
        """Returns the height and width of a photo as `decode` returns it. Of a JPEG it reads only the header.

        Raises:
            PhotoError: If the file cannot be read, or if `decode` would reject its header.
        """
        return self.layout(name)[0]

    def layout(self, name: str) -> tuple[tuple[int, int], bool]:
        """Returns the size of a photo as `size` does, and whether its EXIF orientation says to rotate or flip it.

        Raises:
            PhotoError: As `size`.
        """
        with self._image(name) as (image, _):
            if image.format != "JPEG":
                image.load()  # see `pixels_of`
            transpose = _UPRIGHT.get(_orientation(image))
            swapped = self.upright and transpose in _SWAPPING
            return image.size if swapped else image.size[::-1], transpose is not None

    def file(self, name: str) -> str | None:
        """Returns the path of a photo's file; None if the photo is part of a tar."""
        path, member = self._locate(name)
        return path if member is None else None

    @property
    def root(self) -> str:
        """The folder that names of photos start from."""
        return self._root or "."

    @contextlib.contextmanager
    def _image(self, name: str) -> Iterator[tuple[Image.Image, int]]:
        """Opens a photo whose pixels are not decoded yet, with the size of its file. All errors are PhotoErrors."""
        with self._opened(name) as (part, size):
            try:
                with _open_image(io.BufferedReader(part), name, self.max_pixels) as image:
                    yield image, size
            except PhotoError:
                raise
            except Exception as error:  # broad on purpose, as in `decode`
                part.seek(0)
                raise PhotoError(name, _explain(error, part.read(40))) from error

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple["_Part", int]]:
        """Opens the file of a photo, or its part of a tar. All errors within the context are PhotoErrors."""
        path, member = self._locate(name)
        try:
            status = os.stat(path)
            # Before opening: opening a FIFO waits for a writer, and opening a device may have side effects.
            if not stat.S_ISREG(status.st_mode):
                raise PhotoError(name, "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
            offset, size = (0, status.st_size) if member is None else _find_member(path, status, member, name)
            if size == 0:
                raise PhotoError(name, "empty file")
            with open(path, "rb") as file:
                yield _Part(file, offset, size), size
        except (FileNotFoundError, NotADirectoryError):
            raise PhotoError(name, "vanished") from None
        except OSError as error:
            raise PhotoError(name, f"cannot be read: {error.strerror or error}") from error
        except (ValueError, MemoryError) as error:  # ValueError: a name that no file can have (NUL, lone surrogates)
            raise PhotoError(name, f"cannot be read: {str(error) or 'out of memory'}") from error

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
            return Photo(name, _decode(data, name, self.max_pixels, self.upright))
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
        listed: set[bytes] = set()
        repeats, example = 0, ""
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines):
                line = line.removeprefix(codecs.BOM_UTF8 if number == 0 else b"").rstrip(b"\r\n")
                if not line.strip():
                    continue
                key = _same_path(os.path.join(os.fsencode(self._root), line))
                if key in listed:
                    repeats += 1
                    example = example or os.fsdecode(line)
                else:
                    listed.add(key)
                    yield from self._file_names(os.fsdecode(line), on_error)
        if repeats:
            lines_repeat = "1 line repeats an earlier one" if repeats == 1 else f"{repeats} lines repeat earlier ones"
            on_error(RepeatedPhotos(self.path, f"{lines_repeat}, such as {example!r}; each photo is used once"))

    def _file_names(self, name: str, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        """The names of a file in a folder or a list: its own, or those of the members of a shard."""
        lower = name.lower()
        if lower.endswith(_COMPRESSED):
            on_error(PhotoError(name, _UNPACK))
        elif problem := _unread(name):
            on_error(PhotoError(name, problem))
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
            index = _tar_indexes.get(path, status)
        except (OSError, ValueError) as error:
            on_error(PhotoError(name, f"tar cannot be read: {getattr(error, 'strerror', None) or error}"))
            return
        for member in index.members:
            if problem := _unread(member) or _archive_problem(member):
                on_error(PhotoError(f"{name}/{member}", problem))
            else:
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


def decode_ahead(
    source: PhotoSource, names: Iterable[str], load: Callable[[str], _Result]
) -> Iterator[tuple[str, _Result | PhotoError]]:
    """Loads photos in several threads ahead of the caller, within `DECODE_SHARE` of `photo_budget`.

    Args:
        source: The photos.
        names: Names of the photos.
        load: Loads a photo by its name: `source.decode`, or a function that calls it.

    Returns:
        An iterator over each name with the result of `load` or the PhotoError that it raised, in order. Other
        exceptions of `load` are raised.
    """

    def cost(name: str) -> tuple[str, int | PhotoError]:
        try:
            return name, source.decoding_cost(name)
        except PhotoError as error:
            return name, error

    def load_or_error(item: tuple[str, int | PhotoError]) -> tuple[str, _Result | PhotoError]:
        name, problem = item
        if isinstance(problem, PhotoError):
            return name, problem
        try:
            return name, load(name)
        except PhotoError as error:
            return name, error

    return map_ahead(
        load_or_error,
        map_ahead(cost, names, thread_count()),
        thread_count(),
        cost=lambda item: item[1] if isinstance(item[1], int) else 0,
        limit=int(photo_budget() * DECODE_SHARE),
    )


class _Part(io.RawIOBase):
    """A part of an open file, as a file for reading."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self.file, self.offset, self.size = file, offset, size
        self.file.seek(offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell() - self.offset

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.size}[whence]
        return self.file.seek(self.offset + start + to) - self.offset

    def readinto(self, buffer: Any) -> int:
        left = max(0, self.size - self.tell())
        return self.file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]


def _same_path(path: bytes) -> bytes:
    """A digest that is equal for different spellings of a path."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    path = os.path.realpath(path) if b".." in parts else b"/" + b"/".join(parts)
    return hashlib.blake2b(path, digest_size=16).digest()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def _list_folder(path: str) -> list[tuple[bytes, bool]]:
    """The folders, photos and archives in a folder as (name, is a folder), sorted by the bytes of their names."""
    entries = []
    with os.scandir(path) as scan:
        for entry in scan:
            if is_hidden(entry.name):
                continue
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if is_folder or entry.name.lower().endswith(_LISTED):
                entries.append((os.fsencode(entry.name), is_folder))
    if os.path.exists(os.path.join(path, SEGMENT_RECORD)):  # its masks and overlays are no photos
        entries = [entry for entry in entries if entry not in ((b"masks", True), (b"overlays", True))]
    return sorted(entries)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow may open here."""
    formats: tuple[str, ...] = _FORMATS
    if features.check("avif"):
        formats += ("AVIF",)
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
        formats += ("HEIF",)
    return formats


def _unread(name: str) -> str | None:
    """Why a file with this suffix cannot be read; None if it can."""
    lower = name.lower()
    if lower.endswith(UNREAD_SUFFIXES):
        return _CONVERT
    if lower.endswith((".heic", ".heif", ".hif")) and "HEIF" not in _formats():
        return _HEIC
    return _AVIF if lower.endswith(".avif") and "AVIF" not in _formats() else None


def _archive_problem(member: str) -> str | None:
    """Why a member of a tar is no photo, if it is an archive itself."""
    lower = member.lower()
    if lower.endswith(_COMPRESSED):
        return _UNPACK
    return _NESTED if lower.endswith(".tar") else None


class _TarIndex(NamedTuple):
    members: dict[str, tuple[int, int] | None]  # name -> (offset, size); None: not a plain file, never followed
    problem: str | None  # what is wrong with the tar itself


class _TarIndexes:
    """A cache of the indexes of tars, least recently used ones first, for up to `limit` members in all.

    It belongs to the module, so that sources stay cheap to pickle. Two threads may scan the same tar; it is harmless.
    """

    def __init__(self, limit: int):
        self.limit, self.members = limit, 0
        self.indexes: OrderedDict[tuple[str, int, int], _TarIndex] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, path: str, status: os.stat_result) -> _TarIndex:
        """The index of a tar. Its size and time are part of the key: a tar may be rewritten."""
        key = path, status.st_size, status.st_mtime_ns
        with self.lock:
            if key in self.indexes:
                self.indexes.move_to_end(key)
                return self.indexes[key]
        index = _index_tar(path, status.st_size)
        with self.lock:
            if key not in self.indexes:
                self.indexes[key] = index
                self.members += len(index.members) + 1
            while self.members > self.limit and len(self.indexes) > 1:
                self.members -= len(self.indexes.popitem(last=False)[1].members) + 1
        return index


_tar_indexes = _TarIndexes(1 << 19)  # about 250 bytes per member


def _index_tar(path: str, size: int) -> _TarIndex:
    """Positions of the photos in a tar."""
    members: dict[str, tuple[int, int] | None] = {}
    problem = None
    with open(path, "rb") as file:
        try:
            start = _index_members(file, 0, members)
            while start < size:
                start = _index_members(file, start, members)
        except Exception as error:
            # Broad on purpose: for damaged or malicious bytes tarfile raises far more than its own errors
            # (OverflowError, RecursionError, ...). The members before the damage are kept.
            problem = f"damaged tar, only the photos before the damage are listed: {error}"
    return _TarIndex(members, problem)


def _index_members(file: BinaryIO, start: int, members: dict[str, tuple[int, int] | None]) -> int:
    """Adds the photos of the tar that begins at `start`; returns where the next of several concatenated tars begins."""
    file.seek(start)
    # Names must not depend on the user's locale.
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        reached = start
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= reached:
                raise tarfile.ReadError("header points backwards")
            reached = tar.offset
            cast(Any, tar).members.clear()  # tarfile keeps every header that it has read
            hidden = any(is_hidden(part) for part in member.name.split("/"))
            if member.isdir() or hidden or not member.name.lower().endswith(_LISTED):
                continue
            if member.isreg() and not member.issparse():
                members[member.name] = member.offset_data, member.size
            else:
                members[member.name] = members.get(member.linkname) if member.islnk() else None
        # tarfile stops silently at a damaged header: the end is real only if it is marked.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset}")
    while block := file.read(tarfile.BLOCKSIZE):
        if any(block):
            return file.tell() - len(block)
    return file.tell()


def _find_member(path: str, status: os.stat_result, member: str, name: str) -> tuple[int, int]:
    members = _tar_indexes.get(path, status).members
    if member not in members:
        raise PhotoError(name, "vanished: no such photo in the tar")
    place = members[member]
    if place is None:
        raise PhotoError(name, "a link or special file in a tar; these are never followed")
    return place


def _open_image(file: Any, name: str, max_pixels: int) -> Image.Image:
    """Reads the header of an image. Raises PhotoError if it has too many pixels."""
    image = Image.open(file, formats=_formats())
    width, height = image.size
    if width * height > max_pixels:
        megapixels, limit = width * height / 1e6, max_pixels / 1e6
        raise PhotoError(name, f"{megapixels:.4g} megapixels, more than the limit of {limit:.4g}")
    return image


def _decode(data: bytes, name: str, max_pixels: int, upright: bool) -> np.ndarray:
    with _open_image(io.BytesIO(data), name, max_pixels) as image:
        return pixels_of(image, upright)


def pixels_of(image: Image.Image | np.ndarray, upright: bool = True) -> np.ndarray:
    """Converts an image of any kind by the rules of `PhotoSource.decode`: the pixels of a file, of Pillow's image of it
    and of the array of that are the same, except that an array has no EXIF orientation and no palette.

    Args:
        image: Image of any mode of Pillow; or array [H, W], bool, uint8, uint16, int32 or float32, or [H, W, C], uint8,
            with C = 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA).
        upright: Apply the EXIF orientation.

    Returns:
        uint8 RGB [H, W, 3], C-contiguous; the array itself if it is that already.

    Raises:
        ValueError: If an array has another shape or dtype, or no pixels.
        OSError: If the file of a lazy image is damaged. Pillow may raise other exceptions, too.
    """
    if isinstance(image, np.ndarray):
        kind = (image.dtype.name, image.shape[2] if image.ndim == 3 else 1)
        if not image.size or image.ndim not in (2, 3) or kind not in _ARRAYS:
            shapes = "[H, W] or [H, W, 1 to 4], uint8, or [H, W], bool, uint16, int32 or float32"
            raise ValueError(f"expected an image {shapes}, got {image.dtype} {list(image.shape)}")
        if kind == ("uint8", 3):
            return np.ascontiguousarray(image)
        image = image.reshape(image.shape[:2]) if kind[1] == 1 else image
        image = Image.fromarray(np.ascontiguousarray(image))
    image.load()
    # After load: the EXIF of a PNG may follow the pixels, and Pillow itself rotates TIFFs while loading.
    transpose = _UPRIGHT.get(_orientation(image)) if upright else None
    rgb = _to_rgb(image if transpose is None else image.transpose(transpose))
    width, height = rgb.size
    # The buffer of a BytesIO is writable, and CPython does not copy the bytes because there is no other reference.
    pixels = np.frombuffer(io.BytesIO(rgb.tobytes()).getbuffer(), np.uint8)
    return pixels.reshape(height, width, 3)


def as_stored(path: str | os.PathLike[str], pixels: np.ndarray) -> np.ndarray:
    """Turns an array of an upright photo, such as its mask, to the orientation in which its file stores the pixels.

    Args:
        path: The photo. Only its header is read.
        pixels: Array [H, W].

    Returns:
        A view of the array, [H, W] or [W, H].

    Raises:
        PhotoError: If the file is not an image.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            orientation = _orientation(image)
    except Exception as error:  # broad on purpose, as in `decode`
        raise PhotoError(os.fsdecode(path), _explain(error, b"")) from error
    return _STORED[orientation](pixels) if orientation in _STORED else pixels


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
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grayscale [h, w] of uint16, int32 or float32 -> uint8, by the rules of `PhotoSource.decode`."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    result = np.empty(values.shape, np.uint8)
    for first in range(0, len(values), 256):  # temporary float64 arrays of a few rows only
        rows = values[first : first + 256]
        if values.dtype.kind == "f" and low >= 0 and high <= 1:
            rows = np.rint(rows.astype(np.float64) * 255)
        elif values.dtype.kind != "f" and low >= 0 and high <= 0xFFFF:
            rows = rows >> 8
        else:
            rows = np.rint((rows.astype(np.float64) - low) * (255 / (high - low or 1)))
        result[first : first + 256] = rows.astype(np.uint8)
    return result


def _explain(error: Exception, data: bytes) -> str:
    """The reason of a failure of Pillow, as a message for the user."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too many megapixels: {error}"
    if not isinstance(error, Image.UnidentifiedImageError):
        text = str(error) or type(error).__name__
        return f"truncated: {text}" if "truncated" in text.lower() else f"cannot be decoded: {text}"
    head = data[:40]
    if head[4:8] == b"ftyp" and (suffix := _BRANDS.get(head[8:11])) and (problem := _unread(suffix)):
        return problem
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"not an image: text begins with {head.decode('ascii')!r}"
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return f"cannot be decoded: the header of this {kind} file is damaged"
    return f"not an image in a supported format: begins with bytes {head[:16].hex(' ')}"
