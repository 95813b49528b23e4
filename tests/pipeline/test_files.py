# SPDX-License-Identifier: MIT
"""Files that appear whole or not at all, names that fit, and results that are set aside and put back."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from namedmask import files
from namedmask.errors import UserError, WriteError
from namedmask.files import OLD, atomic_write, fitted, name_digest, open_csv, open_file, remove_stale, set_aside


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError) as caught:
            open_file(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(path))
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")
    (tmp_path / "a.csv").write_bytes("\ufeffé,1\r\n".encode())
    with open_csv(tmp_path / "a.csv") as file:
        assert file.read() == "é,1\r\n"
    assert files.read_bytes(tmp_path / "a.csv")[:3] == b"\xef\xbb\xbf"


def test_digest_of_a_file_of_several_blocks(tmp_path):
    data = bytes(range(256)) * (3 << 12) + b"end"
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_only_names_that_are_too_long_are_cut():
    assert len(name_digest("a")) == 16 != name_digest("b")
    for name in ("é" * 20, "x" * 40):
        assert fitted(name, 40) == name
    assert fitted("x" * 41, 40) == "x" * 23 + "~" + name_digest("x" * 41)
    assert fitted("é" * 21, 40) == "é" * 11 + "~" + name_digest("é" * 21)  # no half of a letter
    assert fitted("x" * 255) == "x" * 255 and len(fitted("x" * 256)) == 255
    assert fitted("\udce9" * 20, 40).endswith(name_digest("\udce9" * 20))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk_is_named(tmp_path, code):
    disk = tmp_path
    while not disk.is_mount():
        disk = disk.parent
    error = files.write_error(tmp_path / "a", OSError(code, "why"))
    full = f" (the disk mounted at {disk}); free some space and run the same command again"
    assert str(error) == f"{tmp_path}/a cannot be written: why{full if code != errno.EIO else ''}"
    assert error.errno == code
    assert str(files.write_error("a", OSError("odd"))) == "a cannot be written: odd"


def test_first_error_of_a_write_is_kept():
    with files._File(os.open("/dev/full", os.O_WRONLY), "wb") as raw:
        caught = []
        for _ in range(2):
            with pytest.raises(OSError, match="No space left") as info:
                raw.write(b"x")
            caught.append(info.value)
        assert raw.error is caught[0] is not caught[1]
        with pytest.raises(OSError, match="fileno"):
            raw.fileno()


def test_error_of_the_block_is_raised_unless_a_write_failed(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="other file") as caught, atomic_write(tmp_path / "a"):
        raise OSError("other file")
    assert not isinstance(caught.value, WriteError) and tree(tmp_path) == []

    def fail(_):
        raise OSError(errno.EIO, "cable")

    monkeypatch.setattr(os, "fsync", fail)  # after the block: an error of the file itself
    with pytest.raises(WriteError, match="a cannot be written: cable"), atomic_write(tmp_path / "a") as file:
        file.write(b"1")
    assert tree(tmp_path) == []


def test_folders_are_made_or_named(tmp_path):
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to("a")
    files.make_folder(tmp_path / "link")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="dangling is a link to nowhere, which does not exist"):
        files.make_folder(tmp_path / "dangling")
    (tmp_path / "file").touch()
    (tmp_path / "to_file").symlink_to("file")
    for name in ("file", "to_file"):
        with pytest.raises(UserError, match=f"{name} is in the way: a folder is needed here"):
            files.make_folder(tmp_path / name)
    with pytest.raises(WriteError, match="cannot be written: Not a directory"):
        files.make_folder(tmp_path / "file" / "below")


def test_stale_files_and_folders_are_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").touch()
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "a").touch()
    (tmp_path / ".tmp-file").touch()
    (tmp_path / ".tmp-link").symlink_to("kept")
    with files.locked(tmp_path / ".tmp-used"):  # as `namedmask convert --out used` does
        (tmp_path / ".tmp-used" / "a").touch()
        remove_stale(tmp_path)
        assert tree(tmp_path) == [".tmp-used", ".tmp-used/.lock", ".tmp-used/a", "kept", "kept/a"]
    remove_stale(tmp_path)
    assert tree(tmp_path) == ["kept", "kept/a"]


@pytest.mark.parametrize("crosses_disks", [False, True])
def test_results_are_set_aside_and_put_back(tmp_path, monkeypatch, crosses_disks):
    out = tmp_path / "out"
    (out / "masks" / "deep").mkdir(parents=True)
    (out / "masks" / "users").touch()
    (tmp_path / "disk").mkdir()
    (out / "linked").symlink_to(tmp_path / "disk")
    made = [out / "masks" / "deep" / "1", out / "masks" / "2", out / "linked" / "3"]
    for path in made:
        path.write_text(path.name)
    before = tree(out)
    set_aside(out, made)
    assert tree(out / OLD) == ["linked", "linked/3", "masks", "masks/2", "masks/deep", "masks/deep/1"]
    assert tree(out)[-3:] == ["linked", "masks", "masks/users"] and (out / "linked").is_symlink()
    if crosses_disks:

        def fail(path, target, rename=Path.replace):
            if path.parent == target.parent:
                return rename(path, target)
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(Path, "replace", fail)
    files.put_back_files(out, sorted(path for path in (out / OLD).rglob("*") if path.is_file()))
    assert tree(out) == before
    assert [path.read_text() for path in made] == ["1", "2", "3"]
    if crosses_disks:  # what cannot be moved aside is deleted
        set_aside(out, made[1:2])
        assert not made[1].exists() and not list((out / OLD).rglob("2"))
        files.remove_empty(out / OLD / "masks", out)
    files.remove_files(out, [*made, out / "gone"])
    assert tree(out) == ["linked", "masks", "masks/users"]


def test_other_errors_of_a_move_are_raised(tmp_path, monkeypatch):
    (tmp_path / "a").touch()

    def fail(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(PermissionError):
        set_aside(tmp_path, [tmp_path / "a"])
    with pytest.raises(PermissionError):
        files.put_back_files(tmp_path, [tmp_path / OLD / "a"])
    assert (tmp_path / "a").exists()


def test_only_empty_folders_are_removed(tmp_path):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "x").touch()
    files.remove_empty(tmp_path / "a" / "b" / "c", tmp_path)
    assert tree(tmp_path) == ["a", "a/x"]
    files.remove_empty(tmp_path, tmp_path)
    assert tmp_path.exists()
