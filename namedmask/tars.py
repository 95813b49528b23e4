# SPDX-License-Identifier: MIT
"""Tars of photos, without extracting them: where the members lie, and the names of the tars of a pattern.

The index of a tar at a URL is also kept on disk, in `$XDG_CACHE_HOME/namedmask/tars` (default `~/.cache`), one file of
about 20 bytes per photo for each tar. It serves while size, ETag and time of the tar are the same, and may be deleted.
Where the server gives neither ETag nor time, it is not kept: another tar may have the same size. Above `STORED_BYTES`,
the files that were used longest ago are removed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from .files import atomic_write
from .remote import RemoteError, RemoteFile
from .suffixes import LISTED, is_hidden
from .urls import clean_url

MAX_SHARDS = 1_000_000  # of a pattern
FAR = 1 << 18  # bytes between two headers of a remote tar, above which the second is requested alone
HEADER_BYTES = 4096  # that are requested for a header; long names have three
STORED_BYTES = 512 << 20  # of indexes on disk
TIDY_EVERY = 256  # indexes that a process stores; listing all files each time would take long

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class TarIndex(NamedTuple):
    """The photos of a tar.

    members: by name (offset, size); None: not a plain file, never followed
    problem: what is wrong with the tar itself
    """

    members: dict[str, tuple[int, int] | None]
    problem: str | None


class TarIndexes:
    """A cache of the indexes of tars, least recently used ones first, for up to `limit` members in all.

    It belongs to the module, so that sources stay cheap to pickle. Two threads may scan the same tar; it is harmless.
    """

    def __init__(self, limit: int):
        self.limit, self.members = limit, 0
        self.indexes: OrderedDict[tuple, TarIndex] = OrderedDict()
        self.lock = threading.Lock()

    def local(self, path: str, status: os.stat_result) -> TarIndex:
        """The index of a tar. Its size and time are part of the key: a tar may be rewritten."""

        def make() -> TarIndex:
            with Path(path).open("rb") as file:
                return _scan(file, status.st_size)

        return self._get((path, status.st_size, status.st_mtime_ns), make)

    def remote(self, file: RemoteFile) -> TarIndex:
        """The index of a tar at a URL. Raises RemoteError if it cannot be read."""
        return self._get((file.url, file.stamp), lambda: _stored(file))

    def _get(self, key: tuple, make: Callable[[], TarIndex]) -> TarIndex:
        with self.lock:
            if key in self.indexes:
                self.indexes.move_to_end(key)
                return self.indexes[key]
        index = make()
        with self.lock:
            if key not in self.indexes:
                self.indexes[key] = index
                self.members += len(index.members) + 1
            while self.members > self.limit and len(self.indexes) > 1:
                self.members -= len(self.indexes.popitem(last=False)[1].members) + 1
        return index


indexes = TarIndexes(1 << 19)  # about 250 bytes per member


def _scan(file: BinaryIO, size: int) -> TarIndex:
    """Positions of the photos in a tar."""
    members: dict[str, tuple[int, int] | None] = {}
    problem = None
    try:
        start = _index_members(file, 0, members)
        while start < size:
            start = _index_members(file, start, members)
    except RemoteError:
        raise
    except Exception as error:
        # Broad on purpose: for damaged or malicious bytes tarfile raises far more than its own errors
        # (OverflowError, RecursionError, ...). The members before the damage are kept.
        problem = f"damaged tar, only the photos before the damage are listed: {error}"
    return TarIndex(members, problem)


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
            if member.isdir() or hidden or not member.name.lower().endswith(LISTED):
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


def _stored(file: RemoteFile) -> TarIndex:
    """The index of a tar at a URL, from disk if it is there."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "namedmask" / "tars"
    except RuntimeError:  # there is no home folder
        cache = None
    if cache is None or file.stamp.split() == [str(file.size)]:
        return _scan(cast(BinaryIO, _Headers(file)), file.size)
    url = clean_url(file.url)
    name = hashlib.blake2b(repr((url, LISTED)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    path = cache / f"{name}.json.gz"
    with contextlib.suppress(Exception):  # absent, damaged, or of another tar: scan it again
        data = json.loads(gzip.decompress(path.read_bytes()))
        if data["stamp"] == file.stamp:
            os.utime(path)
            members = {name: place and (int(place[0]), int(place[1])) for name, place in data["members"].items()}
            return TarIndex(members, data["problem"])
    index = _scan(cast(BinaryIO, _Headers(file)), file.size)
    with contextlib.suppress(OSError):  # the cache is a convenience
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as out:
            out.write(gzip.compress(json.dumps({"url": url, "stamp": file.stamp, **index._asdict()}).encode()))
        if next(_stores) % TIDY_EVERY == 0:
            _tidy(cache)
    return index


_stores = itertools.count()


def _tidy(cache: Path) -> None:
    """Removes the files in a folder that were used longest ago, until `STORED_BYTES` are left."""
    used = 0
    files = [(path.stat(), path) for path in cache.iterdir()]
    for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns, reverse=True):
        used += status.st_size
        if used > STORED_BYTES:
            path.unlink(missing_ok=True)


class _Headers:
    """A tar at a URL, as a file from which tarfile reads headers.

    Where headers lie close together, the tar is read block by block; above `FAR`, each header is requested alone.
    """

    def __init__(self, file: RemoteFile):
        self.file, self.at = file, 0
        self.start, self.data = 0, b""  # what has been read last

    def tell(self) -> int:
        return self.at

    def seek(self, to: int) -> int:
        self.at = to
        return to

    def read(self, size: int) -> bytes:
        end = min(self.at + size, self.file.size)
        if self.at >= end:
            return b""
        if not self.start <= self.at <= end <= self.start + len(self.data):
            if self.file.ranges and not 0 <= self.at - self.start - len(self.data) <= FAR:
                far = min(max(end, self.at + HEADER_BYTES), self.file.size)
                self.start, self.data = self.at, self.file.fetch(self.at, far)
            else:
                blocks = list(self.file.blocks(self.at, end))
                self.start, self.data = blocks[0][0], b"".join(data for _, data in blocks)
        part = self.data[self.at - self.start : end - self.start]
        self.at = end
        return part


def expand_braces(pattern: str) -> Iterator[str]:
    """Yields the paths of a pattern such as "{000..146}.tar" or "{train,val}-{0..9}.tar", in its order.

    Raises:
        ValueError: If a range is reversed or if there are more than `MAX_SHARDS` paths.
    """
    parts = _BRACES.split(pattern)  # odd ones stand in braces
    choices: list[list[str]] = []
    for text in parts[1::2]:
        if bounds := _RANGE.fullmatch(text):
            first, last = int(bounds[1]), int(bounds[2])
            if first > last:
                raise ValueError(f"{{{text}}}: the range is reversed")
            if last - first >= MAX_SHARDS:
                raise ValueError(f"{{{text}}}: more than {MAX_SHARDS:,} paths")
            width = max(map(len, bounds.groups())) if any(len(b) > 1 and b[0] == "0" for b in bounds.groups()) else 0
            choices.append([str(number).zfill(width) for number in range(first, last + 1)])
        else:
            choices.append(text.split(",") if "," in text else [f"{{{text}}}"])
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise ValueError(f"{pattern!r}: more than {MAX_SHARDS:,} paths")
    for chosen in itertools.product(*choices):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::2], chosen, fillvalue="")))


def is_pattern(path: str) -> bool:
    """Whether a path has braces that stand for several paths."""
    return any(_RANGE.fullmatch(text) or "," in text for text in _BRACES.findall(path))
