# SPDX-License-Identifier: MIT
"""Files at URLs, read by ranges of bytes through fsspec, with a bounded cache.

fsspec opens the URLs, so endpoints and credentials are part of its configuration (environment variables,
`~/.config/fsspec`, the files of the cloud's own tools). No function returns or raises a text with a signature, a token
or a password of a URL.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .errors import UserError, first_line
from .urls import clean_url, protocol_of, without_secrets

BLOCK = 4 << 20  # bytes per request of sequential reading
CACHE_BYTES = 256 << 20  # per process, see `cache_limit`
OPEN_FILES = 64  # whose sizes and connections are kept
NEAR = 1 << 20  # reading is sequential if it continues within so many bytes after an earlier read
RETRY_SECONDS = 60.0  # until the last attempt of a request begins
GIVE_UP = 8  # requests in a row that have failed for so long
STALLED_SECONDS = 30  # without any byte, after which a request is repeated
REQUEST_SECONDS = 600

_PACKAGES = {
    **dict.fromkeys(("http", "https"), "'namedmask[remote]'"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **{"hf": "huggingface_hub", "oss": "ossfs", "oci": "ocifs", "sftp": "paramiko", "webhdfs": "requests"},
}
_Result = TypeVar("_Result")


class RemoteError(OSError):
    """A file at a URL that cannot be read. `strerror` names the URL and the reason, without secrets.

    Attributes:
        transient: Whether the same request may succeed later.
    """

    def __init__(self, url: str, reason: str, transient: bool = False):
        super().__init__(errno.EIO, f"{clean_url(url)}: {reason}")
        self.transient = transient


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL as it takes it.

    Raises:
        RemoteError: If a package is missing, naming it, or if the protocol is unknown.
    """
    protocol = protocol_of(url)
    try:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        how = f"pip install {package}" if package else first_line(error)
        raise RemoteError(url, f"a package for {protocol}:// is missing: {how}") from None
    except Exception as error:  # file systems check their configuration in their own ways
        raise _failure(url, error) from None
    if fs.async_impl:  # fsspec creates one per thread, and each would connect and log in by itself
        fs = _filesystems.setdefault((type(fs), repr(fs.storage_options)), fs)
    return fs, path


def cache_limit() -> int:
    """Bytes of memory for what has been read and is being read: `CACHE_BYTES`, or less where memory is scarce."""
    from .memory import CACHE_SHARE, photo_budget

    return min(CACHE_BYTES, int(photo_budget() * CACHE_SHARE))


class _Loading:
    """Bytes that a thread is reading.

    Attributes:
        data: What it has read; None until then.
    """

    def __init__(self) -> None:
        self.data: bytes | None = None


class _Cache:
    """What has been read, least recently used first, and room for what is being read, up to `limit` bytes in all."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.entries: OrderedDict[tuple, bytes | _Loading] = OrderedDict()
        self.changed = threading.Condition()

    def get(self, key: tuple, size: int, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of `key`, about `size` ones: those in the cache, or those that `fetch` reads. Several threads that
        ask for the same bytes share one call. It waits while others read as much as the limit allows."""
        with self.changed:
            while True:
                entry = self.entries.get(key)
                if isinstance(entry, bytes):
                    self.entries.move_to_end(key)
                    return entry
                if entry is None:
                    self._make_room(size)
                    if not self.used or self.used + size <= self.limit:
                        break
                self.changed.wait()
                if entry is not None and entry.data is not None:
                    return entry.data
            loading = self.entries[key] = _Loading()
            self.used += size
        try:
            loading.data = fetch()
        finally:
            with self.changed:
                del self.entries[key]
                self.used -= size
                if loading.data is not None:
                    self._put(key, loading.data)
                self.changed.notify_all()
        return loading.data

    def offer(self, key: tuple, data: bytes) -> None:
        """Gives bytes to those who wait for them, or keeps them if there is room."""
        with self.changed:
            entry = self.entries.get(key)
            if entry is None:
                self._put(key, data)
            elif isinstance(entry, _Loading):
                entry.data = data
                self.changed.notify_all()

    def offered(self, key: tuple) -> bytes | None:
        """What `offer` has given to a call of `get` that is waiting for its `fetch`."""
        with self.changed:
            entry = self.entries.get(key)
            return entry.data if isinstance(entry, _Loading) else entry

    def _put(self, key: tuple, data: bytes) -> None:
        self._make_room(len(data))
        if self.used + len(data) <= self.limit:
            self.entries[key] = data
            self.used += len(data)

    def _make_room(self, size: int) -> None:
        for key, data in list(self.entries.items()):
            if self.used + size <= self.limit:
                return
            if isinstance(data, bytes):
                del self.entries[key]
                self.used -= len(data)


class _State:
    """What the threads of this process share: the cache and the open files."""

    def __init__(self) -> None:
        self.cache = _Cache(cache_limit())
        self.files: OrderedDict[str, RemoteFile] = OrderedDict()
        self.lock = threading.Lock()
        self.failures = 0  # requests for parts of files in a row that have failed, in spite of repetitions


_state: _State | None = None
_state_lock = threading.Lock()
_filesystems: dict[tuple, Any] = {}


def _forget() -> None:
    global _state, _state_lock
    _filesystems.clear()
    _state, _state_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _shared() -> _State:
    global _state
    with _state_lock:
        _state = _state or _State()
        return _state


def read(url: str, limit: int) -> bytes:
    """Reads a whole file with one request.

    Args:
        url: The file.
        limit: Maximum number of bytes.

    Raises:
        RemoteError: If it cannot be read, or is larger.
    """
    return _shared().cache.get((url,), BLOCK, lambda: _retried(url, lambda: _get_all(url, limit)))


def exists(url: str) -> bool:
    """Whether there is a file. Raises RemoteError only if that is unknown, as the server cannot be reached."""
    try:
        _retried(url, lambda: _status(url))
    except RemoteError as error:
        if error.transient:
            raise
        return False
    return True


def open_file(url: str) -> RemoteFile:
    """A file whose parts are to be read. Raises RemoteError if it cannot be read, or has no known size."""
    state = _shared()
    with state.lock:
        file = state.files.setdefault(url, RemoteFile(url))
        state.files.move_to_end(url)
        dropped = [state.files.popitem(last=False)[1] for _ in range(len(state.files) - OPEN_FILES)]
    for old in dropped:
        old.close()
    file.find()
    return file


class RemoteFile:
    """A file at a URL. It may be used from several threads.

    Sequential reading requests blocks of `BLOCK` bytes, other reading the bytes of a part alone. A server that does not
    support ranges sends the file from its beginning: parts are then cheap only in their order.

    Attributes:
        url: The URL.
        size: Bytes.
        stamp: Changes when the file changes: its size, and its ETag and time as far as the server gives them.
        ranges: Whether the server supports ranges.
    """

    def __init__(self, url: str):
        self.url, self.size, self.stamp, self.ranges = url, 0, "", False  # until `find`
        self._ends: deque[int] = deque(maxlen=512)  # of the parts that were opened last
        self._stream: _Stream | None = None
        self._lock = threading.Lock()

    def find(self) -> None:
        """Asks the server for the file, once. Raises RemoteError."""
        with self._lock:
            if not self.stamp:
                size, stamp, ranges = _retried(self.url, lambda: _status(self.url))
                if size is None:
                    raise RemoteError(self.url, "the server does not say its size")
                self.size, self.stamp, self.ranges = size, stamp, ranges

    def part(self, offset: int, size: int) -> RemotePart:
        """A part, as a file for reading."""
        sequential = not self.ranges or any(0 <= offset - end <= NEAR for end in tuple(self._ends))
        self._ends.append(offset + size)
        return RemotePart(self, offset, size, sequential)

    def blocks(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yields the blocks that hold a range, with their positions. Raises RemoteError."""
        for at in range(start - start % BLOCK, end, BLOCK):
            yield at, self.piece(at, min(at + BLOCK, self.size))

    def piece(self, start: int, end: int) -> bytes:
        """Reads a range, through the cache."""
        return _shared().cache.get((self.url, start, end), end - start, lambda: self.fetch(start, end))

    def fetch(self, start: int, end: int) -> bytes:
        """Reads a range. Raises RemoteError, and UserError if the server seems to be down."""
        state = _shared()
        try:
            if self.ranges:
                data = _retried(self.url, lambda: _get_range(self.url, start, end, self.size))
            else:
                with self._lock:
                    data = _retried(self.url, lambda: self._streamed(start, end))
        except RemoteError as error:
            if not error.transient:  # replaced, perhaps: ask for its size again
                with state.lock:
                    state.files.pop(self.url, None)
            state.failures += error.transient
            if state.failures >= GIVE_UP:  # else every photo that is left would become an error
                raise UserError(
                    f"{error.strerror}; the last {state.failures} requests have failed: run the same command again "
                    "when the server can be reached"
                ) from None
            raise
        state.failures = 0
        return data

    def close(self) -> None:
        """Closes the connection, if one is open. The file can still be read."""
        with self._lock:
            self._close_stream()

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _streamed(self, start: int, end: int) -> bytes:
        """Reads a range of a file that the server sends from its beginning, on with the connection if it can."""
        cache = _shared().cache
        if (passed := cache.offered((self.url, start, end))) is not None:
            return passed
        try:
            if self._stream is None or self._stream.position > start:
                self._close_stream()
                self._stream = _Stream(self.url)
            while (at := self._stream.position) < start:
                size = min(BLOCK, start - at)
                data = self._stream.read(size)
                if at % BLOCK == 0 and size == BLOCK:  # another thread may have asked for it in the meantime
                    cache.offer((self.url, at, at + size), data)
            data = self._stream.read(end - start)
        except BaseException:
            self._close_stream()
            raise
        if end == self.size:
            self._close_stream()
        return data


class RemotePart(io.RawIOBase):
    """A part of a file at a URL, as a file for reading. Reads raise RemoteError."""

    def __init__(self, file: RemoteFile, offset: int, size: int, sequential: bool):
        self.file, self.offset, self.size, self.sequential = file, offset, size, sequential
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        self.at = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence] + to
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        start = self.offset + self.at
        end = min(start + len(view), self.offset + self.size, self.file.size)
        for at, data in self._pieces(start, end) if start < end else ():
            first, last = max(start, at), min(end, at + len(data))
            view[first - start : last - start] = data[first - at : last - at]
        read = max(0, end - start)
        self.at += read
        return read

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        if self.sequential:
            yield from self.file.blocks(start, end)
            return
        first = self.offset + (start - self.offset) // BLOCK * BLOCK
        for at in range(first, end, BLOCK):
            yield at, self.file.piece(at, min(at + BLOCK, self.offset + self.size, self.file.size))


def _retried(url: str, request: Callable[[], _Result]) -> _Result:
    """Calls a request until it succeeds, fails for good, or has failed for `RETRY_SECONDS`."""
    started, delay, attempts = time.monotonic(), 0.25, 0
    while True:
        attempts += 1
        try:
            return request()
        except Exception as error:  # every file system has its own exceptions
            failure = error if isinstance(error, RemoteError) else _failure(url, error)
        pause = delay * (0.5 + random.random() / 2)  # workers must not come back all at once
        seconds = time.monotonic() - started
        if not failure.transient:
            raise failure from None
        if seconds + pause > RETRY_SECONDS:
            reason = str(failure.strerror).removeprefix(f"{clean_url(url)}: ")
            raise RemoteError(url, f"{reason} ({attempts} attempts in {seconds:.0f} s)", transient=True) from None
        time.sleep(pause)
        delay = min(2 * delay, 10.0)


def _failure(url: str, error: Exception) -> RemoteError:
    """An exception of a file system as one without secrets."""
    if isinstance(error, FileNotFoundError):
        return RemoteError(url, "not found")
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return RemoteError(
            url, f"access denied ({without_secrets(first_line(error))}); fsspec's configuration holds the credentials"
        )
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:  # asyncio's own one on Python 3.10
        return RemoteError(url, "timed out", transient=True)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    transient = {"ClientConnectionError", "ClientPayloadError", "HTTPClientError", "ConnectionError"} & kinds
    temporary = type(error) is OSError and error.errno != errno.EINVAL
    return RemoteError(url, without_secrets(first_line(error)), bool(transient) or temporary)


def _is_http(fs: Any) -> bool:
    return "http" in fs.protocol


def _call(fs: Any, name: str, path: str, **options: Any) -> Any:
    """Calls a method of a file system, with a time limit if it can have one."""
    limit = {"timeout": REQUEST_SECONDS} if fs.async_impl else {}
    return getattr(fs, name)(path, **options, **limit)


def _wait(fs: Any, function: Callable[..., Any], *args: Any) -> Any:
    """The result of a coroutine that runs in fsspec's loop."""
    from fsspec.asyn import sync

    return sync(fs.loop, function, *args, timeout=REQUEST_SECONDS)


def _status(url: str) -> tuple[int | None, str, bool]:
    """Size, stamp, and whether ranges are supported."""
    fs, path = filesystem(url)
    if _is_http(fs):
        return _wait(fs, _http_status, fs, url)
    info = _call(fs, "info", path)
    marks = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "modified", "created")
    return info["size"], " ".join(str(info[mark]) for mark in ("size", *marks) if info.get(mark)), True


def _get_range(url: str, start: int, end: int, size: int) -> bytes:
    fs, path = filesystem(url)
    if _is_http(fs):
        data = _wait(fs, _http_range, fs, url, start, end, size)
    else:
        data = _call(fs, "cat_file", path, start=start, end=end)
    if len(data) != end - start:
        raise RemoteError(url, f"{len(data)} of {end - start} bytes arrived", transient=True)
    return data


def _get_all(url: str, limit: int) -> bytes:
    fs, path = filesystem(url)
    data = _wait(fs, _http_all, fs, url, limit) if _is_http(fs) else _call(fs, "cat_file", path, start=0, end=limit + 1)
    if len(data) > limit:
        raise RemoteError(url, f"more than the limit of {limit} bytes")
    return data


@contextlib.asynccontextmanager
async def _http(fs: Any, url: str, byte_range: str = ""):
    """A response to GET: HEAD is not allowed with a URL that is signed for GET, and fsspec's own functions do not show
    whether the server has obeyed a range."""
    import aiohttp

    session, options = await fs.set_session(), dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if byte_range:
        headers["Range"] = f"bytes={byte_range}"
    options["timeout"] = aiohttp.ClientTimeout(sock_connect=STALLED_SECONDS, sock_read=STALLED_SECONDS)
    try:
        response = await session.get(fs.encode_url(url), headers=headers, **options)
    except aiohttp.RedirectClientError:
        raise RemoteError(url, "redirects to another protocol") from None
    except (aiohttp.InvalidURL, ValueError):
        raise RemoteError(url, "not a valid URL") from None
    async with response:
        if response.url.scheme != protocol_of(url) and response.url.scheme != "https":
            raise RemoteError(url, "redirects to an unencrypted address")
        if response.status >= 300:  # a redirection that leads nowhere, or an error
            transient = response.status >= 500 or response.status in (408, 425, 429)
            raise RemoteError(url, f"HTTP {response.status} {without_secrets(response.reason or '')}", transient)
        yield response


async def _http_status(fs: Any, url: str) -> tuple[int | None, str, bool]:
    async with _http(fs, url, "0-0") as response:
        ranges = response.status == 206
        if ranges:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
        else:
            total = response.headers.get("Content-Length", "")
            response.close()  # do not receive the file
        marks = [total, response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")]
        return int(total) if total.isdecimal() else None, " ".join(marks), ranges


async def _http_range(fs: Any, url: str, start: int, end: int, size: int) -> bytes:
    async with _http(fs, url, f"{start}-{end - 1}") as response:
        if response.status != 206:
            response.close()
            raise RemoteError(url, "the server does not support ranges any more", transient=True)
        if response.headers.get("Content-Range", "").rpartition("/")[2] not in (str(size), "*"):
            response.close()
            raise RemoteError(url, "has changed while it is read")
        return await response.read()


async def _http_all(fs: Any, url: str, limit: int) -> bytes:
    async with _http(fs, url) as response:
        parts, size = [], 0
        async for part in response.content.iter_chunked(1 << 20):
            parts.append(part)
            size += len(part)
            if size > limit:
                response.close()
                break
        return b"".join(parts)


class _Stream:
    """A file that a server sends from its beginning.

    Attributes:
        position: Bytes that have been read.
    """

    def __init__(self, url: str):
        self.url, self.position = url, 0
        self.fs, _ = filesystem(url)
        self.stack = contextlib.AsyncExitStack()
        self.response = _wait(self.fs, self._open)

    async def _open(self) -> Any:
        return await self.stack.enter_async_context(_http(self.fs, self.url))

    async def _read(self, size: int) -> bytes:
        return await self.response.content.readexactly(size)

    def read(self, size: int) -> bytes:
        """Reads the next `size` bytes."""
        try:
            data = _wait(self.fs, self._read, size)
        except EOFError:  # asyncio.IncompleteReadError
            raise RemoteError(self.url, "the connection was closed too early", transient=True) from None
        self.position += size
        return data

    def close(self) -> None:
        """Closes the connection, whatever state it is in."""

        async def close() -> None:
            self.response.close()
            await self.stack.aclose()

        with contextlib.suppress(Exception):
            _wait(self.fs, close)
