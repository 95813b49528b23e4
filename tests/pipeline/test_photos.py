# SPDX-License-Identifier: MIT
"""Photo sources and decoding: all layouts and modes, and damaged or malicious files."""

import io
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from namedmask import decoding, photos, tars
from namedmask.decoding import as_stored, pixels_of
from namedmask.errors import UserError
from namedmask.photos import PhotoError, PhotoSource, decode_ahead
from small_world import encoded_png


def scene(height=24, width=40):
    """A smooth RGB image that JPEG preserves, different in every corner so that every flip is visible."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), np.full_like(x, 60.0)], -1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


PNG = encoded(scene())
JPEG = encoded(scene(), "JPEG", quality=95)


def names_and_errors(path):
    errors = []
    names = list(PhotoSource(path).names(errors.append))
    return names, [(error.photo, error.reason) for error in errors]


def reason(source, name):
    with pytest.raises(PhotoError) as caught:
        source.decode(name)
    assert caught.value.photo == name
    assert "\n" not in str(caught.value)
    return caught.value.reason


def decoded(tmp_path, data, name="x.jpg"):
    (tmp_path / name).write_bytes(data)
    photo = PhotoSource(tmp_path).decode(name)
    assert photo.name == name and photo.pixels.dtype == np.uint8 and photo.pixels.ndim == 3
    assert photo.pixels.flags.c_contiguous and photo.pixels.flags.writeable
    return photo.pixels


def rejection(tmp_path, data, **options):
    (tmp_path / "x.jpg").write_bytes(data)
    return reason(PhotoSource(tmp_path, **options), "x.jpg")


def make_tar(path, members, **options):
    """Writes a tar. `members` maps names to bytes, or to a function that changes the TarInfo."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if callable(content):
                content(info)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


# ---- names -----------------------------------------------------------------------------------------------------------


def test_folder_is_listed_in_byte_order(tmp_path):
    for name in (
        "b/2.PNG",
        "b/1.jpeg",
        "b.jpg",
        "a.tiff",
        "Z.webp",
        "é.gif",
        "c/d/e/f.bmp",
        "c/x.jpe",
        "c/y.jfif",
        "q.tif",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for other in (".hidden.jpg", "notes.txt", "jpg", ".git/a.jpg", "__MACOSX/a.jpg", "b/._1.jpeg", "x.svg"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    expected = [
        "Z.webp",
        "a.tiff",
        "b/1.jpeg",
        "b/2.PNG",
        "b.jpg",
        "c/d/e/f.bmp",
        "c/x.jpe",
        "c/y.jfif",
        "q.tif",
        "é.gif",
    ]
    assert names_and_errors(tmp_path) == (expected, [])
    assert list(PhotoSource(str(tmp_path))) == list(PhotoSource(os.fsencode(tmp_path))) == expected


ODD_NAMES = [
    b"a b.jpg",
    b"'q\"uote'.jpg",
    b"new\nline.jpg",
    b"caf\xe9 \xff.jpg",
    b"-rf *.jpg",
    "日本.jpg".encode(),
    b"back\\slash.jpg",
]


def test_unusual_names_in_folders_tars_and_lists(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ODD_NAMES:
        (folder / os.fsdecode(name)).write_bytes(PNG)
    make_tar(
        tmp_path / "odd.tar",
        {os.fsdecode(n): PNG for n in ODD_NAMES},
        format=tarfile.GNU_FORMAT,
        errors="surrogateescape",
    )
    listed = [name for name in ODD_NAMES if b"\n" not in name]
    (tmp_path / "list.txt").write_bytes(b"\n".join(b"photos/" + name for name in listed))
    for path, expected in [
        (folder, sorted(ODD_NAMES)),
        (tmp_path / "odd.tar", [b"odd.tar/" + name for name in ODD_NAMES]),
        (tmp_path / "list.txt", [b"photos/" + name for name in listed]),
    ]:
        source = PhotoSource(path)
        assert [os.fsencode(name) for name in source] == expected
        for name in source:
            np.testing.assert_array_equal(source.decode(name).pixels, scene())


def test_list_keeps_its_lines(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "b.jpg").write_bytes(PNG)
    (tmp_path / "lists" / "odd").write_bytes(PNG)
    make_tar(tmp_path / "s.tar", {"m.jpg": PNG})
    lines = ["../b.jpg", "", str(tmp_path / "b.jpg"), "  ", "odd", "../s.tar", ".//odd", "../s.tar", "gone.jpg"]
    (tmp_path / "lists" / "l.txt").write_bytes("\r\n".join(lines).encode())
    source = PhotoSource(tmp_path / "lists" / "l.txt")
    names = list(source)
    assert names == ["../b.jpg", "odd", "../s.tar/m.jpg", "gone.jpg"]
    assert names_and_errors(source.path) == (
        names,
        [("l.txt", f"3 lines repeat earlier ones, such as '{tmp_path}/b.jpg'; each photo is used once")],
    )
    for name in names[:-1]:
        assert source.decode(name).pixels.shape == (24, 40, 3)
    assert reason(source, "gone.jpg") == "no such file"


def test_list_with_a_byte_order_mark_and_one_repeated_line(tmp_path):
    (tmp_path / "l.txt").write_text("\ufeffa.jpg\n\ufeffb.jpg\na.jpg\n", encoding="utf-8")
    path = str(tmp_path / "l.txt")
    assert names_and_errors(path) == (
        ["a.jpg", "\ufeffb.jpg"],
        [("l.txt", "1 line repeats an earlier one, such as 'a.jpg'; each photo is used once")],
    )


def test_different_spellings_of_a_path_are_one_photo(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "here").symlink_to("d")
    lines = ["d/x.jpg", "./d//x.jpg", f"{tmp_path}/d/./x.jpg", "d/../d/x.jpg", "here/../d/x.jpg", "here/x.jpg"]
    (tmp_path / "l.txt").write_text("\n".join(lines))
    assert names_and_errors(tmp_path / "l.txt")[0] == ["d/x.jpg", "here/x.jpg"]  # links count only beside ".."


def test_absolute_paths_are_read_from_a_list_alone(tmp_path):
    (tmp_path / "x.jpg").write_bytes(PNG)
    name = str(tmp_path / "x.jpg")
    (tmp_path / "l.txt").write_text(name)
    assert PhotoSource(tmp_path / "l.txt").read(name) == PNG
    assert reason(PhotoSource(tmp_path), name) == "not a path inside the photo source"


def test_folder_that_vanishes_is_named(tmp_path):
    (tmp_path / "photos").mkdir()
    source, errors = PhotoSource(tmp_path / "photos"), []
    (tmp_path / "photos").rmdir()
    assert list(source.names(errors.append)) == []
    assert str(errors[0]) == f"'{tmp_path}/photos': folder cannot be listed: No such file or directory"


def test_exists_is_true_for_files_and_members(tmp_path):
    (tmp_path / "x.jpg").write_bytes(PNG)
    (tmp_path / "d.jpg").mkdir()
    make_tar(tmp_path / "s.tar", {"m.jpg": PNG})
    (tmp_path / "bad.tar").write_text("no tar")
    source = PhotoSource(tmp_path)
    assert source.exists("x.jpg") and source.exists("s.tar/m.jpg")
    for name in ("y.jpg", "d.jpg", "s.tar/n.jpg", "bad.tar/m.jpg", "gone.tar/m.jpg", "../x.jpg", "nul\0.jpg"):
        assert not source.exists(name), name


def test_names_are_streamed(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").touch()
    names = iter(PhotoSource(tmp_path))
    assert next(names) == "a/x.jpg"
    (tmp_path / "b" / "later.jpg").touch()  # b has not been read yet
    assert list(names) == ["b/later.jpg", "b/x.jpg"]


def test_links_to_folders_are_followed_but_not_cycles(tmp_path):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.jpg").write_bytes(PNG)
    (tmp_path / "photos" / "sub" / "s.jpg").write_bytes(PNG)
    (tmp_path / "photos" / "sub" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "dangling.jpg").symlink_to("nowhere")
    names, errors = names_and_errors(tmp_path / "photos")
    assert names == ["dangling.jpg", "link/e.jpg", "self.jpg", "sub/s.jpg"] and errors == []
    source = PhotoSource(tmp_path / "photos")
    assert source.decode("link/e.jpg").pixels.shape == (24, 40, 3)
    assert reason(source, "dangling.jpg") == "no such file"
    assert "symbolic links" in reason(source, "self.jpg")


def test_deeply_nested_folders(tmp_path):
    deep = tmp_path / "top"
    deep.mkdir()
    try:
        for _ in range(1200):  # deeper than Python recurses
            deep = deep / "d"
            deep.mkdir()
        (deep / "x.jpg").touch()
        assert list(PhotoSource(tmp_path)) == ["top/" + "d/" * 1200 + "x.jpg"]
    finally:
        subprocess.run(
            ["rm", "-rf", str(tmp_path / "top")], check=True
        )  # shutil.rmtree recurses, as pytest's cleaning does


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_and_folders(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "x.jpg").write_bytes(PNG)
    for path in ("closed", "x.jpg"):
        (tmp_path / path).chmod(0)
    try:
        assert names_and_errors(tmp_path) == (["x.jpg"], [("closed", "folder cannot be listed: Permission denied")])
        assert reason(PhotoSource(tmp_path), "x.jpg") == "cannot be read: Permission denied"
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_permission_errors_are_reported_and_skipped(tmp_path, close_folder, monkeypatch):
    """The same as above, for root."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b.jpg").write_bytes(PNG)
    close_folder(tmp_path / "a")
    assert names_and_errors(tmp_path) == (["b.jpg"], [("a", "folder cannot be listed: Permission denied")])
    with pytest.raises(PhotoError, match="'a': folder cannot be listed"):
        list(PhotoSource(tmp_path))

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert reason(PhotoSource(tmp_path), "b.jpg") == "cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.ZIP", "a.jpg", "absent"])
def test_other_sources_raise_value_error_of_one_line(tmp_path, name):
    if name != "absent":
        (tmp_path / name).touch()
    with pytest.raises(ValueError) as caught:
        PhotoSource(tmp_path / name)
    says = (
        "plain .tar"
        if name[2:].lower() in ("tar.gz", "tgz", "zip")
        else "exist"
        if name == "absent"
        else "not a folder"
    )
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_compressed_shards_in_a_folder_are_reported(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    (tmp_path / "b.jpg").touch()
    names, [(photo, why)] = names_and_errors(tmp_path)
    assert names == ["b.jpg"] and photo == "a.tar.gz" and "plain .tar" in why


def test_photos_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "formats", lambda: decoding._FORMATS)
    for name in ("a.HEIC", "b.avif", "c.jxl", "d.CR2"):
        (tmp_path / name).write_bytes(b"\0\0\0\x1cftypheic" + bytes(100))
    (tmp_path / "e.jpg").write_bytes((tmp_path / "a.HEIC").read_bytes())
    make_tar(tmp_path / "s.tar", {"f.heic": PNG})
    names, errors = names_and_errors(tmp_path)
    assert names == ["e.jpg"] and [name for name, _ in errors] == ["a.HEIC", "b.avif", "c.jxl", "d.CR2", "s.tar/f.heic"]
    assert "pillow-heif" in errors[0][1] and "pillow 11.3" in errors[1][1] and "convert" in errors[2][1]
    assert "pillow-heif" in reason(PhotoSource(tmp_path), "e.jpg")


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heic_are_read_where_pillow_can(tmp_path, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    if kind not in decoding.formats():
        pytest.skip(f"Pillow has no {kind}")
    name = {"AVIF": "a.avif", "HEIF": "a.heic"}[kind]
    (tmp_path / name).write_bytes(encoded(scene(), kind, quality=95))
    assert names_and_errors(tmp_path) == ([name], [])
    pixels = PhotoSource(tmp_path).decode(name).pixels.astype(int)
    assert abs(pixels - scene()).mean() < 3


def test_own_masks_and_overlays_are_no_photos(tmp_path):
    for name in ("a.jpg", "sub/masks/a.png", "masks/a.png", "overlays/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    everything = list(PhotoSource(tmp_path))
    (tmp_path / "categories.json").write_text('{"categories": []}')  # of something else
    assert list(PhotoSource(tmp_path)) == everything
    (tmp_path / "segment.json").write_text("{}")
    assert list(PhotoSource(tmp_path)) == ["a.jpg", "sub/masks/a.png"]
    (tmp_path / "list.txt").write_text("masks/a.png")  # a list is taken at its word
    assert list(PhotoSource(tmp_path / "list.txt")) == ["masks/a.png"]


def test_class_folders(tmp_path):
    for name in ("dog/2.jpg", "dog/1.jpg", "cat/deep/x.jpg", "sea lion/s.jpg", ".hidden/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make_tar(tmp_path / "dog" / "0.tar", {"a.jpg": PNG})
    source, errors = PhotoSource(tmp_path), []
    expected = {
        "cat": ["cat/deep/x.jpg"],
        "dog": ["dog/0.tar/a.jpg", "dog/1.jpg", "dog/2.jpg"],
        "sea lion": ["sea lion/s.jpg"],
    }
    assert list(source.categories(errors.append).items()) == list(expected.items()) and errors == []
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    outputs = ("run/stages.json", "segmented/segment.json", "segmented/masks/a.png")
    for name in ("notes/a.txt", "raw/x.jxl", "sea lion/y.jxl", *outputs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(source.categories(errors.append).items()) == list(expected.items())
    assert [error.photo for error in errors] == ["raw/x.jxl", "sea lion/y.jxl", "empty", "notes", "raw"]
    assert errors[-1].reason == "no category: the folder holds no photo that can be read"
    make_tar(tmp_path / "loose.tar", {"a.jpg": PNG, "b/c.jpg": PNG})
    for i in range(3):
        (tmp_path / f"z{i}.jpg").touch()
    with pytest.raises(UserError) as caught:
        source.categories(errors.append)
    assert "'loose.tar/a.jpg', 'loose.tar/b/c.jpg', 'z0.jpg')" in str(caught.value)
    with pytest.raises(UserError, match="not a folder with class folders"):
        PhotoSource(tmp_path / "loose.tar").categories(errors.append)


# ---- tars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_listed_and_read_in_archive_order(tmp_path, layout):
    long = "d" * 90 + "/" + "n" * (60 if layout == tarfile.USTAR_FORMAT else 200) + ".jpg"
    (tmp_path / "sub").mkdir()
    content = {
        "b.jpg": PNG,
        "b.json": b"{}",
        "./a.PNG": JPEG,
        long: PNG,
        "x/.hidden.jpg": PNG,
        "__MACOSX/b.jpg": PNG,
        "inner.tar/c.jpg": JPEG,
        "folder.jpg": lambda info: setattr(info, "type", tarfile.DIRTYPE),
    }
    make_tar(tmp_path / "sub" / "S.TAR", content, format=layout)
    source = PhotoSource(tmp_path)
    members = ["b.jpg", "./a.PNG", long, "inner.tar/c.jpg"]
    assert list(source) == [f"sub/S.TAR/{member}" for member in members]
    for member in members:
        assert source.read(f"sub/S.TAR/{member}") == content[member]
    alone = PhotoSource(tmp_path / "sub" / "S.TAR")
    assert list(alone) == [f"S.TAR/{member}" for member in members]
    assert alone.read("S.TAR/b.jpg") == PNG
    assert reason(alone, "S.TAR/b.json") == "no such photo in the tar"
    assert reason(alone, "S.TAR") == "no such photo in the tar"


def test_archives_in_a_tar_are_errors(tmp_path):
    make_tar(tmp_path / "s.tar", {"a.jpg": PNG, "b.tar": PNG, "c.TGZ": PNG, "d.zip": PNG})
    names, errors = names_and_errors(tmp_path / "s.tar")
    assert names == ["s.tar/a.jpg"] and [photo for photo, _ in errors] == ["s.tar/b.tar", "s.tar/c.TGZ", "s.tar/d.zip"]
    assert all("unpack" in why for _, why in errors)


def test_members_never_reach_outside_their_tar(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPEG)
    (tmp_path / "photos").mkdir()
    shard = tmp_path / "photos" / "s.tar"
    content = {"../../secret.jpg": PNG, "../secret.jpg": PNG, str(secret): PNG, "/etc/passwd.jpg": PNG}
    make_tar(shard, content)
    source = PhotoSource(tmp_path / "photos")
    names = list(source)
    assert names == [f"s.tar/{member}" for member in content]
    before = sorted(tmp_path.rglob("*"))
    assert all(source.read(name) == PNG for name in names)
    assert sorted(tmp_path.rglob("*")) == before
    # A folder replaces the tar: the same names must still not reach files outside.
    shard.unlink()
    shard.mkdir()
    (tmp_path / "list.txt").write_text("photos/s.tar")
    for name in names:
        assert reason(source, name) in ("no such file", "not a path inside the photo source")
    listed = PhotoSource(tmp_path / "list.txt")
    assert reason(listed, "photos/s.tar/../../secret.jpg") == "not a path inside the photo source"
    for name in ("../secret.jpg", str(secret)):
        assert reason(source, name) == "not a path inside the photo source"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_special_members_are_errors(tmp_path, kind):
    def link(info):
        info.type, info.linkname = kind, "ok.jpg"

    make_tar(tmp_path / "s.tar", {"ok.jpg": PNG, "link.jpg": link, "link.txt": link})
    source = PhotoSource(tmp_path / "s.tar")
    assert list(source) == ["s.tar/ok.jpg", "s.tar/link.jpg"]
    assert "never followed" in reason(source, "s.tar/link.jpg")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_legal_forms_of_tars(tmp_path, format):
    def hard_link(info):
        info.type, info.linkname = tarfile.LNKTYPE, "a.jpg"

    long = "d/" * 60 + "l" * (240 if format != tarfile.USTAR_FORMAT else 90) + ".jpg"
    make_tar(tmp_path / "1.tar", {"a.jpg": PNG, "b.jpg": hard_link, long: JPEG}, format=format)
    make_tar(tmp_path / "2.tar", {}, format=format)
    make_tar(tmp_path / "3.tar", {"c.jpg": PNG, "a.jpg": JPEG}, format=format)
    data = [(tmp_path / f"{i}.tar").read_bytes() for i in (1, 2, 3)]
    (tmp_path / "all.tar").write_bytes(b"".join(data))
    names, errors = names_and_errors(tmp_path / "all.tar")
    assert names == ["all.tar/a.jpg", "all.tar/b.jpg", f"all.tar/{long}", "all.tar/c.jpg"] and not errors
    source = PhotoSource(tmp_path / "all.tar")
    assert [source.read(name) for name in names] == [JPEG, PNG, JPEG, PNG]  # as `cat` and `tar -x -i` have it
    assert names_and_errors(tmp_path / "2.tar") == ([], [])
    (tmp_path / "all.tar").write_bytes(data[0] + b"garbage" * 100)
    names, [(_, why)] = names_and_errors(tmp_path / "all.tar")
    assert len(names) == 3 and why.startswith("damaged tar")


def test_last_member_of_the_same_name_counts(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for content in (JPEG, PNG):
            info = tarfile.TarInfo("a.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = PhotoSource(tmp_path / "s.tar")
    assert list(source) == ["s.tar/a.jpg"] and source.read("s.tar/a.jpg") == PNG


def damage_header(data):
    return data[: start_of("2.jpg", data)] + b"\x07" * 512 + data[start_of("2.jpg", data) + 512 :]


def start_of(member, data):
    return data.index(member.encode())


def truncate(data):
    return data[: start_of("2.jpg", data) + 512 + 100]


def truncate_header(data):
    return data[: start_of("2.jpg", data) + 100]


def truncate_between(data):
    return data[: start_of("2.jpg", data)]


def point_backwards(data):
    """A pax header with a negative size, which may make the standard library read the same header forever."""
    record = b"15 size=-10240\n"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    at = start_of("2.jpg", data)
    return data[:at] + info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + data[at:]


@pytest.mark.parametrize("harm", [damage_header, truncate, truncate_header, truncate_between, point_backwards])
def test_damaged_tar_gives_the_members_before_the_damage(tmp_path, harm):
    shard = tmp_path / "b.tar"
    make_tar(shard, {f"{i}.jpg": PNG for i in range(4)}, format=tarfile.USTAR_FORMAT)
    shard.write_bytes(harm(shard.read_bytes()))
    (tmp_path / "c.jpg").write_bytes(PNG)
    names, [(photo, why)] = names_and_errors(tmp_path)
    cut = ["b.tar/2.jpg"] if harm is truncate else []
    assert names == ["b.tar/0.jpg", "b.tar/1.jpg", *cut, "c.jpg"]
    assert photo == "b.tar" and why.startswith("damaged tar") and "\n" not in why
    source = PhotoSource(tmp_path)
    assert source.read("b.tar/1.jpg") == PNG
    if cut:
        assert reason(source, "b.tar/2.jpg") == f"truncated: 100 of {len(PNG)} bytes"


@pytest.mark.parametrize("content", [b"", b"not a tar", JPEG * 20, bytes(range(256)) * 8])
def test_invalid_tar_is_reported(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    assert [photo for photo, _ in names_and_errors(tmp_path / "x.tar")[1]] == ["x.tar"]


def test_tar_that_is_not_a_regular_file_is_reported(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    (tmp_path / "y.tar").symlink_to("gone")
    names, errors = names_and_errors(tmp_path)
    assert names == [] and [photo for photo, _ in errors] == ["x.tar", "y.tar"]


def test_rewritten_tar_is_scanned_again(tmp_path):
    make_tar(tmp_path / "s.tar", {"a.jpg": PNG})
    source = PhotoSource(tmp_path / "s.tar")
    assert source.read("s.tar/a.jpg") == PNG
    make_tar(tmp_path / "s.tar", {"first.jpg": JPEG * 30, "a.jpg": JPEG})
    assert source.read("s.tar/a.jpg") == JPEG
    (tmp_path / "s.tar").unlink()
    assert reason(source, "s.tar/a.jpg") == "no such file"


def test_tar_indexes_are_cached_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "indexes", tars.TarIndexes(16))
    for i in range(40):
        make_tar(tmp_path / f"{i:02}.tar", {"a.jpg": PNG})
    source = PhotoSource(tmp_path)
    names = list(source)
    assert len(names) == 40
    for name in names:
        source.read(name)
    assert tars.indexes.members <= 16
    opened, open_tar = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: opened.append(1) or open_tar(*a, **k))
    for _ in range(3):
        source.read(names[0])
    assert len(opened) == 1  # scanned once, then looked up


def test_least_recently_used_tar_index_is_dropped_first(tmp_path):
    paths = [str(tmp_path / f"{name}.tar") for name in "abc"]
    for path in paths:
        make_tar(path, {"m.jpg": PNG})

    def use(indexes, *numbers):
        for number in numbers:
            assert list(indexes.local(paths[number], Path(paths[number]).stat()).members) == ["m.jpg"]
        return [paths.index(path) for path, _, _ in indexes.indexes]

    indexes = tars.TarIndexes(5)  # an index counts as its members and one more
    assert use(indexes, 0, 1, 0, 2) == [0, 2] and indexes.members == 4
    assert use(tars.TarIndexes(4), 0, 1) == [0, 1]  # exactly the limit
    assert use(tars.TarIndexes(1), 0) == [0]  # the last one stays
    assert use(tars.TarIndexes(1), 0, 1) == [1]


def test_sparse_members_are_errors(tmp_path):
    def sparse(info):
        info.pax_headers = {"GNU.sparse.map": "0,10", "GNU.sparse.size": "100"}

    make_tar(tmp_path / "s.tar", {"a.jpg": sparse, "b.jpg": PNG}, format=tarfile.PAX_FORMAT)
    source = PhotoSource(tmp_path / "s.tar")
    assert list(source) == ["s.tar/a.jpg", "s.tar/b.jpg"]
    assert "never followed" in reason(source, "s.tar/a.jpg") and source.read("s.tar/b.jpg") == PNG


def test_part_of_a_file_reads_like_a_file():
    part = photos._Part(io.BytesIO(b"before0123456789after"), 6, 10)
    assert part.readable() and part.seekable() and part.tell() == 0
    assert part.read(3) == b"012" and part.tell() == 3
    assert part.read() == b"3456789" and part.read(5) == b"" and part.tell() == 10
    assert part.seek(-4, os.SEEK_END) == 6 and part.read(2) == b"67"
    assert part.seek(-3, os.SEEK_CUR) == 5 and part.read(9) == b"56789"
    assert part.seek(2) == 2 and part.read(1) == b"2"
    assert part.seek(12) == 12 and part.read() == b""


def test_sources_are_thread_safe_and_can_be_pickled(tmp_path):
    values = [np.full((5, 7, 3), i, np.uint8) for i in range(40)]
    make_tar(tmp_path / "s.tar", {f"{i}.jpg": encoded(v) for i, v in enumerate(values)})
    source = pickle.loads(pickle.dumps(PhotoSource(tmp_path / "s.tar")))
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(source.decode, [f"s.tar/{i % 40}.jpg" for i in range(400)]))
    for i, photo in enumerate(got):
        assert (photo.pixels == i % 40).all()
    error = pickle.loads(pickle.dumps(PhotoError("a\nb", "why\nnot")))
    assert (error.photo, error.reason, str(error)) == ("a\nb", "why not", r"'a\nb': why not")


def test_decode_ahead_keeps_order_and_bounds_the_queue(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03}.png").write_bytes(b"" if i % 7 == 0 else encoded(np.full((3, 3, 3), i, np.uint8)))
    source, taken = PhotoSource(tmp_path), []
    results = decode_ahead(source, (taken.append(name) or name for name in source), source.decode)
    for i, (name, photo) in enumerate(results):
        assert name == f"{i:03}.png" and len(taken) <= i + 2 + 4 * (os.cpu_count() or 1)
        assert photo.reason == "empty file" if i % 7 == 0 else (photo.pixels == i).all()
    assert len(taken) == 200

    def broken(name):
        raise RuntimeError("internal error")

    with pytest.raises(RuntimeError):
        list(decode_ahead(source, ["001.png"], broken))


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(tmp_path, kind):
    data = encoded(scene(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decoded(tmp_path, data), scene())


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (41, 1), (17, 23)])
def test_unusual_sizes(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    np.testing.assert_array_equal(decoded(tmp_path, encoded(pixels)), pixels)


# How a photo with each orientation is shown, written with numpy and not with the tables under test.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def with_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path, kind, orientation):
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    got = decoded(tmp_path, encoded(scene(), kind, exif=with_orientation(orientation), **options))
    expected = SHOWN[orientation](scene())
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_size_is_that_of_the_decoded_photo(tmp_path, kind, orientation, upright):
    data = encoded(scene(), kind, exif=with_orientation(orientation))
    (tmp_path / "x.jpg").write_bytes(data)
    source = PhotoSource(tmp_path, upright=upright)
    assert source.size("x.jpg") == source.decode("x.jpg").pixels.shape[:2]
    assert source.decoding_cost("x.jpg") == len(data) + 24 * 40 * 16


MODES = {
    "1": ["PNG"], "L": ["PNG", "BMP"], "LA": ["PNG"], "P": ["PNG", "GIF"], "RGB": ["PNG", "TIFF"], "RGBA": ["PNG"],
    "CMYK": ["TIFF", "JPEG"], "YCbCr": ["TIFF"], "LAB": ["TIFF"], "I;16": ["PNG", "TIFF"], "I": ["TIFF"], "F": ["TIFF"],
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_way_in_gives_the_same_pixels(tmp_path, mode):
    rgb = Image.fromarray(scene())
    if mode in ("I;16", "I", "F"):
        dtype, factor = {"I;16": (np.uint16, 257), "I": (np.int32, -1000), "F": (np.float32, 1 / 255)}[mode]
        image = Image.fromarray((scene()[..., 0] * np.float64(factor)).astype(dtype))
    elif mode == "LAB":
        image = Image.fromarray(scene(), "RGB")
        image = Image.merge("LAB", image.split())
    else:
        image = rgb.convert("L").convert("LA") if mode == "LA" else rgb.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(scene()[..., 0]))
    for kind in MODES[mode]:
        data = encoded(image, kind)
        expected = decoded(tmp_path, data, "x.tif")
        np.testing.assert_array_equal(pixels_of(Image.open(io.BytesIO(data))), expected)
        array = np.asarray(Image.open(io.BytesIO(data)))
        if mode not in ("P", "CMYK", "YCbCr", "LAB"):  # whose arrays do not say what they are
            np.testing.assert_array_equal(pixels_of(array), expected)
    if mode == "RGB":
        assert pixels_of(scene()) is not None and np.array_equal(pixels_of(scene()), scene())
        np.testing.assert_array_equal(pixels_of(scene()[::-1, ::2]), scene()[::-1, ::2])


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV", "RGBX", "I;16B"])
def test_modes_without_a_file_format(mode):
    image = Image.fromarray(scene()[..., 0].astype(">u2")) if mode == "I;16B" else Image.fromarray(scene())
    if mode in ("La", "PA"):
        image = image.convert("L").convert("LA" if mode == "La" else "P")
    if mode not in ("I;16B",):
        image = (image.convert("RGBA") if mode == "RGBa" else image).convert(mode)
    pixels = pixels_of(image)
    assert pixels.shape == (24, 40, 3) and pixels.dtype == np.uint8


def test_invalid_arrays_raise_value_error():
    shapes = [(4, 4, 5), (4, 4, 0), (0, 4, 3), (4,), (1, 4, 4, 3), ()]
    for array in (*(np.zeros(shape, np.uint8) for shape in shapes), np.zeros((4, 4)), np.zeros((4, 4, 3))):
        with pytest.raises(ValueError, match="expected an image"):
            pixels_of(array)


def test_arrays_with_one_or_two_channels_are_gray():
    gray = scene()[..., :1]
    np.testing.assert_array_equal(pixels_of(gray), np.repeat(gray, 3, 2))
    opaque = np.dstack([gray, np.full_like(gray, 255)])
    np.testing.assert_array_equal(pixels_of(opaque), np.repeat(gray, 3, 2))


@pytest.mark.parametrize("orientation", [*range(10)])
def test_masks_are_turned_to_the_stored_orientation(tmp_path, orientation):
    (tmp_path / "x.jpg").write_bytes(encoded(scene(), "JPEG", exif=with_orientation(orientation)))
    stored = PhotoSource(tmp_path, upright=False).decode("x.jpg").pixels[..., 0]
    upright = PhotoSource(tmp_path).decode("x.jpg").pixels[..., 0]
    assert stored.shape == (24, 40)
    np.testing.assert_array_equal(as_stored(tmp_path / "x.jpg", upright), stored)
    (tmp_path / "x.jpg").write_bytes(b"text")
    with pytest.raises(PhotoError):
        as_stored(tmp_path / "x.jpg", upright)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientations_are_ignored(tmp_path, orientation):
    assert decoded(tmp_path, encoded(scene(), "PNG", exif=with_orientation(orientation))).shape == (24, 40, 3)


def test_photo_with_damaged_exif_is_decoded(tmp_path):
    exif = with_orientation(6)
    exif.get_ifd(0x8769)[0x9286] = "a comment that is long enough to be kept out of line"
    good = exif.tobytes()
    for kind in ("JPEG", "PNG", "WEBP"):
        for cut in (8, 11, 20, len(good) // 2):
            assert decoded(tmp_path, encoded(scene(), kind, exif=good[:cut])).size == scene().size
        rng = np.random.default_rng(0)
        for _ in range(40):
            bad = bytearray(good)
            for at in rng.integers(6, len(good), 5):
                bad[at] = rng.integers(256)
            assert decoded(tmp_path, encoded(scene(), kind, exif=bytes(bad))).size == scene().size
    assert decoded(tmp_path, raw_tiff((0x8769, 4, 1, 0x7FFFFFF0))).size == scene().size


def raw_tiff(*extra):
    """A big-endian 16-bit gray TIFF of WIDE; extra: more tags as (tag, type, count, value)."""
    tags = [(256, 40), (257, 24), (258, 16), (259, 1), (262, 1), (273, 256), (277, 1), (279, 1920)]
    entries = [(tag, 4, 1, value) for tag, value in tags] + list(extra)
    ifd = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    return (b"MM\0*" + struct.pack(">IH", 8, len(entries)) + ifd).ljust(256, b"\0") + WIDE.astype(">u2").tobytes()


GREY = scene()[..., 0]


def palette(transparency=None):
    image = Image.fromarray((np.arange(24 * 40).reshape(24, 40) % 3).astype(np.uint8), "L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([200, 10, 20, 30, 210, 40, 50, 60, 220])
    options = {} if transparency is None else {"transparency": transparency}
    colors = np.array([[200, 10, 20], [30, 210, 40], [50, 60, 220]], np.uint8)
    for index in range(3) if isinstance(transparency, bytes) else ():
        alpha = transparency[index] / 255
        colors[index] = np.rint(colors[index] * alpha + 255 * (1 - alpha))
    if isinstance(transparency, int):
        colors[transparency] = 255
    return image, options, colors[np.arange(24 * 40).reshape(24, 40) % 3]


@pytest.mark.parametrize(
    ("kind", "transparency"), [("PNG", None), ("PNG", 1), ("PNG", b"\x00\x80\xff"), ("GIF", None), ("GIF", 1)]
)
def test_palettes(tmp_path, kind, transparency):
    image, options, expected = palette(transparency)
    got = decoded(tmp_path, encoded(image, kind, **options))
    assert np.abs(got.astype(int) - expected).max() <= 1


def over_white(rgb, alpha):
    return np.rint(rgb * (alpha / 255.0) + 255 * (1 - alpha / 255.0))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_over_white(tmp_path, kind):
    alpha = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1))
    rgba = np.dstack([scene(), alpha])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = decoded(tmp_path, encoded(rgba, kind, **options))
    assert np.abs(got - over_white(scene(), alpha[..., None])).max() <= 1
    if kind != "WEBP":
        got = decoded(tmp_path, encoded(Image.fromarray(np.dstack([GREY, alpha])), kind))
        assert np.abs(got - over_white(GREY, alpha)[..., None]).max() <= 1


def test_transparent_color_keys(tmp_path):
    got = decoded(tmp_path, encoded(scene(), "PNG", transparency=(0, 0, 60)))
    assert (got[0, 0] == 255).all() and (got[1:] == scene()[1:]).all()
    got = decoded(tmp_path, encoded(GREY, "PNG", transparency=0))
    assert (got[:, 0] == 255).all() and (got[:, 1:] == GREY[:, 1:, None]).all()


def test_grayscale_and_bilevel(tmp_path):
    np.testing.assert_array_equal(decoded(tmp_path, encoded(GREY)), np.dstack([GREY] * 3))
    bits = GREY > 100
    np.testing.assert_array_equal(
        decoded(tmp_path, encoded(Image.fromarray(bits))), np.dstack([bits * np.uint8(255)] * 3)
    )
    got = decoded(tmp_path, encoded(GREY, "JPEG", quality=95)).astype(int)
    assert np.abs(got - GREY[..., None]).max() <= 8


WIDE = (np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16)  # 0 ... 65212


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [[0, 128, 255]]),
        (np.array([[0.5, 0.75, 1.0]], np.float32), [[128, 191, 255]]),
        (np.array([[0.0, 1.0, 2.0]], np.float32), [[0, 128, 255]]),
        (np.array([[256, 0x8000, 0xFFFF]], np.int32), [[1, 128, 255]]),
        (np.array([[256, 0x8000, 0x10000]], np.int32), [[0, 127, 255]]),
        (np.array([[0, 256, 0xFFFF]], np.int32), [[0, 1, 255]]),
        (np.array([[-1, 256, 0xFFFF]], np.int32), [[0, 1, 255]]),
        (np.array([[-100, 0, 155]], np.int32), [[0, 100, 255]]),
        (np.array([[np.inf, 0.5, -np.inf]], np.float32), [[0, 128, 0]]),
        (np.array([[-0.5, 0.0, 0.5]], np.float32), [[0, 128, 255]]),
        (np.array([[7, 7]], np.int32) - 10, [[0, 0]]),
    ],
)
def test_grayscale_up_to_1_or_16_bits_keeps_its_scale(values, expected):
    assert decoding._to_8_bits(values).tolist() == expected


def test_grayscale_with_many_rows_has_one_scale():
    values = np.arange(-100, 700, dtype=np.int32)[:, None]
    np.testing.assert_array_equal(decoding._to_8_bits(values), np.rint((values + 100) * (255 / 799)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grayscale_keeps_its_high_byte(tmp_path, kind):
    got = decoded(tmp_path, encoded(WIDE, kind, exif=with_orientation(6)))
    np.testing.assert_array_equal(got, np.dstack([np.rot90(WIDE >> 8, -1)] * 3))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (WIDE.astype(np.int32), WIDE >> 8),
        (WIDE.astype(np.int32) * 1000 - 10_000, WIDE / 65212 * 255),  # beyond 16 bits: stretched
        (WIDE.astype(np.float32) / 65212, WIDE / 65212 * 255),
        (WIDE.astype(np.float32) / 100 - 50, WIDE / 65212 * 255),
        (np.full((24, 40), 7e8, np.float32), np.zeros((24, 40))),
        (np.where(WIDE % 5 == 0, np.nan, 0.5).astype(np.float32), np.where(WIDE % 5 == 0, 0, 128)),
    ],
)
def test_grayscale_of_other_ranges(tmp_path, values, expected):
    got = decoded(tmp_path, encoded(values, "TIFF"))
    assert (got[..., 0] == got[..., 1]).all() and np.abs(got[..., 0] - expected).max() <= 0.5001


def test_big_endian_16_bit_tiff(tmp_path):
    np.testing.assert_array_equal(decoded(tmp_path, raw_tiff())[..., 0], WIDE >> 8)


def test_16_bit_color_png(tmp_path):
    wide = np.dstack([WIDE, WIDE[::-1], WIDE[:, ::-1]])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    np.testing.assert_array_equal(decoded(tmp_path, encoded_png(40, 24, 16, 2, rows)), wide >> 8)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(tmp_path, kind):
    image = Image.new("CMYK", (40, 24), (255, 0, 0, 0))  # cyan; Pillow writes JPEGs inverted, as Adobe does
    got = decoded(tmp_path, encoded(image, kind))
    assert np.abs(got.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_animations(tmp_path, kind):
    frames = [Image.new("RGB", (40, 24), color) for color in ("red", "blue", "green")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decoded(tmp_path, data).astype(int) - [255, 0, 0]).max() <= 3


# ---- malicious files -------------------------------------------------------------------------------------------------


def test_files_of_the_largest_size_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(photos, "MAX_BYTES", len(PNG))
    assert PhotoSource(tmp_path).read("a.png") == PNG
    monkeypatch.setattr(photos, "MAX_BYTES", len(PNG) - 1)
    with pytest.raises(PhotoError, match=f"{len(PNG)} bytes, more than the limit of {len(PNG) - 1}"):
        PhotoSource(tmp_path).read("a.png")


def test_a_photo_that_does_not_fit_into_memory_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(photos._Part, "read", fail)
    with pytest.raises(PhotoError, match="cannot be read: out of memory"):
        PhotoSource(tmp_path).read("a.png")


def test_files_that_are_not_photos_say_so(tmp_path):
    assert rejection(tmp_path, b"a\x7f" * 20).endswith("supported format: begins with bytes " + " ".join(["61 7f"] * 8))
    assert "begins with bytes 1f 1f" in rejection(tmp_path, b"\x1f" * 20)
    text = "~ a line of text with spaces that is longer than is shown"
    assert rejection(tmp_path, text.encode()) == f"not an image: text begins with {text[:40]!r}"
    assert rejection(tmp_path, b"") == "empty file"
    assert rejection(tmp_path, b"<html>\n<title>404") == r"not an image: text begins with '<html>\n<title>404'"
    assert "begins with bytes 00 00 00 20 66" in rejection(tmp_path, b"\0\0\0 ftypisom" + bytes(50))
    # Formats that Pillow could open, but that run interpreters or are not photos, are rejected.
    assert "not an image" in rejection(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "not an image" in rejection(tmp_path, encoded(scene(), "PPM"))


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"\xff\xd8", "JPEG"), (b"\x89PNG", "PNG"), (b"RIFF", "WebP"), (b"II*\0", "TIFF"), (b"GIF8", "GIF")],
)
def test_damaged_headers_are_told_from_other_formats(tmp_path, head, kind):
    why = rejection(tmp_path, head + b"\xfe" * 50)
    assert why == f"cannot be decoded: the header of this {kind} file is damaged"
    assert rejection(tmp_path, b"\xfe" + head + b"\xfe" * 50).startswith("not an image in a supported format: begins")


@pytest.mark.parametrize(
    "data", [b"", b"<html>" * 20, b"\0\0\0 ftypmif1" + bytes(50), encoded_png(0, 24, 8, 2, b"\0"), PNG[:30]]
)
def test_header_alone_gives_the_same_reason(tmp_path, data):
    why = rejection(tmp_path, data)
    for read_header in (PhotoSource(tmp_path).decoding_cost, PhotoSource(tmp_path).size):
        with pytest.raises(PhotoError) as caught:
            read_header("x.jpg")
        assert caught.value.reason == why


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_files_are_errors(tmp_path, kind):
    data = encoded(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8), kind)
    for share in (0.05, 0.3, 0.6, 0.9):
        why = rejection(tmp_path, data[: int(len(data) * share)])
        assert why.startswith(("truncated", "cannot be decoded"))
    if kind in ("PNG", "JPEG"):
        assert why.startswith("truncated")


def test_decompression_bombs_are_rejected_by_their_header(tmp_path):
    assert "3600000000 pixels" in rejection(tmp_path, encoded_png(60_000, 60_000, 8, 2, b""))
    assert rejection(tmp_path, encoded_png(13_000, 10_000, 8, 2, b"")) == "130 megapixels, more than the limit of 100"
    assert rejection(tmp_path, PNG, max_pixels=959) == "0.00096 megapixels, more than the limit of 0.000959"
    (tmp_path / "x.jpg").write_bytes(PNG)
    assert PhotoSource(tmp_path, max_pixels=960).decode("x.jpg").pixels.shape == (24, 40, 3)


def test_zero_sizes_are_errors(tmp_path):
    assert rejection(tmp_path, encoded_png(0, 24, 8, 2, b"\0")).startswith(("cannot be decoded", "truncated"))
    bmp = bytearray(encoded(scene(), "BMP"))
    bmp[18:22] = bytes(4)
    assert rejection(tmp_path, bytes(bmp))


def test_huge_files_are_rejected_unread(tmp_path):
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate((1 << 30) + 1)
    assert reason(PhotoSource(tmp_path), "x.jpg") == "1073741825 bytes, more than the limit of 1073741824"


def test_paths_that_are_not_regular_files(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "inside.jpg").write_bytes(PNG)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    source = PhotoSource(tmp_path)
    assert list(source) == ["device.jpg", "folder.jpg/inside.jpg", "pipe.jpg"]
    assert reason(source, "folder.jpg") == "a folder"
    assert reason(source, "device.jpg") == "not a regular file"
    watchdog = threading.Thread(target=lambda: reason(source, "pipe.jpg"), daemon=True)
    watchdog.start()
    watchdog.join(5)
    assert not watchdog.is_alive(), "reading a fifo hangs"
    assert reason(source, "pipe.jpg") == "not a regular file"
    with socket.socket(socket.AF_UNIX) as sock, tempfile.TemporaryDirectory() as short:  # a socket's path is short
        sock.bind(f"{short}/socket.jpg")
        assert reason(PhotoSource(short), "socket.jpg") == "not a regular file"


def test_missing_and_invalid_names(tmp_path):
    (tmp_path / "x.jpg").write_bytes(PNG)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "y.jpg").write_bytes(PNG)
    source = PhotoSource(tmp_path)
    names = list(source)
    shutil.rmtree(tmp_path / "d")
    (tmp_path / "x.jpg").unlink()
    assert [reason(source, name) for name in names] == ["no such file"] * 2
    for name in ("nul\0.jpg", "nul\0.tar/a.jpg", "lone\ud800.jpg", "n" * 5000 + ".jpg"):
        assert reason(source, name).startswith("cannot be read")


NOISY = """
import sys
from PIL import Image
from namedmask import process
from namedmask.photos import PhotoSource
process.prepare()
Image.MAX_IMAGE_PIXELS = 800  # Pillow warns of x.png, which has 960
for name in ("x.png", "y.tif"):
    print(PhotoSource(sys.argv[1]).decode(name).pixels.shape)
"""


def test_pillow_prints_nothing_in_a_command(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "y.tif").write_bytes(raw_tiff((305, 2, 30, 0x7FFFFFF0)))
    with pytest.warns(UserWarning), Image.open(tmp_path / "y.tif") as image:  # so Pillow does warn
        image.load()
    got = subprocess.run([sys.executable, "-c", NOISY, str(tmp_path)], capture_output=True, text=True, check=True)
    assert got.stdout == "(24, 40, 3)\n" * 2 and got.stderr == ""


def test_torch_is_not_imported():
    code = "import sys, namedmask.photos, namedmask.masks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SEEDS = [
    encoded(scene(), "JPEG", exif=with_orientation(6)),
    encoded(scene(), "JPEG", progressive=True),
    PNG,
    encoded(palette(1)[0], "PNG", transparency=1),
    encoded(WIDE, "PNG"),
    encoded(scene(), "GIF"),
    encoded(scene(), "WEBP", exif=with_orientation(3)),
    encoded(np.dstack([scene(), GREY]), "WEBP", lossless=True),
    encoded(scene(), "TIFF", exif=with_orientation(8)),
    encoded(scene(), "TIFF", compression="tiff_lzw"),
]


@settings(max_examples=400)
@given(st.data())
def test_damaged_files_give_a_photo_or_a_photo_error(tmp_path_factory, data):
    seed = bytearray(data.draw(st.sampled_from(SEEDS)))
    # Half of the damage is in the header, where it has the most effects.
    places = st.integers(0, len(seed) - 1) | st.integers(0, min(80, len(seed) - 1))
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        seed[at] = value
    end = data.draw(st.just(len(seed)) | st.integers(0, len(seed)))
    folder = tmp_path_factory.getbasetemp()
    (folder / "fuzz.jpg").write_bytes(seed[:end])
    try:
        photo = PhotoSource(folder).decode("fuzz.jpg")
    except PhotoError as error:
        assert error.photo == "fuzz.jpg" and error.reason and "\n" not in str(error)
    else:
        assert photo.pixels.ndim == 3 and photo.pixels.shape[2] == 3 and photo.pixels.size
