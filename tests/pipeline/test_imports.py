# SPDX-License-Identifier: MIT
"""`namedmask import`: archives, masks, experts and embeddings in the forms in which others write them."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from safetensors.numpy import load_file, save_file

from namedmask.archive import read_archive
from namedmask.backbones import untrained, untrained_encoder
from namedmask.imports import category_of, masks, match_photos
from namedmask.imports.embeddings import import_embeddings
from namedmask.imports.masks import decode_rle
from namedmask.index import PrecomputedEmbeddings
from namedmask.masks import ErrorRecord, read_errors, read_masks
from namedmask.photos import PhotoError, PhotoSource
from namedmask.record import read_config, read_record
from namedmask.segmenter.deeplab import DeepLab
from small_world import ENCODER, command, draw_photo, files_of

THEIRS = "/scratch/shared/ILSVRC2012/train"  # where the photos were on another machine


def succeed(*words) -> str:
    done = command(*words)
    assert done.exit_code == 0, done.output
    return done.output


def fail(*words) -> str:
    """The one line of a command that must fail as a mistake of the user."""
    done = command(*words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
    return done.stderr


def write_json(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two photos of each category in class folders with names of WordNet, and one with a name that is not ASCII."""
    root = tmp_path_factory.mktemp("imports") / "photos"
    for folder, category in (("n01", "cat"), ("n02", "dog")):
        (root / folder).mkdir(parents=True)
        for number in range(2):
            draw_photo(number, category, (40 + number, 30)).save(root / folder / f"{folder}_{number}.JPEG")
    draw_photo(2, "cat", (40, 30)).save(root / "n01" / "Käse.JPEG")
    return root


AUTHORS = {
    "dog": [f"{THEIRS}/n02/n02_1.JPEG", f"{THEIRS}/n02/n02_0.JPEG"],
    "cat": [f"{THEIRS}/n01/n01_0.JPEG", f"{THEIRS}/n01/Käse.JPEG", f"{THEIRS}/n01/n01_1.JPEG"],
}


def entries(out: Path) -> dict[str, list]:
    return {
        name: [tuple(entry) for entry in found] for name, found in read_archive(out / "archive.json").photos.items()
    }


# -- archives --------------------------------------------------------------------------------------------------------


def test_authors_archive_becomes_a_run(photos, tmp_path, detector_options):
    file, out = write_json(tmp_path / "voc2012_category_to_p_images_n500.json", AUTHORS), tmp_path / "run"
    assert "5 photos of 2 categories" in succeed("import", "archive", file, "--photos", photos, "--out", out)
    archive = read_archive(out / "archive.json")
    assert archive.categories == ["dog", "cat"]
    assert [entry.photo for entry in archive.photos["cat"]] == ["n01/n01_0.JPEG", "n01/Käse.JPEG", "n01/n01_1.JPEG"]
    assert read_record(out).stages["archive"].made_with["imported"] == str(file)
    assert "imported" in (out / "run.toml").read_text()
    succeed("pseudolabel", out, *detector_options)
    assert len(list(read_masks(out / "masks"))) == 5
    succeed("run", "--out", out)  # neither an index nor a CLIP model is needed
    assert (out / "report.html").exists()


def test_categories_choose_and_order(photos, tmp_path):
    file = write_json(tmp_path / "archive.json", AUTHORS)
    output = succeed("import", "archive", file, "--photos", photos, "--out", tmp_path / "a", "--categories", "cat")
    assert list(entries(tmp_path / "a")) == ["cat"] and "'dog'" in output
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    succeed("import", "archive", file, "--photos", photos, "--out", tmp_path / "b", "--categories-file", names)
    assert list(entries(tmp_path / "b")) == ["cat", "dog"]
    message = fail("import", "archive", file, "--photos", photos, "--out", tmp_path / "c", "--categories", "cow")
    assert "no photos of 'cow'" in message and not (tmp_path / "c").exists()


LISTS = {
    "a.csv": "name,photo,score\ncat,n01/n01_0.JPEG,0.25\ncat,n01/n01_1.JPEG,0.5\n",
    "b.csv": "\ufeffPhoto,Category,Score\r\nn01_0.JPEG,cat,0.25\r\nn01_1.JPEG,cat,0.5\r\n",
    "c.json": json.dumps([{"name": "cat", "photo": f"n01/n01_{n}.JPEG", "score": s} for n, s in ((0, 0.25), (1, 0.5))]),
    "d.json": json.dumps([{"category": "cat", "photo": f"n01_{n}.JPEG", "score": s} for n, s in ((1, 0.5), (0, 0.25))]),
    "e.json": json.dumps(
        {
            "categories": ["cat"],
            "photos": {"cat": [{"photo": f"n01/n01_{n}.JPEG", "score": n / 4 + 0.25} for n in (0, 1)]},
        }
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_ones_own(name, photos, tmp_path):
    (tmp_path / name).write_text(LISTS[name], encoding="utf-8")
    succeed("import", "archive", tmp_path / name, "--photos", photos, "--out", tmp_path / "run")
    assert entries(tmp_path / "run") == {"cat": [("n01/n01_1.JPEG", 0.5), ("n01/n01_0.JPEG", 0.25)]}


def test_csv_without_scores_keeps_its_order_and_photos_may_repeat(photos, tmp_path):
    (tmp_path / "a.csv").write_text(
        "name,photo\ncat,n01_1.JPEG\ndog,n01_1.JPEG\n,\ncat,n01_0.JPEG\ncat,./n01/n01_1.JPEG\n,\n"
    )
    succeed("import", "archive", tmp_path / "a.csv", "--photos", photos, "--out", tmp_path / "run")
    assert entries(tmp_path / "run") == {
        "cat": [("n01/n01_1.JPEG", None), ("n01/n01_0.JPEG", None)],
        "dog": [("n01/n01_1.JPEG", None)],
    }


def test_photos_that_are_not_found_are_listed(photos, tmp_path):
    file = write_json(tmp_path / "a.json", {**AUTHORS, "cat": [*AUTHORS["cat"], f"{THEIRS}/n09/x.JPEG"]})
    output = succeed("import", "archive", file, "--photos", photos, "--out", tmp_path / "run")
    assert "1 of 6 photos not found: " in output
    (error,) = read_errors(tmp_path / "run" / "errors.jsonl")
    assert error == ErrorRecord(f"{THEIRS}/n09/x.JPEG", "archive", "there is no such photo")
    write_json(file, {**AUTHORS, "cow": [f"{THEIRS}/n09/x.JPEG"]})
    message = fail("import", "archive", file, "--photos", photos, "--out", tmp_path / "new")
    assert "'cow'" in message and "x.JPEG" in message and not (tmp_path / "new").exists()


def test_paths_match_the_photos_with_the_longest_common_end():
    names = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "3.jpg", "deep/b/4.jpg", "deep/c/4.jpg"]
    paths = {
        "/x/a/1.jpg": "a/1.jpg",
        "b//./1.jpg": "b/1.jpg",
        "1.jpg": None,  # several
        "c/1.jpg": None,  # in another folder
        "2.jpg": "b/2.jpg",
        "/x/y/3.jpg": "3.jpg",
        "b/4.jpg": "deep/b/4.jpg",
        "/train/deep/c/4.jpg": "deep/c/4.jpg",
        "": None,
    }
    matched, reasons = match_photos(paths.keys(), names, "/data/train")
    assert matched == {path: name for path, name in paths.items() if name}
    assert reasons.keys() == paths.keys() - matched.keys()
    _, reasons = match_photos(["b\\2.jpg", "C:\\x/2.jpg"], names)
    assert [reason.endswith("; write / in place of \\") for reason in reasons.values()] == [True, False]
    # Of two folders that look alike the one with the name of the photos' folder is meant; of two others none.
    assert match_photos(["/x/train/a/1.jpg", "/x/val/a/1.jpg"], names, "/data/train")[0].keys() == {"/x/train/a/1.jpg"}
    assert not match_photos(["/x/test/a/1.jpg", "/x/val/a/1.jpg"], names, "/data/train")[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "Expecting value"),
        ("a.json", "[" * 100_000, "nested"),
        ("a.json", "[]", "lists no photos"),
        ("a.json", '{"cat": []}', "lists no photos"),
        (
            "a.json",
            '{"cat": [], "dog": ["n01_0.JPEG"]}',
            "no photos of 'cat'; pass --categories, such as 'dog'",
        ),
        ("a.json", '{"cat": "n01_0.JPEG"}', "expected {category"),
        ("a.json", '{"cat": [7]}', "category 'cat', entry 0"),
        ("a.json", '{"cat": [["n01_0.JPEG"]]}', "category 'cat', entry 0"),
        ("a.json", '{"cat": ["n01_0.JPEG"], "cat": ["n01_1.JPEG"]}', "'cat' occurs twice"),
        ("a.json", '{"cat": ["n01_0.JPEG"], "Cat": ["n01_1.JPEG"]}', "differ only in case"),
        ("a.json", '{"background": ["n01_0.JPEG"]}', "name of class 0"),
        ("a.json", '[{"name": "cat", "photo": "n01_0.JPEG", "score": NaN}]', "NaN"),
        ("a.json", '[{"name": "cat", "photo": "n01_0.JPEG", "score": 1e999}]', "finite score"),
        ("a.json", '[{"name": "cat", "photo": "n01_0.JPEG", "score": 1%s}]' % ("0" * 400), "finite score"),
        ("a.json", '[{"name": "cat"}]', "entry 0"),
        ("a.csv", "", "expected a header"),
        ("a.csv", "a,b\n1,2\n", "expected a header"),
        ("a.csv", "name,photo,score\ncat,n01_0.JPEG,nan\n", "line 2"),
        ("a.csv", "name,photo\ncat,n01,_0.JPEG\n", "more cells"),
        ("a.csv", "name,photo\ncat\n", "line 2"),
        ("a.csv", "name,photo,Photo \ncat,n01_0.JPEG,n01_1.JPEG\n", "the header has the column 'photo' twice"),
        ("a.csv", "name,photo\n", "lists no photos"),
    ],
)
def test_damaged_lists_are_one_line(name, content, message, photos, tmp_path):
    (tmp_path / name).write_text(content)
    error = fail("import", "archive", tmp_path / name, "--photos", photos, "--out", tmp_path / "run")
    assert message in error and name in error
    assert not (tmp_path / "run").exists()


def test_missing_files_are_named(photos, tmp_path):
    assert "no such file" in fail(
        "import", "archive", tmp_path / "a.json", "--photos", photos, "--out", tmp_path / "run"
    )
    file = write_json(tmp_path / "a.json", AUTHORS)
    assert "does not exist" in fail("import", "archive", file, "--photos", tmp_path / "none", "--out", tmp_path / "run")
    (tmp_path / "b.csv").write_bytes(b"name,photo\n\xff\xfe,\x00\n")
    assert "b.csv" in fail("import", "archive", tmp_path / "b.csv", "--photos", photos, "--out", tmp_path / "run")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".pkl"])
@pytest.mark.parametrize("kind", ["archive", "masks", "experts", "embeddings"])
def test_a_pipe_in_place_of_a_file_does_not_hang(kind, suffix, photos, tmp_path, request):
    os.mkfifo(pipe := tmp_path / f"pipe{suffix}")
    out = tmp_path / "e.safetensors"
    if kind != "embeddings":
        out = request.getfixturevalue("labeled" if kind == "experts" else "run")
    options = ["--photos", photos] if kind == "archive" else ["--allow-pickle"] if kind == "embeddings" else []
    assert f"pipe{suffix}" in fail("import", kind, pipe, "--out", out, *options)


def test_results_are_replaced_with_overwrite_alone(photos, tmp_path):
    file, out = write_json(tmp_path / "a.json", AUTHORS), tmp_path / "run"
    words = ["import", "archive", file, "--photos", photos, "--out", out]
    succeed(*words)
    (out / "notes.txt").write_text("mine")
    before = files_of(out)
    assert "--overwrite" in fail(*words)
    assert "were imported from" in fail("archive", out, "--photos-per-category", 3)
    write_json(file, {"cat": ["n09/x.JPEG"]})
    fail(*words, "--overwrite")
    assert files_of(out) == before
    write_json(file, {"cat": AUTHORS["cat"]})
    succeed(*words, "--overwrite")
    assert list(entries(out)) == ["cat"] and (out / "notes.txt").exists() and not (out / ".replaced").exists()
    write_json(file, {"cat": ["0.jpg"]})
    (tmp_path / "others").mkdir()
    draw_photo(0, "cat").save(tmp_path / "others" / "0.jpg")
    succeed("import", "archive", file, "--photos", tmp_path / "others", "--out", out, "--overwrite")
    assert entries(out) == {"cat": [("0.jpg", None)]}


def test_files_are_named_for_categories():
    categories = ["tv/monitor", "dining table", "t-shirt", "tshirt", "Käse", "+", "-"]
    expected = {
        "tv_monitor": "tv/monitor", "tv%2Fmonitor": "tv/monitor", "Dining Table": "dining table", "tshirt": "tshirt",
        "T-Shirt": None, "Ka\u0308se": "Käse", "+": "+", "~": None, "dog": None,
    }  # fmt: skip
    assert {name: category_of(name, categories) for name in expected} == expected
    assert category_of("หมี", ["หมู"]) is None and category_of("หมู", ["หมี", "หมู "]) == "หมู "  # bear and pig


# -- masks -----------------------------------------------------------------------------------------------------------


def rle(mask: np.ndarray, compressed: bool = True) -> dict:
    """A mask as pycocotools writes it, or with its run lengths as a list."""
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    if compressed:
        return {"size": list(mask.shape), "counts": encoded["counts"].decode()}
    values = np.concatenate([[0], mask.T.ravel(), [2]])
    starts = np.flatnonzero(np.diff(values))
    runs = np.diff(np.concatenate([[0], starts]))
    return {"size": list(mask.shape), "counts": [int(run) for run in runs]}


def mask_of(path: Path, shift: int = 0) -> np.ndarray:
    width, height = Image.open(path).size
    mask = np.zeros((height, width), bool)
    mask[5 + shift : 20, 10:25] = True
    return mask


@pytest.fixture
def run(photos, tmp_path) -> Path:
    out = tmp_path / "run"
    succeed("import", "archive", write_json(tmp_path / "a.json", AUTHORS), "--photos", photos, "--out", out)
    return out


def masks_in(out: Path) -> dict[tuple[str, str], np.ndarray]:
    return {(record.photo, record.category): record.mask() for record in read_masks(out / "masks")}


@pytest.mark.parametrize("layout", ["folder", "nested folder", "file", "folders of categories"])
@pytest.mark.parametrize("compressed", [True, False])
def test_masks_in_every_layout(layout, compressed, photos, run, tmp_path):
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.JPEG"))
    given = {name: rle(mask_of(photos / name), compressed) for name in names}
    source = tmp_path / "masks"
    if layout == "file":
        source = write_json(tmp_path / "swav_mocov2_dino_p16_k234.json", given)
    for name, value in given.items():
        stem, category = Path(name).stem, {"n01": "CAT", "n02": "dog"}[name[:3]]
        path = {"folder": stem, "nested folder": f"x/{name[:3]}/{stem}", "folders of categories": f"{category}/{stem}"}
        if layout != "file":
            write_json(source / f"{path[layout]}.json", value)
    assert "5 masks" in succeed("import", "masks", source, "--out", run)
    masks = masks_in(run)
    assert masks.keys() == {(name, {"n01": "cat", "n02": "dog"}[name[:3]]) for name in names}
    assert all(np.array_equal(mask, mask_of(photos / name)) for (name, _), mask in masks.items())
    record = next(read_masks(run / "masks"))
    assert record.area == 15 * 15 and record.bbox == (10, 5, 15, 15) and 0 < record.score <= 1
    assert read_record(run).stages["pseudolabel"].made_with["imported"] == str(source)


def test_a_photo_of_two_categories_has_a_mask_per_folder(photos, tmp_path):
    archive = {"cat": ["n01/n01_0.JPEG"], "dining table": ["n01/n01_0.JPEG"], "dog": ["n01/n01_0.JPEG"]}
    out = tmp_path / "run"
    succeed("import", "archive", write_json(tmp_path / "a.json", archive), "--photos", photos, "--out", out)
    path = photos / "n01/n01_0.JPEG"
    write_json(tmp_path / "m/n01_0.json", rle(mask_of(path)))
    write_json(tmp_path / "m/dining_table/n01_0.json", rle(mask_of(path, 3)))
    succeed("import", "masks", tmp_path / "m", "--out", out)
    masks = {category: mask for (_, category), mask in masks_in(out).items()}
    assert np.array_equal(masks["cat"], mask_of(path)) and np.array_equal(masks["dog"], mask_of(path))
    assert np.array_equal(masks["dining table"], mask_of(path, 3))


def test_masks_are_found_as_photos_are(photos, run, tmp_path, close_folder):
    for path in photos.rglob("*.JPEG"):
        write_json(tmp_path / "elsewhere" / path.parent.name / f"{path.stem}.json", rle(mask_of(path)))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "m")
    (tmp_path / "elsewhere" / "n01" / "._n01_0.json").write_bytes(b"a resource fork of macOS")
    output = succeed("import", "masks", tmp_path / "m", "--out", run)
    assert "5 masks in" in output and "not used" not in output
    before = files_of(run)
    close_folder(tmp_path / "m" / "link")
    message = fail("import", "masks", tmp_path / "m", "--out", run, "--overwrite")
    assert f"{tmp_path / 'm' / 'link'}: the folder cannot be listed: Permission denied" in message
    assert files_of(run) == before


def test_a_mask_of_all_categories_may_be_unused(photos, run, tmp_path):
    for name in ("n01_0", "cat/n01_0"):
        write_json(tmp_path / "m" / f"{name}.json", rle(mask_of(photos / "n01/n01_0.JPEG")))
    output = succeed("import", "masks", tmp_path / "m", "--out", run)
    assert f"masks that are not used: 1 of 2, such as {tmp_path / 'm/n01_0.json'}: another mask of its photo" in output


def test_imported_masks_train_and_are_not_mixed_with_others(photos, run, tmp_path, detector_options):
    for path in photos.rglob("*.JPEG"):
        write_json(tmp_path / "m" / f"{path.stem}.json", rle(mask_of(path)))
    succeed("import", "masks", tmp_path / "m", "--out", run)
    before = files_of(run)
    for words in (["pseudolabel", run], ["pseudolabel", run, *detector_options], ["run", "--out", run]):
        assert "were imported from" in fail(*words)
    assert "--overwrite" in fail("import", "masks", tmp_path / "m", "--out", run)
    assert files_of(run) == before
    training = ["--encoder", ENCODER, "--encoder-weights", encoder_weights(tmp_path), "--head-channels", 16]
    training += ["--crop-size", 16, "--batch-size", 2, "--steps", 1]
    succeed("train", run, *training)
    assert (run / "segmenter" / "model.safetensors").exists()
    succeed("report", run)
    succeed("pseudolabel", run, *detector_options, "--overwrite")
    assert "imported" not in read_record(run).stages["pseudolabel"].made_with
    assert not (run / "segmenter").exists()


def test_a_failure_restores_what_was_to_be_replaced(photos, run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for path in photos.rglob("*.JPEG"):
        write_json(tmp_path / "m" / f"{path.stem}.json", rle(mask_of(path)))
    words = ["import", "masks", tmp_path / "m", "--out", run]
    with monkeypatch.context() as patch:
        patch.setattr("namedmask.imports.masks.write_shard", full)
        assert "No space" in fail(*words)
    assert not (run / "masks").exists()
    succeed(*words)
    before = {name: data for name, data in files_of(run).items() if name.startswith("masks")}
    monkeypatch.setattr("namedmask.imports.masks.write_shard", full)
    assert "No space" in fail(*words, "--overwrite")
    assert before == {name: data for name, data in files_of(run).items() if name.startswith(("masks", ".replaced"))}


def encoder_weights(folder: Path) -> Path:
    torch.save(DeepLab(untrained_encoder(ENCODER), 2, 16).backbone.state_dict(), folder / "encoder.pth")
    return folder / "encoder.pth"


def test_masks_without_an_archive_start_a_run_of_one_category(photos, tmp_path):
    names = ["n01/n01_0.JPEG", "n02/n02_1.JPEG"]
    file = write_json(tmp_path / "duts.json", {name: rle(mask_of(photos / name)) for name in names})
    assert "--photos" in fail("import", "masks", file, "--out", tmp_path / "run")
    succeed("import", "masks", file, "--photos", photos, "--out", tmp_path / "run")
    assert list(masks_in(tmp_path / "run")) == [(name, "object") for name in names]
    assert {"archive", "pseudolabel"} <= read_record(tmp_path / "run").stages.keys()
    torch.save(untrained("test_vit").state_dict(), tmp_path / "vit.pth")
    training = ["--backbone", "test_vit", "--backbone-weights", tmp_path / "vit.pth", "--num-queries", 2]
    training += ["--decoder-layers", 1, "--crop-size", 32, "--batch-size", 2, "--steps", 1]
    succeed("train-saliency", tmp_path / "run", *training)
    assert (tmp_path / "run" / "saliency" / "model.safetensors").exists()


def new_run(masks: list[str], photos: list[str], folder: Path) -> tuple[dict[str, list[str]], str]:
    """The categories of the masks of a new run, in order, with the photos that have one, and the output."""
    for number, name in enumerate(photos):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        draw_photo(number, "cat", (40, 30)).save(folder / "photos" / name)
    for number, name in enumerate(masks):
        write_json(folder / "masks" / f"{name}.json", {"size": [30, 40], "counts": [number, 100, 1100 - number]})
    output = succeed("import", "masks", folder / "masks", "--photos", folder / "photos", "--out", folder / "run")
    for (name, category), mask in masks_in(folder / "run").items():
        key = masks[int(np.flatnonzero(mask.T.ravel())[0])]
        assert key.rpartition("/")[2] == Path(name).stem and category in (key.partition("/")[0], "object")
    archive = read_archive(folder / "run" / "archive.json")
    assert list(archive.photos) == archive.categories == read_config(folder / "run").categories
    listed = {category: [entry.photo for entry in entries] for category, entries in archive.photos.items()}
    assert masks_in(folder / "run").keys() == {(name, category) for category in listed for name in listed[category]}
    return listed, output


FLAT = ["1.jpg", "2.jpg", "3.jpg"]
DEEP = ["a/1.jpg", "b/1.jpg"]
IN_FOLDERS = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"]


@pytest.mark.parametrize(
    ("photos", "masks", "expected"),
    [
        (FLAT, ["dog/2", "Cat/1"], {"Cat": ["1.jpg"], "dog": ["2.jpg"]}),
        (IN_FOLDERS, ["cat/1", "cat/2", "dog/1"], {"cat": ["cat/1.jpg", "cat/2.jpg"], "dog": ["dog/1.jpg"]}),
        (FLAT, ["cat/1", "dog/1", "dog/2"], {"cat": ["1.jpg"], "dog": ["1.jpg", "2.jpg"]}),
        (DEEP, ["cat/a/1", "dog/a/1", "dog/b/1"], {"cat": ["a/1.jpg"], "dog": ["a/1.jpg", "b/1.jpg"]}),
        (FLAT, ["cat/1", "2"], {"object": ["1.jpg", "2.jpg"]}),
        (["00/1.jpg", "01/1.jpg"], ["00/1", "01/1"], {"object": ["00/1.jpg", "01/1.jpg"]}),
    ],
)
def test_class_folders_of_masks_are_the_categories_of_a_new_run(photos, masks, expected, tmp_path):
    listed, output = new_run(masks, photos, tmp_path)
    assert listed == expected and "not used" not in output
    assert f"categories of the new run: {str(list(expected))[1:-1]}" in output
    assert ("2.json is in no class folder: all masks get the category 'object'" in output) == ("2" in masks)


@pytest.mark.parametrize(
    ("photos", "masks", "expected", "reason"),
    [
        (["dog/1.jpg"], ["cat/1", "dog/1"], {"dog": ["dog/1.jpg"]}, "cat/1.json: there is no such photo"),
        (["cat/1.jpg"], ["cat/1", "dog/7"], {"cat": ["cat/1.jpg"]}, "dog/7.json: there is no such photo"),
        (DEEP, ["a/1", "b/1", "1"], {"object": DEEP}, "1.json: several photos match: 'a/1', 'b/1'"),
        (["1.jpg", "1.png", "2.jpg"], ["2", "1"], {"object": ["2.jpg"]}, "1.json: several photos or masks have"),
    ],
)
def test_masks_that_a_new_run_does_not_use_are_named(photos, masks, expected, reason, tmp_path):
    listed, output = new_run(masks, photos, tmp_path)
    assert listed == expected
    assert f"masks that are not used: 1 of {len(masks)}, such as {tmp_path / 'masks' / reason}" in output


def test_a_new_run_without_a_usable_mask_is_an_error(tmp_path):
    (tmp_path / "photos").mkdir()
    draw_photo(0, "cat", (40, 30)).save(tmp_path / "photos/1.jpg")
    write_json(tmp_path / "m/cat/2.json", {"size": [30, 40], "counts": [1200]})
    words = ["import", "masks", tmp_path / "m", "--photos", tmp_path / "photos", "--out", tmp_path / "run"]
    assert f"such as {tmp_path / 'm/cat/2.json'}: there is no such photo" in fail(*words)
    assert not (tmp_path / "run").exists()


DAMAGED = {
    "no object": [],
    "no counts": {"size": [30, 40]},
    "text": {"size": "30x40", "counts": "0"},
    "other size": {"size": [31, 40], "counts": [1240]},
    "turned": {"size": [40, 30], "counts": [1200]},
    "huge": {"size": [10**9, 10**9], "counts": [10**18]},
    "huge run": {"size": [30, 40], "counts": [10**30]},
    "negative": {"size": [30, 40], "counts": [1300, -100]},
    "short": {"size": [30, 40], "counts": [1199]},
    "empty": {"size": [30, 40], "counts": []},
    "not a string of COCO": {"size": [30, 40], "counts": "\u00ff\u0000"},
    "cut off": {"size": [30, 40], "counts": "oooooooooooo"},
    "float": {"size": [30.0, 40.0], "counts": [1200]},
    "bool": {"size": [30, 40], "counts": [True, 1199]},
}


def test_run_lengths_may_be_0_and_cover_the_photo():
    whole, left = {"size": [2, 3], "counts": [0, 6]}, {"size": [2, 3], "counts": [0, 2, 4, 0]}
    assert decode_rle(whole, (2, 3)).all() and decode_rle(left, (2, 3)).tolist() == [[True, False, False]] * 2
    assert not decode_rle({"size": [2, 3], "counts": [6]}, (2, 3)).any()
    with pytest.raises(ValueError, match=r"the upright photo \[2, 3\] \(height, width\)$"):
        decode_rle({"size": [2, 4], "counts": [8]}, (2, 3))
    with pytest.raises(ValueError, match="made of the photo without its EXIF orientation"):
        decode_rle({"size": [3, 2], "counts": [6]}, (2, 3))


def test_names_without_letters_match_no_category():
    assert category_of("!", ["?", "a"]) is None and category_of("A", ["?", "a"]) == "a"
    assert category_of("b.", ["b", "B"]) is None and category_of("b", ["b", "B"]) == "b"


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_masks_raise_value_error(damage):
    with pytest.raises(ValueError, match=r"expected|upright"):
        decode_rle(DAMAGED[damage], (30, 40))


def test_damaged_masks_are_listed_with_their_files(photos, run, tmp_path):
    write_json(tmp_path / "m/n01_0.json", rle(mask_of(photos / "n01/n01_0.JPEG")))
    write_json(tmp_path / "m/n01_1.json", DAMAGED["turned"])
    (tmp_path / "m/n02_0.json").write_text('{"size": [30')
    write_json(tmp_path / "m/n09_9.json", DAMAGED["short"])
    output = succeed("import", "masks", tmp_path / "m", "--out", run)
    assert "photos without a mask: 4 of 5; see" in output
    assert f"masks that are not used: 1 of 4, such as {tmp_path / 'm/n09_9.json'}: there is no such photo" in output
    reasons = {error.photo: error.reason for error in read_errors(run / "errors.jsonl")}
    assert set(reasons) == {"n01/n01_1.JPEG", "n01/Käse.JPEG", "n02/n02_0.JPEG", "n02/n02_1.JPEG"}
    assert "n01_1.json" in reasons["n01/n01_1.JPEG"] and "[40, 30]" in reasons["n01/n01_1.JPEG"]
    assert "n02_0.json" in reasons["n02/n02_0.JPEG"] and "has no mask" in reasons["n02/n02_1.JPEG"]


def test_masks_of_some_of_the_categories_of_a_photo(photos, tmp_path):
    paths = ["n01/n01_0.JPEG", "n01/n01_1.JPEG"]
    archive = write_json(tmp_path / "archive.json", {"cat": paths, "dog": paths})
    succeed("import", "archive", archive, "--photos", photos, "--out", tmp_path / "both")
    for name in ("cat/n01_0", "cat/n01_1", "dog/n01_1"):
        write_json(tmp_path / "m" / f"{name}.json", rle(mask_of(photos / "n01" / f"{name[4:]}.JPEG")))
    output = succeed("import", "masks", tmp_path / "m", "--out", tmp_path / "both")
    assert "photos with masks of some of their categories only: 1; see" in " ".join(output.split())
    assert set(masks_in(tmp_path / "both")) == {(paths[0], "cat"), (paths[1], "cat"), (paths[1], "dog")}
    assert [error.photo for error in read_errors(tmp_path / "both" / "errors.jsonl")] == [paths[0]]


def test_sizes_are_those_of_the_upright_photo(tmp_path):
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_photo(0, "cat", (40, 30)).save(tmp_path / "photos/cat.jpg", exif=exif)
    turned = np.zeros((40, 30), bool)
    turned[:20] = True
    file = write_json(tmp_path / "m.json", {"cat": rle(turned.T)})
    words = ["import", "masks", file, "--photos", tmp_path / "photos", "--out", tmp_path / "run"]
    assert "EXIF" in fail(*words) and not (tmp_path / "run").exists()
    write_json(file, {"cat": rle(turned)})
    succeed(*words)
    assert np.array_equal(masks_in(tmp_path / "run")["cat.jpg", "object"], turned)


@pytest.mark.parametrize("content", ["{}", "[]", "7", '{"size": [30, 40], "counts": [1200]}', "{", '{"n01_0": 1}'])
def test_files_without_masks_are_named(content, run, tmp_path):
    before = files_of(run)
    (tmp_path / "m.json").write_text(content)
    assert "m.json" in fail("import", "masks", tmp_path / "m.json", "--out", run)
    (tmp_path / "empty").mkdir()
    assert "holds no masks" in fail("import", "masks", tmp_path / "empty", "--out", run)
    assert files_of(run) == before


def test_several_masks_of_a_photo_are_named(run, photos, tmp_path):
    for name in ("n01/n01_0", "n01_0"):
        write_json(tmp_path / "m" / f"{name}.json", rle(mask_of(photos / "n01/n01_0.JPEG")))
    assert "several masks of 'n01/n01_0.JPEG'" in fail("import", "masks", tmp_path / "m", "--out", run)


# -- experts ---------------------------------------------------------------------------------------------------------


def write_expert(path: Path, channels: int = 16, classes: int = 2, object_bias: float = 5.0) -> Path:
    """An expert that predicts the object everywhere, or nowhere if the bias is negative."""
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(ENCODER), classes, channels).eval()
    last = network.classifier.classifier[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([0.0, object_bias, *[0.0] * (classes - 2)])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {f"module.{key}": value for key, value in network.state_dict().items()}}, path,
               _use_new_zipfile_serialization=False)  # fmt: skip
    return path


@pytest.fixture
def labeled(run, photos, tmp_path) -> Path:
    """A run whose masks of dogs are all empty."""
    for path in photos.rglob("*.JPEG"):
        mask = mask_of(path)
        write_json(tmp_path / "m" / f"{path.stem}.json", rle(mask if path.name[1:3] != "02" else mask & False))
    succeed("import", "masks", tmp_path / "m", "--out", run)
    return run


def test_imported_experts_relabel_without_training(labeled, tmp_path):
    write_expert(tmp_path / "e/expert_cat.pt")
    write_expert(tmp_path / "e/expert_Dog.pth", object_bias=-5)
    write_expert(tmp_path / "e/expert_cow.pt")
    words = ["import", "experts", tmp_path / "e", "--out", labeled, "--encoder", ENCODER]
    output = succeed(*words)
    assert "2 networks" in output and "'expert_cow.pt'" in output
    assert "--overwrite" in fail(*words)
    for option in (["--steps", 7], ["--encoder", "resnet18"], ["--allow-empty"], ["--mode", "shared"]):
        assert "were imported from" in fail("experts", labeled, *option)
    succeed("experts", labeled)  # although dogs have no usable mask, and DINO's weights are not at hand
    areas = {(r.photo, r.category): r.area / (r.size[0] * r.size[1]) for r in read_masks(labeled / "refined")}
    assert {area for (_, category), area in areas.items() if category == "cat"} == {1}
    assert {area for (_, category), area in areas.items() if category == "dog"} == {0}
    record = read_record(labeled).stages["experts"]
    assert record.made_with["imported"] == str(tmp_path / "e") and record.settings["experts.encoder"] == ENCODER
    assert "experts.steps" not in record.settings
    assert not list((labeled / "experts").glob("*/*"))  # of a training


def test_missing_imported_network_is_not_trained(labeled, tmp_path):
    for name in ("cat", "dog"):
        write_expert(tmp_path / f"e/{name}.pt")
    succeed("import", "experts", tmp_path / "e", "--out", labeled, "--encoder", ENCODER)
    (labeled / "experts" / "dog.safetensors").unlink()
    assert "'dog'" in fail("experts", labeled)
    succeed("import", "experts", tmp_path / "e", "--out", labeled, "--encoder", ENCODER, "--overwrite")
    succeed("experts", labeled)


def test_experts_are_mapped_by_a_file(labeled, tmp_path):
    for number, name in enumerate(("first", "second")):
        write_expert(tmp_path / f"e/{name}.pt", object_bias=number)
    folder, words = tmp_path / "e", ["--out", labeled, "--encoder", ENCODER]
    succeed("import", "experts", write_json(folder / "map.json", {"cat": "first.pt", "dog": "second.pt"}), *words)
    networks = {path.stem: path.read_bytes() for path in (labeled / "experts").iterdir()}
    (folder / "map.csv").write_text("category,file\ncat,second.pt\ndog,first.pt\n")
    succeed("import", "experts", folder / "map.csv", *words, "--overwrite")
    swapped = {path.stem: path.read_bytes() for path in (labeled / "experts").iterdir()}
    assert swapped == {"cat": networks["dog"], "dog": networks["cat"]} and networks["cat"] != networks["dog"]
    message = fail("import", "experts", folder, *words)
    assert "'cat'" in message and "'first.pt'" in message
    write_json(folder / "map.json", {"cat": "first.pt"})
    assert "no network of 'dog'" in fail("import", "experts", folder / "map.json", *words)
    write_json(folder / "map.json", {"cat": "first.pt", "dog": "third.pt"})
    assert "third.pt: there is no such file" in fail("import", "experts", folder / "map.json", *words)
    (folder / "map.csv").write_text("category,file\ncat\n")
    assert "expected {category: file}" in fail("import", "experts", folder / "map.csv", *words)


def test_unsuitable_experts_change_nothing(labeled, run, tmp_path):
    before = files_of(labeled)
    words = ["import", "experts", tmp_path / "e", "--out", labeled, "--encoder", ENCODER]
    write_expert(tmp_path / "e/expert_cat.pt")
    write_expert(tmp_path / "e/expert_puppy.pt")
    message = fail(*words)
    assert "'dog'" in message and "'expert_puppy.pt'" in message
    write_expert(tmp_path / "e/dog.pt", classes=3)
    assert "has 3 classes" in fail(*words)
    write_expert(tmp_path / "e/dog.pt", channels=32)
    assert "differ in the channels" in fail(*words)
    write_expert(tmp_path / "e/dog.pt")
    write_expert(tmp_path / "e/expert_dog.pt")
    assert "several networks of 'dog'" in fail(*words)
    (tmp_path / "e/expert_dog.pt").write_text("no network")
    (tmp_path / "e/dog.pt").unlink()
    assert "expert_dog.pt cannot be read" in fail(*words)
    assert "not a run folder" in fail("import", "experts", tmp_path / "e", "--out", tmp_path / "none")
    assert files_of(labeled) == before and not (tmp_path / "none").exists()


def test_experts_need_masks(run, tmp_path):
    write_expert(tmp_path / "e/expert_cat.pt")
    assert "has no masks" in fail("import", "experts", tmp_path / "e", "--out", run, "--encoder", ENCODER)


# -- kills -----------------------------------------------------------------------------------------------------------


def import_of(kind: str, folder: Path, photos: Path, request) -> list:
    """The words of an import into `folder`/run, whose files are written."""
    out = folder / "run"
    if kind == "archive":
        return ["archive", write_json(folder / "a.json", AUTHORS), "--photos", photos, "--out", out]
    if kind == "embeddings":
        out.mkdir()
        return ["embeddings", write_vectors(folder / "v.safetensors", "safetensors"), "--out", out / "e.safetensors"]
    if kind == "experts":
        for name in ("cat", "dog"):
            write_expert(folder / f"e/{name}.pt")
        return ["experts", folder / "e", "--out", request.getfixturevalue("labeled"), "--encoder", ENCODER]
    for path in photos.rglob("*.JPEG"):
        write_json(folder / "m" / f"{path.stem}.json", rle(mask_of(path)))
    words = ["masks", folder / "m", "--out", out]
    return [*words, "--photos", photos] if "new" in kind else [*words[:-1], request.getfixturevalue("run")]


@pytest.mark.parametrize("kind", ["archive", "masks", "masks of a new run", "experts", "embeddings"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_import_that_was_killed_is_begun_again(kind, options, photos, tmp_path, request, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(masks, "PseudolabelConfig", functools.partial(masks.PseudolabelConfig, shard_size=2))
    words, kills, replace = ["import", *import_of(kind, tmp_path, photos, request)], [], Path.replace
    if options:
        succeed(*words)

    def noted(path, target):
        for place in (path, None):  # killed before and after the rename
            if not place:
                replace(path, target)
            kills.append(tmp_path / f"kill{len(kills)}")
            shutil.copytree(out, kills[-1])

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", noted)
        succeed(*words, *options)
    expected = files_of(out)
    assert "masks/00002.jsonl" in expected or "new" not in kind
    for kill in kills[:-1]:
        shutil.rmtree(out)
        shutil.copytree(kill, out)
        done = command(*words)
        if done.exit_code:  # before the first change, or after the last
            assert "already; --overwrite" in done.stderr or "exists; --overwrite" in done.stderr
            assert options or kill == kills[-2], kill
            succeed(*words, "--overwrite")
        left = {name: data for name, data in files_of(out).items() if kind != "embeddings" or ".tmp-" not in name}
        assert left == expected, kill


def test_results_of_an_import_that_was_interrupted_are_not_used(photos, run, tmp_path, request, monkeypatch):
    words = ["import", *import_of("masks", tmp_path, photos, request)]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("namedmask.imports.finish", interrupt)
        assert command(*words).exit_code == 130
    for stage in ("pseudolabel", "experts", "train"):
        assert f"the import of {tmp_path / 'm'} into {run} was interrupted: run it again" in fail(stage, run)
    succeed(*words)
    assert "already; --overwrite" in fail(*words)


# -- embeddings ------------------------------------------------------------------------------------------------------

NAMES = ["n01_0.JPEG", "n02_1.JPEG", "Käse.JPEG"]  # file names alone, as in the authors' pickle


def vectors(kind: str) -> dict:
    rows = np.eye(3, 8, dtype=np.float16 if "16" in kind else np.float32)
    if "torch" in kind:
        return {name: torch.from_numpy(row)[None] for name, row in zip(NAMES, rows, strict=True)}
    return dict(zip(NAMES, rows, strict=True))


def write_vectors(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(vectors(kind), path)
    elif kind.startswith("torch.save"):
        torch.save(vectors(kind), path, _use_new_zipfile_serialization="old" not in kind)
    else:
        path.write_bytes(pickle.dumps(vectors(kind), int(kind[-1])))
    return path


def embedded(out: Path, photos: Path) -> dict[str, np.ndarray]:
    """The embeddings of the photos as the index gets them."""
    found = PrecomputedEmbeddings(str(out)).images(PhotoSource(photos), [sorted(PhotoSource(photos))])
    return {name: row for name, row in found if not isinstance(row, PhotoError)}


@pytest.mark.parametrize(
    "kind", ["numpy16 0", "numpy 2", "numpy16 5", "torch 4", "torch16 2", "torch.save", "torch.save old", "safetensors"]
)
def test_embeddings_in_every_form(kind, photos, tmp_path):
    source, out = write_vectors(tmp_path / "embeddings.pkl", kind), tmp_path / "e.safetensors"
    words = ["import", "embeddings", source, "--photos", photos, "--out", out]
    if kind[-1].isdigit():
        assert "--allow-pickle" in fail(*words) and not out.exists()
        words.append("--allow-pickle")
    assert "3 photos and no category" in succeed(*words)
    rows = embedded(out, photos)
    assert rows.keys() == {"n01/n01_0.JPEG", "n01/Käse.JPEG", "n02/n02_1.JPEG"}
    assert np.array_equal(rows["n01/Käse.JPEG"], np.eye(8)[2])
    assert load_file(out)["image"].dtype == (np.float16 if "16" in kind else np.float32)
    assert "e.safetensors is in the format of --embeddings already" in fail(
        "import", "embeddings", out, "--out", tmp_path / "again.safetensors"
    )


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("place", ["value", "key", "object array"])
def test_no_pickle_is_executed(place, photos, tmp_path):
    payload = Payload(tmp_path / "executed")
    data = {"value": {"a": payload}, "key": [payload], "object array": {"a": np.array([payload], object)}}
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(data[place]))
    words = ["import", "embeddings", tmp_path / "e.pkl", "--photos", photos, "--out", tmp_path / "e.safetensors"]
    assert "--allow-pickle" in fail(*words)
    assert "neither an array nor a tensor" in fail(*words, "--allow-pickle")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "e.safetensors").exists()


ROW = np.ones(4, np.float32)
UNSUITABLE = {
    "list": ([ROW], "expected {photo: vector}"),
    "empty": ({}, "it is empty"),
    "names": ({7: ROW}, "names of photos"),
    "whole numbers": ({"n01_0.JPEG": np.ones(4, np.int64)}, "int64 [4]"),
    "whole numbers of torch": ({"n01_0.JPEG": torch.ones(4, dtype=torch.int64)}, "torch.int64 [4]"),
    "matrix": ({"n01_0.JPEG": np.ones((2, 4), np.float32)}, "float32 [2, 4]"),
    "number": ({"n01_0.JPEG": np.array(1.0)}, "float64 []"),
    "no value": ({"n01_0.JPEG": np.ones(0)}, "float64 [0]"),
    "text": ({"n01_0.JPEG": "vector"}, "got str"),
    "two widths": ({"n01_0.JPEG": ROW, "n01_1.JPEG": ROW[:3]}, "'n01_1.JPEG' has 3 dimensions"),
    "NaN": ({"n01_0.JPEG": ROW * np.nan}, "'n01_0.JPEG'"),
    "other photos": ({"n09_0.JPEG": ROW}, "none of its 1 photo, "),
}


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_unsuitable_embeddings_are_named(kind, photos, tmp_path):
    data, message = UNSUITABLE[kind]
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(data))
    words = ["--photos", photos, "--out", tmp_path / "e.safetensors", "--allow-pickle"]
    assert message in fail("import", "embeddings", tmp_path / "e.pkl", *words)
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(data)[:-3])
    assert "e.pkl" in fail("import", "embeddings", tmp_path / "e.pkl", *words)
    assert not (tmp_path / "e.safetensors").exists()


def test_vectors_without_a_direction_are_left_out(photos, tmp_path):
    data = {"n01_0.JPEG": ROW, "n01_1.JPEG": ROW * np.inf, "n02_0.JPEG": ROW * 0, "n02_1.JPEG": np.full(4, 1e300)}
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(data))
    out = tmp_path / "e.safetensors"
    output = succeed("import", "embeddings", tmp_path / "e.pkl", "--photos", photos, "--out", out, "--allow-pickle")
    assert "3 embeddings left out as NaN, infinite or zero: " in output and "'n01_1.JPEG'" in output
    assert list(embedded(out, photos)) == ["n01/n01_0.JPEG"]


def clip_retrieval(folder: Path, column: str = "image_path", rows: int = 2) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    image = np.eye(3, 8, dtype=np.float16)
    for number, (first, last) in enumerate(((0, 2), (2, 3))):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", image[first:last])
        table = pyarrow.table({column: [f"/data/{name}" for name in NAMES[first:last]][:rows]})
        parquet.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def test_clip_retrieval_names_photos_of_tars_without_their_suffix(photos, tmp_path):
    """Its metadata has the keys of webdataset's samples."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, name in enumerate(["n01_0.JPEG", "n01_1.JPEG"]):
            tar.add(photos / "n01" / name, f"{number:09}.jpg")
        tar.add(photos / "n01" / "n01_0.JPEG", "other/7.jpg")
        tar.add(photos / "n01" / "n01_0.JPEG", "other/7.png")
    keys = ["000000000", "000000001", "other/7", "000000002", "000000001.png"]
    save_file({key: np.eye(8, dtype=np.float32)[row] for row, key in enumerate(keys)}, tmp_path / "v.safetensors")
    out = tmp_path / "e.safetensors"
    message = succeed("import", "embeddings", tmp_path / "v.safetensors", "--photos", tmp_path / "0.tar", "--out", out)
    assert "3 embeddings of no photo" in message
    rows = PrecomputedEmbeddings(str(out)).rows
    assert list(rows) == ["0.tar/000000000.jpg", "0.tar/000000001.jpg"]


def test_output_of_clip_retrieval(photos, tmp_path, monkeypatch):
    folder, out = clip_retrieval(tmp_path / "output"), tmp_path / "e.safetensors"
    flat = tmp_path / "photos"
    flat.mkdir()
    for name in NAMES:
        (flat / name).write_bytes((photos / name[:3] / name if name[0] == "n" else photos / "n01" / name).read_bytes())
    words = ["import", "embeddings", folder, "--photos", flat, "--out", out]
    succeed(*words)
    rows = embedded(out, flat)
    assert rows.keys() == set(NAMES) and np.array_equal(rows["Käse.JPEG"], np.eye(8)[2])
    before = files_of(tmp_path)
    assert "exists; --overwrite replaces it" in fail(*words)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "namedmask[parquet]" in fail(*words, "--overwrite")
    assert files_of(tmp_path) == before
    monkeypatch.undo()
    succeed(*words, "--overwrite")


@pytest.mark.parametrize("count", range(4))  # of the calls of fsync until one fails: two per file
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_old_embeddings_stay_until_the_new_ones_are_complete(count, error, tmp_path, monkeypatch):
    source, out = tmp_path / "vectors.safetensors", tmp_path / "e.safetensors"
    save_file({"a.jpg": ROW}, source)
    import_embeddings(source, out)
    before = {name: data for name, data in files_of(tmp_path).items() if name.startswith("e.")}
    save_file({"b.jpg": ROW}, source)
    calls = iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) == count:
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(type(error)):
        import_embeddings(source, out, overwrite=True)
    assert {name: data for name, data in files_of(tmp_path).items() if name != source.name} == before
    import_embeddings(source, out, overwrite=True)
    assert list(PrecomputedEmbeddings(str(out)).rows) == ["b.jpg"] and len(files_of(tmp_path)) == 3


def test_incomplete_output_of_clip_retrieval_is_named(photos, tmp_path):
    out = ["--photos", photos, "--out", tmp_path / "e.safetensors"]
    assert "no column image_path" in fail("import", "embeddings", clip_retrieval(tmp_path / "a", "caption"), *out)
    assert "has 1 row" in fail("import", "embeddings", clip_retrieval(tmp_path / "b", rows=1), *out)
    folder = clip_retrieval(tmp_path / "c")
    (folder / "metadata" / "metadata_1.parquet").unlink()
    assert "as many" in fail("import", "embeddings", folder, *out)
    (folder / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1")
    assert "cannot be imported" in fail("import", "embeddings", folder, *out)
    np.save(folder / "img_emb" / "img_emb_0.npy", np.array([print]), allow_pickle=True)
    assert "cannot be imported" in fail("import", "embeddings", folder, *out)
    np.savez(tmp_path / "other.npz", np.eye(2))
    for content in (b"", (tmp_path / "other.npz").read_bytes(), b"\x93NUMPY"):
        (folder / "img_emb" / "img_emb_0.npy").write_bytes(content)
        assert "img_emb_0.npy cannot be imported" in fail("import", "embeddings", folder, *out)


def test_imported_embeddings_with_names_make_an_archive(photos, tmp_path, detector_options):
    """The text embeddings are those of the CLIP model that is given."""
    row = np.arange(64, dtype=np.float32) - 31
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"n01_0.JPEG": row, "n02_1.JPEG": -row}))
    out = tmp_path / "e.safetensors"
    words = ["import", "embeddings", tmp_path / "e.pkl", "--photos", photos, "--out", out, "--allow-pickle"]
    words += ["--clip-model", "namedmask-demo"]
    assert "2 photos and 2 categories" in succeed(*words, "--categories", "cat,dog")
    run = ["run", photos, "--embeddings", out, "--photos-per-category", 2, *detector_options, "--out", tmp_path / "run"]
    succeed(*run, "--categories", "dog,cat")
    assert {entry[0] for entry in entries(tmp_path / "run")["cat"]} == {"n01/n01_0.JPEG", "n02/n02_1.JPEG"}
    succeed(*words, "--overwrite")
    message = fail(*run[:-1], tmp_path / "other", "--categories", "cat")
    assert "has no text embedding of cat" in message
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"n01_0.JPEG": ROW}))
    assert "embeddings of 4 dimensions" in fail(*words, "--categories", "cat", "--overwrite")
