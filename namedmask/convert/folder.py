# SPDX-License-Identifier: MIT
"""The output folder of `namedmask convert`: it appears whole, and only files that were written by it are replaced."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DamagedFile, UserError
from ..files import (
    LOCK,
    TEMPORARY_PREFIX,
    absolute,
    atomic_write,
    files_below,
    fitted,
    is_file,
    locked,
    make_folder,
    read_bytes,
    remove_files,
    write_error,
)
from ..photos import CONVERT_RECORD as RECORD


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside `out` whose files become those of `out` when the block ends.

    If the block raises, or the process is killed, `out` is unchanged. A temporary folder that a killed process has left
    is removed by the next call with the same `out`.

    Args:
        out: The folder. It may exist if it is empty, or if `convert` wrote it and `overwrite` is set.
        overwrite: Replace the files that an earlier call has written. Other files are kept.

    Raises:
        UserError: If `out` has files that were not written by `convert`, or by it without `overwrite`.
    """
    out = Path(absolute(out))
    if os.path.islink(out):  # noqa: PTH114 (False for names that are too long)
        out = Path(os.path.realpath(out))
    try:
        before = _written(out, overwrite)
    except OSError as error:
        raise write_error(out, error) from error
    temporary = out.with_name(fitted(f"{TEMPORARY_PREFIX}{out.name}"))
    with locked(temporary):
        _clear(temporary)
        ours = True
        try:
            yield temporary
            paths = (path for path in files_below(temporary) if path != temporary / LOCK)
            files = sorted(str(path.relative_to(temporary)) for path in paths)
            if before is None:
                _record(temporary, files)
                try:
                    temporary.rename(out)
                except OSError as error:
                    raise write_error(out, error) from error
                ours = False  # there may be one of another process already
                (out / LOCK).unlink()  # last, as it is the lock
            else:
                _replace(temporary, out, files, before)
        finally:
            if ours:
                _clear(temporary)
                (temporary / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # another process may have begun
                    temporary.rmdir()


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if is_file(path):
            path.unlink()
        else:
            shutil.rmtree(path)


def _written(out: Path, overwrite: bool) -> list[str] | None:
    """The files that an earlier call has written into `out`; None if there is no folder or an empty one."""
    if not out.is_dir():
        if out.exists():
            raise UserError(f"{out} is in the way: a folder is needed here; move it away")
        return None
    if not any(out.iterdir()):
        return None
    record = out / RECORD
    if not record.exists():
        raise UserError(f"{out} has files that `namedmask convert` has not written; choose another --out")
    if not overwrite:
        raise UserError(f"{out} has a data set already; choose another --out, or replace it with --overwrite")
    try:
        files = json.loads(read_bytes(record))["files"]
        if not all(isinstance(file, str) and ".." not in Path(file).parts and file[:1] != "/" for file in files):
            raise ValueError("expected paths in the folder")
        return files
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(record, error, remedy="remove the data set, or choose another --out") from None


def _record(folder: Path, files: list[str]) -> None:
    with atomic_write(folder / RECORD) as file:
        file.write(json.dumps({"files": files}, indent=0).encode())


def _replace(new: Path, out: Path, files: list[str], before: list[str]) -> None:
    """Replaces the files `before` of `out` by those of `new`. If it is interrupted, --overwrite starts over."""
    for stale in out.glob(f"{TEMPORARY_PREFIX}*"):  # records that killed processes have left unfinished
        if is_file(stale):
            stale.unlink()
    own = set(before)
    for name in files:
        folders = {parent for parent in (out / name).parents if out in parent.parents}
        for path in (out / name, *sorted(folders)):
            if not os.path.lexists(path) or str(path.relative_to(out)) in own:
                continue
            if path not in folders or not path.is_dir():
                raise UserError(f"{path} is in the way and was not written by `namedmask convert`; move it away")
    _record(out, sorted({*before, *files}))
    remove_files(out, [out / name for name in before])
    for name in files:
        make_folder((out / name).parent)
        try:
            (new / name).replace(out / name)
        except OSError as error:
            if error.errno != errno.EXDEV:  # `out` has folders that are links to other disks
                raise write_error(out / name, error) from error
            shutil.move(new / name, out / name)
    _record(out, files)
