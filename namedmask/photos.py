# SPDX-License-Identifier: MIT
# Names are kept byte by byte: pathlib would normalize them ("./a", "a//b"), and it is slow for millions of names.
# ruff: noqa: PTH110, PTH112, PTH113, PTH116, PTH118, PTH119, PTH120, PTH123
"""Sources of photos.

A `PhotoSource` is a folder, a list file or one or many tars, here or at a URL. It streams the names of its photos in a
fixed order and decodes a photo by its name. Photos are untrusted: any problem with one raises `PhotoError`, and no
content of a tar can make the source read another file.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from . import remote, tars
from .decoding import (
    MAX_PIXELS,
    PhotoError,
    decode_bytes,
    explain,
    open_image,
    rotation,
    why_unread,
)
from .errors import UserError
from .files import list_folder, walk
from .masks import ErrorRecord
from .memory import CACHE_SHARE, DECODE_SHARE, photo_budget
from .record import FILE as RUN_RECORD
from .remote import RemoteError
from .suffixes import COMPRESSED, LISTED
from .threads import map_ahead, thread_count
from .urls import clean_url, is_url, path_part, url_problem

SEGMENT_RECORD = "segment.json"  # in the output folders of `namedmask segment`
CONVERT_RECORD = ".convert.json"  # in those of `namedmask convert`: the files that it has written
MAX_BYTES = 1 << 30
SCANS_AHEAD = 8  # tars at URLs, whose headers are read at the same time
DECODING_BYTES = 16  # per pixel at the peak of decoding; measured: 10 (JPEG) to 18 (WebP)

_Result = TypeVar("_Result")

_NO_URL = "not a URL: in a list at a URL, each line must be one"
_NESTED = "a tar inside a tar is not read: unpack the outer one"
_UNPACK = "compressed archives cannot be read in place: unpack it into a folder or a plain .tar"


class Photo(NamedTuple):
    """A decoded photo: its name in the source, and uint8 RGB pixels `[height, width, 3]`, C-contiguous and writable."""

    name: str
    pixels: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


class RepeatedPhotos(PhotoError):
    """A note that a list names photos more than once. They are used once, so nothing is lost."""


class PhotoSource:
    """The photos of a folder (with its subfolders), of a list file (`.txt`), of a `.tar`, or of the tars of a pattern
    such as `{000..146}.tar`. Lists and tars may be at URLs, which fsspec opens.

    Names are `str`; bytes that are not UTF-8 are kept by surrogateescape, so `os.fsencode(name)` restores them.

    - Folder: the name of a photo is its path below the folder, with `/`. Photos are the files whose suffix is in
      `PHOTO_SUFFIXES`, in upper or lower case. Entries with a leading dot, `__MACOSX`, the masks and overlays that
      `namedmask segment` has written, and subfolders that `namedmask convert` has written are skipped. Links to folders
      are followed, except back into a folder that is being listed.
    - List: one path per line, absolute or relative to the folder of the list. The name is the line as it is, with any
      suffix. Blank lines are skipped. A path that is listed again is yielded once; its lines are counted in an error.
    - Tar (webdataset layout), as the source itself or inside a folder or a list: members are named
      `path/to/shard.tar/member.jpg` and selected like the files of a folder. Nothing is extracted: a member is a range
      of bytes in the shard. If several members have the same name, the last one counts, as in tar. Hard links to
      earlier photos of the tar are resolved; symbolic links and sparse members are errors. Concatenated tars are read
      to the end.
    - Pattern: the tars of a brace pattern, whose names are relative to the folder before the first brace. A tar that is
      missing is an error; at least one must exist here.
    - URL: a tar, a pattern or a list. Names are the same as of the files in a folder. A line of a list may be the URL
      of a photo or a tar, in a list at a URL it must be; its name is that URL without what a signature adds to it (see
      `urls.clean_url`).

    Photos in formats that cannot be read (`UNREAD_SUFFIXES`, and HEIC or AVIF without a decoder) are errors.

    The order is fixed: the entries of a folder, files and subfolders together, sorted by the bytes of their names; the
    lines of a list and the members of a tar in their own order. Only one folder (with its parents) or one tar is held
    in memory, and about 100 bytes per line of a list.

    A source is cheap to pickle, survives a fork and may be used from several threads.

    Args:
        path: The folder, list file, tar, pattern or URL.
        max_pixels: Photos with more pixels are rejected before they are decoded. Pillow's own limit of 179 million
            pixels always applies.
        upright: Apply the EXIF orientation of photos. Benchmarks label the pixels as they are stored.

    Raises:
        ValueError: If `path` is none of these, or a URL with a password or a signature, which would be recorded.
    """

    def __init__(self, path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, upright: bool = True):
        self.path = os.fsdecode(path)
        self.max_pixels = max_pixels
        self.upright = upright
        lower = self.path.lower()
        self._kind = lower[-3:]
        self._root = os.path.dirname(self.path.partition("{")[0] if self._is_pattern() else self.path)
        if is_url(self.path):
            _expect_usable(self.path)
        elif os.path.isdir(self.path):
            self._kind, self._root = "folder", self.path
        elif self._is_pattern():
            if not any(os.path.exists(path) for path in tars.expand_braces(self.path)):
                raise ValueError(f"photos: {self.path!r}: none of these tars exists")
        elif not os.path.exists(self.path):
            raise ValueError(f"photos: {self.path!r} does not exist")
        elif lower.endswith(COMPRESSED):
            raise ValueError(f"photos: {self.path!r}: {_UNPACK}")
        elif not lower.endswith((".txt", ".tar")):
            raise ValueError(f"photos: {self.path!r} is not a folder, a .txt list or a .tar")

    def _is_pattern(self) -> bool:
        """Whether the path stands for several tars."""
        is_tar = self.path.lower().endswith(".tar") and tars.is_pattern(self.path)
        return is_tar and (is_url(self.path) or not os.path.exists(self.path))

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory that this source may keep of files at URLs."""
        return int(photo_budget() * CACHE_SHARE) if is_url(self.path) or self._kind == "txt" else 0

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
            return self._shard_names(on_error)
        return self._list_names(on_error)

    def categories(self, on_error: Callable[[PhotoError], None]) -> dict[str, list[str]]:
        """Reads class folders: each first-level folder is a category.

        Args:
            on_error: Called for each folder or shard that cannot be listed, and for each first-level folder without a
                photo, which is no category, unless it is an output folder.

        Returns:
            For each category, in order, the names of its photos.

        Raises:
            UserError: If the source is not a folder, or if it has photos or shards outside class folders.
        """
        if self._kind != "folder":
            raise UserError(
                f"photos: {self.path!r} is not a folder with class folders: pass --categories or --categories-file"
            )
        groups: dict[str, list[str]] = {}
        loose: list[str] = []
        unlisted: set[str] = set()

        def note(error: PhotoError) -> None:
            unlisted.add(error.photo)
            on_error(error)

        for name in self.names(note):
            category, slash, _ = name.partition("/")
            if slash and (category in groups or os.path.isdir(os.path.join(self._root, category))):
                groups.setdefault(category, []).append(name)
                continue
            loose.append(name)
            if len(loose) == 3:
                break
        if loose:
            raise UserError(
                f"photos: {self.path!r} holds photos outside class folders ({', '.join(map(repr, loose))}): "
                "move each into a folder with the name of its category, or pass --categories or --categories-file"
            )
        if self.path not in unlisted:
            for entry, is_folder in _list_folder(self._root):
                name = os.fsdecode(entry)
                records = (os.path.join(self._root, name, record) for record in (RUN_RECORD, SEGMENT_RECORD))
                if is_folder and name not in groups and name not in unlisted and not any(map(os.path.exists, records)):
                    on_error(PhotoError(name, "no category: the folder holds no photo that can be read"))
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
        with self.image(name) as (image, size):
            return size + image.width * image.height * DECODING_BYTES

    def size(self, name: str) -> tuple[int, int]:
        """Returns the height and width of a photo as `decode` returns it. Of a JPEG it reads only the header.

        Raises:
            PhotoError: If the file cannot be read, or if `decode` would reject its header.
        """
        return self.layout(name)[0]

    def layout(self, name: str) -> tuple[tuple[int, int], bool, str]:
        """Returns the size of a photo as `size` does, whether its EXIF orientation says to rotate or flip it, and its
        format as Pillow names it.

        Raises:
            PhotoError: As `size`.
        """
        with self.image(name) as (image, _):
            turned, swapped = rotation(image)
            if image.format != "JPEG":
                image.load()  # see `pixels_of`
                after, swapped = rotation(image)
                turned = turned or after
            size = image.size if self.upright and swapped else image.size[::-1]
            return size, turned, image.format or ""

    def file(self, name: str) -> str | None:
        """Returns the path of a photo's file; None if the photo is part of a tar or at a URL."""
        path, member = self._locate(name)
        return None if member is not None or is_url(path) else path

    @property
    def root(self) -> str:
        """The folder that names of photos start from."""
        return self._root or "."

    @contextlib.contextmanager
    def image(self, name: str) -> Iterator[tuple[Image.Image, int]]:
        """Opens a photo whose pixels are not decoded yet, with the size of its file. All errors are PhotoErrors."""
        with self._opened(name) as (part, size):
            try:
                with open_image(io.BufferedReader(part), name, self.max_pixels) as image:
                    yield image, size
            except (PhotoError, RemoteError, UserError):
                raise
            except Exception as error:  # broad on purpose, as in `decode`
                part.seek(0)
                raise PhotoError(name, explain(error, part.read(40))) from error

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[io.RawIOBase, int]]:
        """Opens the file of a photo, or its part of a tar. All errors within the context are PhotoErrors."""
        path, member = self._locate(name)
        try:
            if is_url(path):
                yield _remote_part(path, member, name)
                return
            status = os.stat(path)
            # Before opening: opening a FIFO waits for a writer, and opening a device may have side effects.
            if not stat.S_ISREG(status.st_mode):
                raise PhotoError(name, "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
            offset, size = 0, status.st_size
            if member is not None:
                offset, size = _place(tars.indexes.local(path, status), member, name)
            if size == 0:
                raise PhotoError(name, "empty file")
            with open(path, "rb") as file:
                yield _Part(file, offset, size), size
        except (FileNotFoundError, NotADirectoryError):
            raise PhotoError(name, "no such file") from None
        except OSError as error:
            raise PhotoError(name, f"cannot be read: {error.strerror or error}") from error
        except (ValueError, MemoryError) as error:  # ValueError: a name that no file can have (NUL, lone surrogates)
            raise PhotoError(name, f"cannot be read: {str(error) or 'out of memory'}") from error

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a member of a tar, of this name. It may not be a readable photo. Raises UserError
        if its server cannot be reached."""
        try:
            path, member = self._locate(name)
            if member is not None:
                _place(_index_of(path), member, name)
            return remote.exists(path) if is_url(path) else os.path.isfile(path)
        except RemoteError as error:
            _expect_permanent(error)
            return False
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
            return Photo(name, decode_bytes(data, name, self.max_pixels, self.upright))
        except PhotoError:
            raise
        except Exception as error:
            # Broad on purpose: for damaged or malicious bytes Pillow raises OSError, SyntaxError, ValueError,
            # struct.error, zlib.error, EOFError, IndexError, KeyError, MemoryError, DecompressionBombError and more.
            raise PhotoError(name, explain(error, data)) from error

    def _folder_names(self, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        def unlisted(name: str, error: OSError) -> None:
            on_error(PhotoError(name or self.path, f"folder cannot be listed: {error.strerror or error}"))

        for name in walk(self._root, _list_folder, unlisted):
            yield from self._file_names(name, on_error)

    def _list_names(self, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        listed: set[bytes] = set()
        repeats, example, shortened = 0, "", False
        for line in _lines(self.path):
            name = line
            if is_url(line):
                name = clean_url(line)
                if problem := url_problem(line, remote_list=is_url(self.path)):
                    on_error(PhotoError(name, problem))
                    continue
            elif is_url(self.path):
                on_error(PhotoError(name, _NO_URL))
                continue
            file = os.fsencode(name if is_url(name) else os.path.join(self._root, name))
            key = _digest(file) if is_url(name) else _same_path(file)
            if key in listed:
                repeats += 1
                example = example or name
                shortened |= name != line
            else:
                listed.add(key)
                yield from self._file_names(name, on_error)
        if repeats:
            lines_repeat = "1 line repeats an earlier one" if repeats == 1 else f"{repeats} lines repeat earlier ones"
            if shortened:
                lines_repeat += " (names leave out parameters of URLs that may be secret)"
            path = path_part(clean_url(self.path)) if is_url(self.path) else self.path
            own = os.path.basename(path)  # without its folder: a list may move together with its photos
            on_error(RepeatedPhotos(own, f"{lines_repeat}, such as {example!r}; each photo is used once"))

    def _file_names(self, name: str, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        """The names of a file in a folder or a list: its own, or those of the members of a shard."""
        lower = path_part(name).lower()
        if lower.endswith(COMPRESSED):
            on_error(PhotoError(name, _UNPACK))
        elif problem := why_unread(lower):
            on_error(PhotoError(name, problem))
        elif lower.endswith(".tar"):
            yield from self._tar_names(name, on_error)
        else:
            yield name

    def _shard_names(self, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        """The names of the photos in the tars of the source."""
        paths = list(tars.expand_braces(self.path)) if self._is_pattern() else [self.path]
        shards = [path[len(self._root) :].lstrip("/") for path in paths]
        if not is_url(self.path):
            for shard in shards:
                yield from self._tar_names(shard, on_error)
            return

        def scan(shard: str) -> tuple[list[str], list[PhotoError]]:
            errors: list[PhotoError] = []
            return list(self._tar_names(shard, errors.append)), errors

        for names, errors in map_ahead(scan, shards, SCANS_AHEAD):
            yield from names
            for error in errors:
                on_error(error)

    def _tar_names(self, name: str, on_error: Callable[[PhotoError], None]) -> Iterator[str]:
        try:
            index = _index_of(self._full(name))
        except RemoteError as error:
            _expect_permanent(error)  # the list of photos is made once: it must not lack those of this tar
            on_error(PhotoError(name, f"tar cannot be read: {error.strerror}"))
            return
        except (OSError, ValueError) as error:
            on_error(PhotoError(name, f"tar cannot be read: {getattr(error, 'strerror', None) or error}"))
            return
        for member in index.members:
            if problem := why_unread(member) or _archive_problem(member):
                on_error(PhotoError(f"{name}/{member}", problem))
            else:
                yield f"{name}/{member}"
        if index.problem:
            on_error(PhotoError(name, index.problem))

    def _full(self, name: str) -> str:
        """The path or URL of a file by its name."""
        if self._kind == "txt" and is_url(name):
            return _signed_urls(self.path).get(name, name)
        return os.path.join(self._root, name)

    def _locate(self, name: str) -> tuple[str, str | None]:
        """The file that holds a photo, and the member of the tar that the photo is (None: the file itself)."""
        at_url = is_url(self.path) or (self._kind == "txt" and is_url(name))
        parts = name.split("/")
        shard = len(parts)
        for end, part in enumerate(parts, 1):
            if part.lower().endswith(".tar"):
                shard = min(shard, end)
                path = os.path.join(self._root, "/".join(parts[:end]))
                if not at_url and os.path.isfile(path):
                    return path, "/".join(parts[end:])
        # A path in a list is trusted up to a shard. All other parts are untrusted and must not leave the source.
        untrusted = parts[shard:] if self._kind == "txt" else parts
        if ".." in untrusted or (self._kind != "txt" and (name.startswith("/") or is_url(name))):
            raise PhotoError(name, "not a path inside the photo source")
        if not at_url:
            return os.path.join(self._root, name), None
        member = "/".join(parts[shard:]) if parts[shard - 1].lower().endswith(".tar") else None
        if self._kind == "tar" and not member:
            raise PhotoError(name, "not a path inside the photo source")
        if self._kind == "txt" and not is_url(name):
            raise PhotoError(name, _NO_URL)
        if self._kind == "txt" and (problem := url_problem(name, remote_list=is_url(self.path))):
            raise PhotoError(name, problem)
        return self._full("/".join(parts[:shard])), member


def note_unlisted(errors: list[ErrorRecord]) -> Callable[[PhotoError], None]:
    """Returns a function that notes in `errors` what cannot be listed, for `PhotoSource.names`."""
    return lambda error: errors.append(ErrorRecord(error.photo, "list", error.reason))


def open_source(photos: str | os.PathLike[str]) -> PhotoSource:
    """The photos of a folder, list, tar, pattern or URL. Raises UserError where `PhotoSource` raises ValueError."""
    try:
        return PhotoSource(photos)
    except ValueError as error:
        raise UserError(str(error)) from None


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
        limit=int(photo_budget() * DECODE_SHARE) - source.cache_bytes,
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
    return _digest(path)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def _expect_usable(url: str) -> None:
    """Raises ValueError if a source at a URL cannot be opened or must not be recorded. It requests nothing."""
    shown, lower = path_part(clean_url(url)), url.lower()
    problem = url_problem(url)
    if not problem and lower.endswith(COMPRESSED):
        problem = _UNPACK
    elif not problem and "?" in url:
        problem = (
            "the URL has a query, which may hold a signature, and the run folder records the URL: write it into a .txt "
            "list and pass the list (signatures in lists are not recorded)"
        )
    elif not problem and not lower.endswith((".txt", ".tar")):
        problem = "the URL is not that of a .tar, of tars such as {000..146}.tar or of a .txt list"
    if problem:
        raise ValueError(f"photos: {shown!r}: {problem}")
    try:
        remote.filesystem(url)
    except RemoteError as error:
        raise ValueError(f"photos: {error.strerror}") from None
    for _ in tars.expand_braces(url):  # an error if it cannot be expanded
        break


def _expect_permanent(error: RemoteError) -> None:
    """Raises UserError if the cause of an error may be gone soon."""
    if error.transient:
        raise UserError(f"{error.strerror}; run the same command again") from None


def _lines(path: str) -> Iterator[str]:
    """The lines of a list that are not blank. Raises UserError if it is at a URL and cannot be read."""
    try:
        file = io.BytesIO(remote.read(path, MAX_BYTES)) if is_url(path) else open(path, "rb")  # noqa: SIM115
    except RemoteError as error:
        _expect_permanent(error)
        raise UserError(f"photos: {error.strerror}") from None
    with file:
        for number, line in enumerate(file):
            line = line.removeprefix(codecs.BOM_UTF8 if number == 0 else b"").rstrip(b"\r\n")
            if line.strip():
                yield os.fsdecode(line)


def _signed_urls(path: str) -> dict[str, str]:
    """The URLs in a list by their names, as far as these differ. They are read from the list as it is now."""
    try:
        return _read_signed_urls(path, 0 if is_url(path) else os.stat(path).st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=4)
def _read_signed_urls(path: str, changed: int) -> dict[str, str]:
    return {name: line for line in _lines(path) if is_url(line) and (name := clean_url(line)) != line}


def _index_of(path: str) -> tars.TarIndex:
    """The index of a tar. Raises OSError if it cannot be read."""
    if is_url(path):
        return tars.indexes.remote(remote.open_file(path))
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return tars.indexes.local(path, status)


def _place(index: tars.TarIndex, member: str, name: str) -> tuple[int, int]:
    """Where a photo lies in its tar: offset and size."""
    if member not in index.members:
        raise PhotoError(name, "no such photo in the tar")
    place = index.members[member]
    if place is None:
        raise PhotoError(name, "a link or special file in a tar; these are never followed")
    return place


def _remote_part(url: str, member: str | None, name: str) -> tuple[io.RawIOBase, int]:
    """A photo at a URL, or in a tar at a URL, as a file for reading, and its size."""
    if member is None:
        data = remote.read(url, MAX_BYTES)
        part: io.RawIOBase = _Part(io.BytesIO(data), 0, len(data))
        size = len(data)
    else:
        file = remote.open_file(url)
        offset, size = _place(tars.indexes.remote(file), member, name)
        part = file.part(offset, size)
    if size == 0:
        raise PhotoError(name, "empty file")
    return part, size


def _list_folder(path: str) -> list[tuple[bytes, bool]]:
    """The folders, photos and archives in a folder, as `files.list_folder` returns them."""
    entries = list_folder(path, LISTED)
    if os.path.exists(os.path.join(path, SEGMENT_RECORD)):  # its masks and overlays are no photos
        entries = [entry for entry in entries if entry not in ((b"masks", True), (b"overlays", True))]

    def is_data_set(folder: bytes) -> bool:
        return os.path.exists(os.path.join(path, os.fsdecode(folder), CONVERT_RECORD))

    return [(name, is_folder) for name, is_folder in entries if not (is_folder and is_data_set(name))]


def _archive_problem(member: str) -> str | None:
    """Why a member of a tar is no photo, if it is an archive itself."""
    lower = member.lower()
    if lower.endswith(COMPRESSED):
        return _UNPACK
    return _NESTED if lower.endswith(".tar") else None
