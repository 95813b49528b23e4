# SPDX-License-Identifier: MIT
"""Files that appear whole or not at all, and results that are kept until new ones replace them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from .errors import UserError, WriteError
from .suffixes import is_hidden
from .urls import is_url

TEMPORARY_PREFIX = ".tmp-"
MAX_NAME = 255  # bytes of a file name
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)
OLD = ".replaced"  # in an output folder: the results that a command with --overwrite is replacing
LOCK = ".lock"  # in a folder that a process works on
OUTDATED = ".outdated"  # in a run folder: results from before an update, from which new ones take what is still valid


class _File(io.FileIO):
    """A file that remembers the first error of a write, which torch and Pillow report as errors of their own."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def fileno(self) -> int:
        """Not available: Pillow would write to the descriptor and lose the reason of an error."""
        raise io.UnsupportedOperation("fileno")


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary binary file for writing and renames it to `path` when the block ends.

    An existing file is replaced; a symbolic link is replaced too, and its target is not touched. If the block raises,
    `path` is unchanged. If the process is killed, a file whose name begins with `TEMPORARY_PREFIX` remains in the
    folder; `remove_stale` deletes it. After the block, the file survives a power failure.

    Raises:
        WriteError: If the file cannot be written, or if it is a device or a pipe, which would be replaced. The error
            names the file and, if the disk is full, the disk.
    """
    path = Path(path)
    if not path.name:
        raise WriteError(f"{path} cannot be written: {os.strerror(errno.EISDIR)}")
    if path.parent == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir()):
        raise WriteError(f"{path} is a device or a pipe; name a file to write")
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        # O_EXCL never opens an existing file. Unlike tempfile, which sets mode 0600, this gives the usual permissions.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    raw = _File(descriptor, "wb")
    raw.name = os.fspath(path)
    written = False  # whether the block has ended
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            written = True
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
        with _directory(path.parent) as folder:
            os.fsync(folder)  # the rename itself
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = raw.error or (error if written and isinstance(error, OSError) else None)
        if cause is None:
            raise
        raise write_error(path, cause) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes an indented JSON file, in ASCII. Raises WriteError as `atomic_write`."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def write_json_lines(path: str | os.PathLike, values: Iterable) -> None:
    """Writes a file of JSON values, one per line, in ASCII. Raises WriteError as `atomic_write`."""
    with atomic_write(path) as file:
        for value in values:
            file.write(json.dumps(value).encode() + b"\n")


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading. Raises OSError at once for what is no regular file, such as a pipe without a writer."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return file


def open_csv(path: str | os.PathLike) -> TextIO:
    """Opens a CSV file, as the csv module requires. Raises OSError as `open_file`."""
    return io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="")


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file. Raises OSError as `open_file`."""
    with open_file(path) as file:
        return file.read()


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_error(path: str | os.PathLike, error: OSError) -> WriteError:
    """The error to raise if `path` could not be written because of `error`."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        disk = Path(absolute(path)).parent
        while not disk.is_mount():
            disk = disk.parent
        reason += f" (the disk mounted at {disk}); free some space and run the same command again"
    result = WriteError(f"{os.fspath(path)} cannot be written: {reason}")
    result.errno = error.errno
    return result


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Within the context, an OSError says that `path` could not be written (`write_error`)."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def expect_writable(path: Path) -> None:
    """Raises WriteError if a file cannot be written. One that exists is not changed, another is not left behind."""
    is_new = not os.path.lexists(path)
    with writing(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
        if is_new:
            path.unlink()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the lock of a folder; a second process that asks for it gets a UserError. It ends with the process."""
    make_folder(out)
    path = out / LOCK
    try:
        # Neither follows a link nor truncates: the file may be the user's.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link; remove it") from None
        raise write_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), path.stat()):  # the other one has just removed it
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise UserError(f"{out} is in use by another run; wait for it or choose another --out") from None
        yield
    finally:
        os.close(descriptor)


def remove_stale(folder: str | os.PathLike) -> None:
    """Removes the temporary files of killed writers from `folder`, and their temporary folders unless one is `locked`.

    It also removes the files of active writers, so only the process that holds the lock of the folder may call it.
    """
    for stale in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        if not stale.is_dir() or stale.is_symlink():
            stale.unlink(missing_ok=True)
            continue
        with contextlib.suppress(UserError), locked(stale):
            shutil.rmtree(stale)


def name_digest(name: str) -> str:
    """A short digest of any name, for file names that must be unique."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def fitted(name: str, length: int = MAX_NAME) -> str:
    """`name` if it has at most `length` bytes, else its beginning, "~" and its `name_digest`."""
    if len(name.encode("utf-8", "surrogatepass")) <= length:
        return name
    end = f"~{name_digest(name)}"
    start = name.encode("utf-8", "surrogatepass")[: length - len(end)]
    return start.decode("utf-8", "ignore") + end


def make_folder(path: Path) -> None:
    """Creates a folder of results unless it exists; it may be a symbolic link to a folder.

    Raises:
        UserError: If it cannot be created, or is a link to nowhere.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        expect_target(path)
        raise UserError(f"{path} is in the way: a folder is needed here; move it away") from None
    except OSError as error:
        raise write_error(path, error) from error


def expect_target(path: Path) -> None:
    """Raises UserError if a path is a link to nowhere."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {path.readlink()}, which does not exist; create it or remove the link")


def set_aside(out: Path, files: Iterable[Path]) -> None:
    """Moves files of the folder `out` to out/.replaced, and removes the folders that are empty then.

    Links to folders stay. What lies behind a link on another disk cannot be moved and is deleted.
    """
    for path in files:
        target = out / OLD / path.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            path.unlink()
        remove_empty(path.parent, out)


def put_back_files(out: Path, files: Iterable[Path]) -> None:
    """Moves files of out/.replaced back to where they were."""
    for path in files:
        move(path, out / path.relative_to(out / OLD))
        remove_empty(path.parent, out)


def set_outdated(out: Path, files: Iterable[Path]) -> None:
    """Moves files of the folder `out` to the last of its `outdated_folders`, and removes the folders that are empty."""
    folder = outdated_folders(out)[-1]
    for path in files:
        move(path, folder / path.relative_to(out))
        remove_empty(path.parent, out)


def outdated_folders(out: Path) -> list[Path]:
    """The folders out/.outdated/0, out/.outdated/1 and so on, which updates have made, in order."""
    return sorted((out / OUTDATED).glob("*"), key=lambda path: (len(path.name), path.name))


def move(path: Path, target: Path) -> None:
    """Moves a file, perhaps to another disk. It is complete at one of the two places at any time."""
    make_folder(target.parent)
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with path.open("rb") as source, atomic_write(target) as file:
            shutil.copyfileobj(source, file)
        path.unlink()


def is_file(path: Path) -> bool:
    """Whether a path is something else than a folder; a link to a folder is."""
    return path.is_symlink() or not path.is_dir()


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, sorted."""
    return sorted(filter(is_file, folder.rglob("*")))


def walk(
    root: str,
    list_folder: Callable[[str], Iterable[tuple[bytes, bool]]],
    on_error: Callable[[str, OSError], None],
) -> Iterator[str]:
    """Yields the names of files below a folder, with "/" between folders. Bytes that are not UTF-8 are kept by
    surrogateescape. Links to folders are followed, except back into a folder that is being listed.

    Args:
        root: The folder.
        list_folder: The files and folders in a folder, in order, as `list_folder` returns them.
        on_error: Called for a folder that cannot be listed, with its name ("": the root).
    """
    # An explicit stack of (identity, prefix, remaining entries): folders may be nested deeper than Python recurses.
    stack: list[tuple[tuple[int, int], str, Iterator[tuple[bytes, bool]]]] = []

    def enter(name: str) -> None:
        path = os.path.join(root, name)  # noqa: PTH118 (pathlib is slow for millions of names)
        try:
            status = os.stat(path)  # noqa: PTH116
            identity = (status.st_dev, status.st_ino)
            if all(identity != above for above, _, _ in stack):
                stack.append((identity, f"{name}/" if name else "", iter(list_folder(path))))
        except OSError as error:
            on_error(name, error)

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
            yield name


def list_folder(path: str, suffixes: tuple[str, ...]) -> list[tuple[bytes, bool]]:
    """The folders in a folder, and the files with these suffixes in upper or lower case, as (name, is a folder), sorted
    by the bytes of their names. Hidden ones are skipped."""
    entries = []
    with os.scandir(path) as scan:
        for entry in scan:
            if is_hidden(entry.name):
                continue
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112
            if is_folder or entry.name.lower().endswith(suffixes):
                entries.append((os.fsencode(entry.name), is_folder))
    return sorted(entries)


def find_files(folder: Path, *suffixes: str) -> list[str]:
    """The names of files with these suffixes below a folder, found as photos are (`walk`).

    A folder of such a name counts as a file: reading it says what is wrong.

    Raises:
        UserError: If a folder cannot be listed.
    """

    def stop(name: str, error: OSError) -> None:
        raise UserError(f"{folder / name}: the folder cannot be listed: {error.strerror or error}")

    def entries(path: str) -> list[tuple[bytes, bool]]:
        found = list_folder(path, suffixes)
        return [(name, is_folder and not os.fsdecode(name).lower().endswith(suffixes)) for name, is_folder in found]

    return list(walk(os.fspath(folder), entries, stop))


def remove_files(out: Path, files: Iterable[Path]) -> None:
    """Removes files below the folder `out`, and the folders that are empty then. Links to folders stay."""
    for path in files:
        path.unlink(missing_ok=True)
        remove_empty(path.parent, out)


def remove_empty(folder: Path, out: Path) -> None:
    """Removes a folder below `out` and those that contain it, as far as they are empty. Links to folders stay."""
    while folder != out and not folder.is_symlink():
        try:
            folder.rmdir()
        except OSError:  # not empty
            return
        folder = folder.parent


def composed(name: str) -> str:
    """A name with composed characters: files of macOS have "e" and an accent for "é"."""
    return unicodedata.normalize("NFC", name)


def path_parts(path: str) -> tuple[str, ...]:
    """The folders of a path and its last part, to be compared with those of paths of other machines."""
    return tuple(part for part in composed(path).split("/") if part not in ("", "."))


def absolute(path: str | os.PathLike) -> str:
    """An absolute path that keeps symbolic links, which the user may point elsewhere later. A URL stays as it is."""
    text = os.fsdecode(path)
    return text if is_url(text) else os.path.abspath(text)  # noqa: PTH100


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 digest of a file, in hex."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
