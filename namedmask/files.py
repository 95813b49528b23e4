# SPDX-License-Identifier: MIT
"""Files that appear whole or not at all."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"
MAX_NAME = 255  # bytes of a file name
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary binary file for writing and renames it to `path` when the block ends.

    An existing file is replaced. If the block raises, `path` is unchanged. If the process is killed, a file whose name
    begins with `TEMPORARY_PREFIX` remains in the folder; `remove_stale` deletes it. After the block, the file survives
    a power failure.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        # "x" never overwrites a file. Unlike tempfile, which sets mode 0600, open gives the usual permissions.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def remove_stale(folder: str | os.PathLike) -> None:
    """Removes the temporary files of killed writers from `folder`.

    It also removes those of active writers, so only the process that holds the lock of the folder may call it.
    """
    for stale in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        if stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink(missing_ok=True)


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


def absolute(path: str | os.PathLike) -> str:
    """An absolute path that keeps symbolic links, which the user may point elsewhere later."""
    return os.path.abspath(path)  # noqa: PTH100


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 digest of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
