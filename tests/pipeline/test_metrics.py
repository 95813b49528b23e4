# SPDX-License-Identifier: MIT
"""Confusion matrix and metrics against arrays of the reference; label map files; `namedmask evaluate`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from namedmask.errors import DamagedFile, UserError
from namedmask.evaluate.benchmarks import read_gray
from namedmask.evaluate.folders import as_json, default_ignore, percent
from namedmask.evaluate.metrics import Confusion
from namedmask.evaluate.scoring import PhotoMatcher
from namedmask.formats import label_palette, read_categories, read_label_map, write_label_map
from small_world import command, encoded_png

GOLDEN = Path(__file__).parents[1] / "golden" / "running_score.npz"
CASES = ("binary", "voc21", "voc21_absent_gt", "voc21_absent_both", "all_ignored", "perfect")


@pytest.mark.parametrize("case", CASES)
def test_metrics_equal_the_reference(case):
    data = np.load(GOLDEN)
    confusion = Confusion(int(data[f"{case}_n_classes"]), ignore=255)
    for prediction, truth in zip(data[f"{case}_pred"], data[f"{case}_gt"], strict=True):
        confusion.add(prediction, truth)
    np.testing.assert_array_equal(confusion.matrix, data[f"{case}_confusion"])
    metrics = confusion.metrics()
    for ours, theirs in (
        (metrics.iou, "iou"),
        (metrics.mean_iou, "mean_iou"),
        (metrics.mean_accuracy, "mean_acc"),
        (metrics.pixel_accuracy, "pixel_acc"),
        (metrics.weighted_iou, "freqw_acc"),
    ):
        np.testing.assert_allclose(ours, data[f"{case}_{theirs}"], rtol=0, atol=1e-12, err_msg=theirs)


@given(st.data())
@settings(max_examples=30)
def test_confusion_counts_every_pixel_once(data):
    classes = data.draw(st.sampled_from([1, 2, 300, 920]))
    shape = data.draw(st.tuples(st.integers(0, 9), st.integers(1, 9)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([np.uint16, np.int32, np.int64, np.uint32]))
    ignore = data.draw(st.sampled_from([None, classes, 1000, 0xFFFF]))
    prediction, truth = rng.integers(0, classes, (2, *shape)).astype(dtype)
    if ignore is not None:
        truth[rng.random(shape) < 0.3] = ignore
    confusion = Confusion(classes, ignore)
    confusion.add(prediction, truth)
    expected = np.zeros((classes, classes), int)
    for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
        if t != ignore:
            expected[t, p] += 1
    np.testing.assert_array_equal(confusion.matrix, expected)
    assert confusion.counts.sum() == truth.size
    assert truth.size == 0 or confusion.ignored == (np.mean(truth == ignore) if ignore is not None else 0)


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "the prediction is 2 x 3, the truth 3 x 2"),
        (np.full((2, 2), 3), np.zeros((2, 2), int), "the prediction has the id 3: classes are 0 to 2"),
        (np.full((2, 2), 255), np.zeros((2, 2), int), "the prediction has the id 255"),
        (
            np.zeros((2, 2), int),
            np.full((2, 2), 254),
            "the truth has the id 254: classes are 0 to 2, and 255 is ign",
        ),
        (np.zeros((2, 2), int), np.full((2, 2), -1), "the truth has the id -1"),
        (np.zeros((2, 2), int), np.full((2, 2), 1 << 32), "the truth has the id 4294967296"),
    ],
)
def test_invalid_ids_raise_value_error_and_are_not_counted(prediction, truth, message):
    confusion = Confusion(3, ignore=255)
    with pytest.raises(ValueError, match=message):
        confusion.add(prediction, truth)
    assert not confusion.counts.any()
    for ignore in (0, 255):
        with pytest.raises(ValueError, match="one of the 256 classes"):
            Confusion(256, ignore)


def test_ids_below_0_may_be_ignored():
    confusion = Confusion(2, ignore=-1)
    confusion.add(np.array([[0, 1, 1]], np.uint8), np.array([[-1, 1, 0]], np.int8))
    assert confusion.counts.tolist() == [[0, 1], [0, 1], [1, 0]] and confusion.ignored == pytest.approx(1 / 3)
    assert np.isnan(Confusion(2).ignored)
    with pytest.raises(ValueError, match=r"the truth has the id 2: classes are 0 to 1$"):
        Confusion(2).add(np.zeros((1, 1), int), np.full((1, 1), 2))
    with pytest.raises(ValueError, match=r"the prediction has the id -3: classes are 0 to 1$"):
        confusion.add(np.array([[-3, 7]]), np.zeros((1, 2), int))


def test_metrics_of_classes_that_are_absent():
    """Class 1 is right in 1 of 2 pixels, class 2 is predicted alone, class 3 is in neither."""
    confusion = Confusion(4)
    confusion.add(np.array([[0, 1, 2]]), np.array([[0, 1, 1]]))
    metrics = confusion.metrics()
    np.testing.assert_array_equal(metrics.iou, [1, 0.5, 0, np.nan])
    np.testing.assert_array_equal(metrics.accuracy, [1, 0.5, np.nan, np.nan])
    assert metrics.mean_iou == 0.5 and metrics.mean_accuracy == 0.75
    assert metrics.pixel_accuracy == pytest.approx(2 / 3) and metrics.weighted_iou == pytest.approx(2 / 3)
    figures = as_json(confusion, ["a", "b", "c", "d"], 7)
    assert figures["weighted_iou"] == 0.666667 and figures["accuracy"] == {"a": 1, "b": 0.5, "c": None, "d": None}
    assert figures["photos"] == 7 and figures["ignored_pixels"] == 0
    ious = as_json(confusion, ["a", "b", "c", "b"], 7)["iou"]
    assert ious == {"a": 1, "b (1)": 0.5, "c": 0, "b (3)": None}
    assert [percent(value) for value in (None, 0.12345, 1.0)] == ["-", "12.3", "100.0"]
    none = Confusion(2).metrics()
    assert np.isnan([none.mean_iou, none.mean_accuracy, none.pixel_accuracy, *none.iou]).all()
    assert none.weighted_iou == 0


@pytest.mark.parametrize(
    "content", ['{"categories": "cat"}', '{"categories": ["cat", 3]}', '{"names": []}', "[]", "{", "[" * 100_000]
)
def test_damaged_lists_of_categories_are_named(tmp_path, content):
    (tmp_path / "categories.json").write_text(content)
    with pytest.raises(DamagedFile, match=r"categories.json: .* pass the names"):
        read_categories(tmp_path, "pass the names")


@pytest.mark.parametrize("classes", [2, 21, 256, 257, 920])
def test_label_map_round_trip(tmp_path, classes):
    labels = np.random.default_rng(0).integers(0, classes, (37, 53))
    labels[0, 0] = classes - 1
    write_label_map(tmp_path / "a.png", labels, classes)
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png"), labels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == ("P" if classes <= 256 else "I;16")
    with pytest.raises(ValueError, match="labels"):
        write_label_map(tmp_path / "b.png", labels + 1, classes)
    assert not (tmp_path / "b.png").exists()


def test_largest_label(tmp_path):
    labels = np.array([[0, 0xFFFF]])
    write_label_map(tmp_path / "a.png", labels, 0x10000)
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png"), labels)
    with pytest.raises(ValueError, match="at most 65536"):
        write_label_map(tmp_path / "b.png", labels, 0x10001)


@pytest.mark.parametrize(("classes", "ignored"), [(2, 255), (255, 255), (256, 0xFFFF), (300, 0xFFFF)])
def test_ignored_label_of_benchmarks(classes, ignored):
    assert default_ignore(classes, red_green=False) == ignored
    assert default_ignore(classes, red_green=True) == 1000


def test_labels_must_be_classes(tmp_path):
    for labels, classes in (([[-1]], 2), ([[2]], 2), ([[0xFFFF]], 0x10001), ([0], 2), ([[[0]]], 2)):
        with pytest.raises(ValueError, match=rf"expected labels \[H, W\] of {classes} classes, at most 65536"):
            write_label_map(tmp_path / "a.png", np.array(labels), classes)
    wide = np.array([[0, 300]], np.int32)
    Image.fromarray(wide.astype(np.uint16)).save(tmp_path / "a.png")
    assert read_label_map(tmp_path / "a.png").dtype == np.uint16
    Image.fromarray(wide.astype(np.uint8)).save(tmp_path / "b.png")
    assert read_label_map(tmp_path / "b.png").dtype == np.uint8


@pytest.mark.parametrize(("value", "fits"), [(0, True), (0xFFFF, True), (-1, False), (0x10000, False)])
def test_ids_of_wide_files_have_16_bits(tmp_path, monkeypatch, value, fits):
    """Older versions of Pillow open PNG files of 16 bits in the mode I."""
    write_label_map(tmp_path / "a.png", np.array([[0, 1]]), 300)
    image = Image.fromarray(np.array([[0, value]], np.int32))
    monkeypatch.setattr(Image, "open", lambda *_, **__: image)
    if fits:
        np.testing.assert_array_equal(read_label_map(tmp_path / "a.png"), [[0, value]])
    else:
        with pytest.raises(UserError, match=r"a\.png holds ids above 65535"):
            read_label_map(tmp_path / "a.png")


def test_color_files_may_have_transparency(tmp_path):
    for channels in (3, 4):
        colors = np.full((2, 2, channels), (7, 3, 9, 0)[:channels], np.uint8)
        Image.fromarray(colors).save(tmp_path / "a.png")
        assert read_label_map(tmp_path / "a.png", red_green=True).tolist() == [[7 + 3 * 256] * 2] * 2


def test_palette_is_that_of_voc_and_all_colors_differ():
    palette = label_palette()
    assert len(np.unique(palette, axis=0)) == 256
    # background, aeroplane, bicycle, person and the ignored border in the color map of VOC's development kit
    colors = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]]
    assert palette[[0, 1, 2, 15, 255]].tolist() == colors


def test_reading_other_label_files(tmp_path):
    ids = np.array([[0, 1, 919], [1000, 256, 3]])
    colors = np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)
    Image.fromarray(colors).save(tmp_path / "rg.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "rg.png", red_green=True), ids)
    with pytest.raises(UserError, match=r"rg\.png is a color picture"):
        read_label_map(tmp_path / "rg.png")
    Image.fromarray(ids.astype(np.uint8) > 0).save(tmp_path / "binary.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "binary.png"), ids.astype(np.uint8) > 0)
    with pytest.raises(UserError, match="one value per pixel"):
        read_label_map(tmp_path / "binary.png", red_green=True)
    (tmp_path / "wide.png").write_bytes(encoded_png(1, 1, 16, 2, b"\0\0\7" + b"\0" * 4))
    with pytest.raises(UserError, match="has colors of 16 bits"):
        read_label_map(tmp_path / "wide.png", red_green=True)


def test_files_that_are_no_png_are_named_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no")
    Image.new("L", (4, 4)).save(tmp_path / "photo.png", "JPEG")
    Image.effect_noise((40, 40), 50).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 200)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    other = "it is another file, or its header is damaged"
    reasons = {"text": other, "photo": other, "cut": "image file is truncated", "folder": "Is a directory"}
    for name, reason in {**reasons, "pipe": "not a regular file", "none": "No such file or directory"}.items():
        path = tmp_path / f"{name}.png"
        for read in (read_label_map, read_gray):
            with pytest.raises(UserError) as error:
                read(path)
            assert str(error.value) == f"{path} cannot be read as a PNG: {reason}"


@pytest.mark.parametrize("transparent", [False, True], ids=["", "tRNS"])
@pytest.mark.parametrize(("color", "depth"), [("gray", 16), *itertools.product(("gray", "palette"), (1, 2, 4, 8))])
def test_ids_are_the_stored_values_in_every_form_of_png(tmp_path, color, depth, transparent):
    labels = np.random.default_rng(depth).integers(0, 1 << depth, (5, 7))
    palette = bytes(255 - i // 3 for i in range(3 << depth)) if color == "palette" else b""
    (tmp_path / "a.png").write_bytes(png(labels, depth, palette, b"\0\1" if transparent else b""))
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png"), labels)


def png(labels: np.ndarray, depth: int, palette: bytes, transparency: bytes) -> bytes:
    """A PNG file of labels [H, W] with `depth` bits per pixel, indexed if there is a palette, else grayscale."""
    rows = [np.unpackbits(row.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 16 - depth :] for row in labels]
    header = struct.pack(">IIBBBBB", *labels.shape[::-1], depth, 3 if palette else 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in rows))
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", transparency), (b"IDAT", data), (b"IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        if content or name == b"IEND":
            file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return file


def evaluate(*arguments):
    return command("evaluate", *arguments)


@pytest.fixture
def folders(tmp_path):
    """Ground truth of three photos, one in a subfolder, with ids 0 to 2 and 255, and predictions with errors."""
    rng = np.random.default_rng(1)
    for number, name in enumerate(("a", "b", "deep/c")):
        truth = rng.integers(0, 3, (20, 30 + number)).astype(np.uint8)
        prediction = np.where(rng.random(truth.shape) < 0.2, 0, truth).astype(np.uint8)
        truth[:2] = 255
        for folder, labels in (("truth", truth), ("predictions", prediction)):
            path = tmp_path / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    return tmp_path


def test_evaluate_command(folders):
    names = ["--categories-file", folders / "names.txt"]
    done = evaluate(folders / "predictions", folders / "truth", *names, "--json", folders / "figures.json")
    assert done.exit_code == 0, done.output
    figures = json.loads((folders / "figures.json").read_text())
    confusion = Confusion(3, 255)
    for path in (folders / "truth").rglob("*.png"):
        prediction = folders / "predictions" / path.relative_to(folders / "truth")
        confusion.add(np.asarray(Image.open(prediction)), np.asarray(Image.open(path)))
    metrics = confusion.metrics()
    assert figures["photos"] == 3 and list(figures["iou"]) == ["background", "cat", "dog"]
    assert figures["mean_iou"] == pytest.approx(metrics.mean_iou, abs=1e-6) and 0.5 < metrics.mean_iou < 0.95
    assert f"mIoU {100 * metrics.mean_iou:.1f} %" in done.output and "cat" in done.output
    assert figures["ignored_pixels"] == pytest.approx(0.1) and "10.0 % of the pixels ignored" in done.output
    assert "warning" not in done.stderr


def test_truth_of_0_and_255_is_an_error_and_a_single_file_of_it_a_warning(folders):
    """Binary masks of 0 and 255: all objects are ignored, which would leave an mIoU of 100%."""
    names = ["--categories", "cat,dog", "--json", folders / "figures.json"]
    for path in (folders / "truth").rglob("*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    done = evaluate(folders / "predictions", folders / "truth", *names)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and not (folders / "figures.json").exists()
    assert "files of the ground truth without a pixel of a category: 3 of 3, such" in done.stderr
    assert (
        "If 255 marks the objects, replace it by the number of their category, from 1 (cat) to 2 (dog)" in done.stderr
    )

    labels = np.asarray(Image.open(folders / "truth" / "b.png"))
    Image.fromarray(np.where(labels == 255, 2, labels)).save(folders / "truth" / "b.png")
    done = evaluate(folders / "predictions", folders / "truth", *names)
    assert (
        done.exit_code == 0 and "warning: files of the ground truth without a pixel of a category: 2 of" in done.stderr
    )
    assert "a.png; " in done.stderr and json.loads((folders / "figures.json").read_text())["iou"]["dog"] > 0


def test_evaluate_errors_have_one_line(folders):
    names = ["--categories", "cat,dog"]

    def expect_error(message, *arguments):
        done = evaluate(*arguments)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr

    predictions, truth = folders / "predictions", folders / "truth"
    expect_error("there is no categories.json in", predictions, truth)
    expect_error("--ignore 2", predictions, truth, *names, "--ignore", 2)
    expect_error("--ignore 1000: ", predictions, truth, "--categories", ",".join(map(str, range(1000))), "--red-green")
    expect_error("a.png: the prediction has the id 2: classes are 0 to 1", predictions, truth, "--categories", "cat")
    expect_error("none does not exist", folders / "none", truth)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(predictions / "a.png")
    expect_error("a.png: the prediction is 5 x 5, the truth 20 x 30", predictions, truth, *names)
    (predictions / "b.png").unlink()
    expect_error("b.png: there is no mask of that name in", predictions, truth, *names)
    (predictions / "a.png").unlink()
    expect_error("a.png and 1 more: there is no mask", predictions, truth, *names)


def test_hidden_files_are_no_masks_and_twins_are_an_error(folders):
    words = folders / "predictions", folders / "truth", "--categories", "cat,dog"
    (folders / "truth" / "__MACOSX").mkdir()
    for name in ("._a.png", "__MACOSX/a.png"):
        (folders / "truth" / name).write_bytes(b"")
    assert evaluate(*words).exit_code == 0
    shutil.copy(folders / "truth" / "a.png", folders / "truth" / "a.PNG")
    result = evaluate(*words)
    assert result.exit_code == 2 and "have the same name; remove one of them" in result.stderr


def test_label_maps_are_found_as_photos_are(folders, close_folder):
    words = folders / "predictions", folders / "truth", "--categories", "cat,dog", "--json", folders / "figures.json"
    (folders / "truth" / "deep").rename(folders / "elsewhere")
    (folders / "truth" / "deep").symlink_to(folders / "elsewhere")
    (folders / "elsewhere" / "loop").symlink_to(folders / "truth")
    assert evaluate(*words).exit_code == 0
    assert json.loads((folders / "figures.json").read_text())["photos"] == 3
    close_folder(folders / "truth" / "deep")
    result = evaluate(*words)
    assert result.exit_code == 2 and "deep: the folder cannot be listed: Permission denied" in result.stderr


def test_names_from_macos_are_those_of_other_systems(folders, tmp_path):
    """Its files have decomposed characters."""
    (folders / "truth" / "a.png").rename(folders / "truth" / "crème.png")
    (folders / "predictions" / "a.png").rename(folders / "predictions" / unicodedata.normalize("NFD", "crème.png"))
    assert evaluate(folders / "predictions", folders / "truth", "--categories", "cat,dog").exit_code == 0
    matcher = PhotoMatcher(tmp_path, ["crème/é.jpg"])
    assert matcher.add(unicodedata.normalize("NFD", "crème/é.png")) == "crème/é.jpg"


@pytest.mark.parametrize("names", ["cat,cat", "cat,Cat", "background,cat"])
def test_evaluate_rejects_names_that_collide(folders, names):
    result = evaluate(folders / "predictions", folders / "truth", "--categories", names)
    assert result.exit_code == 2 and "namedmask: --categories: " in result.stderr


def test_evaluate_red_green(folders):
    """ImageNet-S: color files with ids above 255, predictions with 16 bits, 1000 is ignored."""
    rng = np.random.default_rng(2)
    classes = [f"class {n}" for n in range(1, 920)]
    (folders / "many.txt").write_text("\n".join(classes))
    truth = rng.integers(0, 920, (16, 16))
    for folder in ("rg", "wide"):
        (folders / folder).mkdir()
    write_label_map(folders / "wide" / "a.png", truth, 920)
    truth[:4] = 1000
    colors = np.stack([truth % 256, truth // 256, 0 * truth], -1).astype(np.uint8)
    Image.fromarray(colors).save(folders / "rg" / "a.png")
    names = ["--categories-file", folders / "many.txt"]
    done = evaluate(folders / "wide", folders / "rg", *names, "--red-green", "--json", folders / "f.json")
    assert done.exit_code == 0, done.output
    assert json.loads((folders / "f.json").read_text())["mean_iou"] == 1.0
