# SPDX-License-Identifier: MIT
"""Public benchmarks through `namedmask evaluate`, on miniatures whose scores are computed by hand; saliency metrics."""

from __future__ import annotations

import importlib.util
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from namedmask.archive import Archive, key_of, write_archive
from namedmask.backbones import untrained_encoder
from namedmask.config import make_config
from namedmask.errors import UserError
from namedmask.evaluate import BenchmarkName, saliency
from namedmask.evaluate.benchmarks import (
    BENCHMARKS,
    Instance,
    Instances,
    _rasterized,
    category_names,
    read_gray,
    read_mask,
)
from namedmask.evaluate.scoring import (
    PhotoMatcher,
    _painted,
    _shared_end,
    _united,
    _without_suffix,
    class_table,
)
from namedmask.files import path_parts
from namedmask.formats import write_label_map
from namedmask.masks import MaskRecord, write_shard
from namedmask.photos import PhotoSource
from namedmask.pseudolabel import Labeler
from namedmask.segmenter.deeplab import DeepLab, save_segmenter
from namedmask.segmenter.predict import Segmenter
from small_world import ENCODER, command, encoded_png

TOOL = Path(__file__).parents[2] / "tools" / "make_benchmark_miniatures.py"
spec = importlib.util.spec_from_file_location("make_benchmark_miniatures", TOOL)
miniatures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(miniatures)

pytestmark = pytest.mark.usefixtures("one_thread_in_module")  # threads that wait for each other are slow on busy cores

LABELED = [name for name in BENCHMARKS if BENCHMARKS[name].classes]
N = {"imagenet-s50": 50, "imagenet-s300": 300, "imagenet-s919": 919}


def predictions_of_imagenet_s(classes):
    return {
        "n10000006/ILSVRC2012_val_00000007": [[2, 1, 0, 0, 0, 5]] * 4,  # the last two columns are ignored
        f"n{10_000_000 + 3 * classes}/ILSVRC2012_val_00000012": [[classes, classes, 0, 0, 0, 0]] * 4,
    }


PREDICTIONS = {
    "voc2012": {
        "2007_000033": [[0, 1, 1, 0, 9, 0]] * 3 + [[0] * 6],  # column 4 is ignored
        "2007_000042": [[15, 15, 0, 0, 0, 0]] * 3 + [[0] * 6],
    },
    "coco2017": {
        "000000000139": [[1, 1, 1, 1, 0, 80]] * 4,
        "000000000285": [[17, 17, 17, 17, 0, 0]] * 4,
        "000000000632": [[0] * 6] * 4,
    },
    "coca": {
        "Accordion/51499": [[1, 1, 1, 1, 0, 0]] * 4,
        "whisk/51499": [[0] * 6] * 4,
        "Yellow duck/7": [[3, 3, 3, 0, 0, 0]] * 2 + [[0] * 6] * 2,
    },
    "cityscapes-object": {
        "frankfurt/frankfurt_000000_000294_leftImg8bit": [[1, 0, 0, 0, 7, 7]] * 2 + [[0] * 6] * 2,
        "munster/munster_000001_000019_leftImg8bit": [[0] * 6, [14, 14, 0, 0, 0, 0], *[[5, 5, 5, 0, 0, 0]] * 2],
    },
    **{name: predictions_of_imagenet_s(classes) for name, classes in N.items()},
}
# Intersection / union of each class that is in the truth or predicted, counted by hand in the rows above and those of
# the tool.
IOUS = {
    "voc2012": {"background": (24, 32), "aeroplane": (3, 9), "person": (4, 8), "tv/monitor": (0, 2)},
    "coco2017": {"background": (32, 36), "person": (12, 36), "dog": (0, 20), "toothbrush": (4, 4)},
    "coca": {"background": (42, 58), "Accordion": (8, 16), "Yellow duck": (6, 6), "whisk": (0, 8)},
    "cityscapes-object": {
        "background": (32, 35),
        "pole": (2, 2),
        "person": (6, 6),
        "car": (3, 4),
        "bicycle": (2, 4),
    },
    **{
        name: {"background": (20, 24), "n10000003": (0, 4), "n10000006": (4, 8), f"n{10_000_000 + 3 * n}": (8, 12)}
        for name, n in N.items()
    },
}
COUNTED = {"voc2012": 41, "coco2017": 72, "coca": 72, "cityscapes-object": 48, **dict.fromkeys(N, 40)}


def evaluate(*words):
    return command("evaluate", *words)


def figures_of(tmp_path, *words):
    done = evaluate(*words, "--json", tmp_path / "figures.json")
    assert done.exit_code == 0, done.output
    return json.loads((tmp_path / "figures.json").read_text()), done


def write_predictions(dataset, folder):
    for name, rows in PREDICTIONS[dataset].items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label_map(path, np.array(rows), BENCHMARKS[dataset].classes + 1)
    return folder


def expect_error(message, *words):
    done = evaluate(*words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and done.stderr.splitlines()[-1].startswith("namedmask: "), done.stderr
    assert "Traceback" not in done.stderr


def constant_network(classes, winner):
    """A segmenter that predicts one class everywhere."""
    network = DeepLab(untrained_encoder(ENCODER), classes, head_channels=16)
    last = network.classifier.classifier[3]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    last.bias.data[winner] = 1
    return network.eval()


def save(folder, winner, names):
    """A segmenter folder with names that predicts one class everywhere."""
    folder.mkdir()
    save_segmenter(folder, constant_network(len(names) + 1, winner), names)
    return folder


def rotate(photo, orientation):
    """Sets the orientation in which viewers show a photo. The labels are those of the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(photo).save(photo, exif=exif)


def test_every_benchmark_has_a_miniature():
    assert list(get_args(BenchmarkName)) == list(BENCHMARKS) == list(miniatures.WRITERS)


@pytest.mark.parametrize("dataset", LABELED)
def test_miou_on_the_miniature(tmp_path, dataset):
    root = miniatures.write(dataset, tmp_path)
    masks = write_predictions(dataset, tmp_path / "predictions")
    figures, done = figures_of(tmp_path, masks, "--benchmark", dataset, "--root", root)
    ious = {name: iou for name, iou in figures["iou"].items() if iou is not None}
    expected = {name: Fraction(*pair) for name, pair in IOUS[dataset].items()}
    assert ious == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)
    assert figures["mean_iou"] == pytest.approx(float(sum(expected.values()) / len(expected)), abs=1e-6)
    correct = sum(intersection for intersection, _ in IOUS[dataset].values())
    assert figures["pixel_accuracy"] == pytest.approx(correct / COUNTED[dataset], abs=1e-6)
    assert figures["photos"] == len(PREDICTIONS[dataset])
    assert f"published: NamedMask {figures['published'].split()[1]} mIoU" in done.stdout
    assert f"; the benchmark has {BENCHMARKS[dataset].photos}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_root_may_be_any_folder_of_the_archive(tmp_path, below):
    root = miniatures.write("voc2012", tmp_path)
    masks = write_predictions("voc2012", tmp_path / "predictions")
    figures, done = figures_of(tmp_path, masks, "--benchmark", "voc2012", "--root", root / below, "--split", "train")
    assert figures["photos"] == 1 and figures["split"] == "train" and "; the benchmark has" not in done.stderr
    assert "1 photo of voc2012, split train" in done.stdout


def test_released_weights_need_no_names_and_photos_are_not_rotated(tmp_path):
    """Everything is a person: 6 of 41 counted pixels are."""
    root = miniatures.write("voc2012", tmp_path)
    torch.save(constant_network(21, 15).state_dict(), tmp_path / "namedmask.pth")
    rotate(root / "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg", 6)
    words = [tmp_path / "namedmask.pth", "--encoder", ENCODER, "--benchmark", "voc2012", "--root", root]
    figures, _ = figures_of(tmp_path, *words)
    assert figures["iou"]["person"] == pytest.approx(6 / 41, abs=1e-6)
    assert figures["mean_iou"] == pytest.approx(6 / 41 / 4, abs=1e-6)
    coco = miniatures.write("coco2017", tmp_path)
    expect_error("has 21 classes, but 80 categories", *words[:3], "--benchmark", "coco2017", "--root", coco)


def test_segmenters_are_scored_in_float32_and_as_the_options_say(tmp_path, monkeypatch):
    """By itself, a segmenter on a GPU takes bfloat16."""
    root = miniatures.write("voc2012", tmp_path)
    save(tmp_path / "own", 15, category_names("voc2012"))
    loaded, load = [], Segmenter.load
    monkeypatch.setattr(Segmenter, "load", lambda *parts, **options: loaded.append(options) or load(*parts, **options))
    words = [tmp_path / "own", "--benchmark", "voc2012", "--root", root]
    for options, expected in (
        ([], {"precision": "float32", "scales": [1.0], "horizontal_flip": False}),
        (["--precision", "bfloat16", "--scales", "1,2", "--horizontal-flip"],
         {"precision": "bfloat16", "scales": [1.0, 2.0], "horizontal_flip": True}),
    ):  # fmt: skip
        figures, _ = figures_of(tmp_path, *words, *options)
        assert expected.items() <= loaded[-1].items() and figures["iou"]["person"] == pytest.approx(6 / 41, abs=1e-6)


def test_classes_of_a_segmenter_are_assigned_by_name(tmp_path):
    root = miniatures.write("voc2012", tmp_path)
    names = [name.upper().replace("/", "") for name in reversed(category_names("voc2012"))]  # TVMONITOR comes first
    save(tmp_path / "own", 1 + names.index("PERSON"), names)
    words = ["--benchmark", "voc2012", "--root", root]
    figures, _ = figures_of(tmp_path, tmp_path / "own", *words)
    assert figures["iou"]["person"] == pytest.approx(6 / 41, abs=1e-6)

    save(tmp_path / "two", 2, ["cat", "person"])
    figures, done = figures_of(tmp_path, tmp_path / "two", *words)
    assert figures["iou"]["person"] == pytest.approx(6 / 41, abs=1e-6)
    assert "has no class for 18 of 20 categories, counted as missed: 'aeroplane', 'bicycle'" in done.stderr

    save(tmp_path / "other", 2, ["cat", "human"])
    expect_error("has 'human', not a category of the benchmark", tmp_path / "other", *words)
    own_names = [name.replace("person", "human") for name in category_names("voc2012")]
    (tmp_path / "names.txt").write_text("\n".join(own_names))
    figures, _ = figures_of(tmp_path, tmp_path / "other", *words, "--categories-file", tmp_path / "names.txt")
    assert figures["iou"]["human"] == pytest.approx(6 / 41, abs=1e-6)
    message = "voc2012 has 20 categories: expected as many names, got 2"
    expect_error(message, tmp_path / "own", *words, "--categories", "cat,dog")


def test_names_of_imagenet_s(tmp_path):
    """Without a file of names they are those of the segmenter, else the WordNet ids of the folders."""
    root = miniatures.write("imagenet-s50", tmp_path)
    words = ["--benchmark", "imagenet-s50", "--root", root / "ImageNetS50", "--encoder", ENCODER]
    own = [f"thing {number}" for number in range(50)]
    save(tmp_path / "own", 2, own)
    figures, _ = figures_of(tmp_path, tmp_path / "own", *words)
    assert figures["iou"]["thing 1"] == pytest.approx(8 / 40, abs=1e-6)
    torch.save(constant_network(51, 2).state_dict(), tmp_path / "released.pth")
    figures, _ = figures_of(tmp_path, tmp_path / "released.pth", *words)
    assert figures["iou"]["n10000006"] == pytest.approx(8 / 40, abs=1e-6)
    save(tmp_path / "two", 2, ["cat", "dog"])
    expect_error("has 2 categories, imagenet-s50 has 50", tmp_path / "two", *words)
    expect_error(
        "ImageNetS50 is another benchmark; expected ImageNetS300", tmp_path, "--benchmark", "imagenet-s300", *words[2:]
    )
    (root / "ImageNetS50/validation/n10000003").rmdir()
    expect_error("pass --categories or --categories-file", tmp_path / "released.pth", *words)


def run_of(folder, *masks):
    """A run with masks: (photo, category, score, columns that are object)."""
    records = []
    for photo, category, score, columns in masks:
        mask = np.zeros((4, 6), bool)
        mask[:, columns] = True
        records.append(MaskRecord.from_mask(photo, mask, category, score, 0.5))
    (folder / "masks").mkdir(parents=True)
    write_shard(folder / "masks" / "00000.jsonl", records)
    return folder


def test_masks_of_a_run(tmp_path):
    """Photos are matched by name; of two categories, the one that fits the photo best is on top."""
    root = miniatures.write("voc2012", tmp_path)
    run = run_of(
        tmp_path / "run",
        ("pile/JPEGImages/2007_000033.jpg", "aeroplane", 0.9, [2, 3]),
        ("pile/JPEGImages/2007_000033.jpg", "person", 0.3, [3, 4, 5]),
        ("pile/holidays.jpg", "person", 0.8, [0]),
    )
    for predictions in (run, run / "masks"):
        figures, done = figures_of(tmp_path, predictions, "--benchmark", "voc2012", "--root", root)
        ious = {name: iou for name, iou in figures["iou"].items() if iou is not None}
        assert ious == pytest.approx({"background": 8 / 15, "aeroplane": 6 / 8, "person": 0}, abs=1e-6)
        assert f"photos with masks in {run / 'masks'}: 1 of 2; others, which are not scored: 1" in done.stdout

    # Categories of other photos do not matter.
    photos = {"person": [], "unicorn": [], "aeroplane": []}
    write_archive(run / "archive.json", Archive(list(photos), photos))
    again, done = figures_of(tmp_path, run, "--benchmark", "voc2012", "--root", root)
    assert again["iou"] == figures["iou"] and "no class for 18 of 20" in done.stderr

    other = run_of(tmp_path / "other", ("holidays.jpg", "person", 0.8, [0]))
    expect_error("photos with masks in", other, "--benchmark", "voc2012", "--root", root)
    expect_error("there are no masks in", run_of(tmp_path / "empty"), "--benchmark", "voc2012", "--root", root)
    twice = run_of(tmp_path / "twice", *((f"{at}/2007_000033.jpg", "person", 0.8, [0]) for at in "ab"))
    expect_error(
        "'a/2007_000033.jpg' and 'b/2007_000033.jpg' may both be", twice, "--benchmark", "voc2012", "--root", root
    )
    coca = miniatures.write("coca", tmp_path)
    flat = run_of(tmp_path / "flat", ("51499.jpg", "whisk", 0.8, [0]))
    expect_error(
        "'51499.jpg' may be Accordion/51499.jpg or whisk/51499.jpg", flat, "--benchmark", "coca", "--root", coca
    )
    alien = run_of(tmp_path / "alien", ("2007_000033.jpg", "unicorn", 0.8, [0]))
    expect_error("has 'unicorn', not a category", alien, "--benchmark", "voc2012", "--root", root)


def test_masks_of_rotated_photos(tmp_path):
    """A run and `segment` have masks of the upright photo, here 6 x 4 for the 4 x 6 pixels in the file."""
    root = miniatures.write("voc2012", tmp_path)
    photos = root / "VOCdevkit/VOC2012/JPEGImages"
    rotate(photos / "2007_000033.jpg", 6)
    words = ["--benchmark", "voc2012", "--root", root]
    upright = np.zeros((6, 4), bool)
    upright[2:4, 1:] = True  # the first three rows of columns 2 and 3 in the file: the whole plane
    (tmp_path / "run/masks").mkdir(parents=True)
    record = MaskRecord.from_mask("2007_000033.jpg", upright, "aeroplane", 0.5, 0.5)
    write_shard(tmp_path / "run/masks/00000.jsonl", [record])
    figures, _ = figures_of(tmp_path, tmp_path / "run", *words)
    assert figures["mean_iou"] == 1
    save(tmp_path / "own", 15, category_names("voc2012"))
    assert command("segment", tmp_path / "own", photos, "--out", tmp_path / "out").exit_code == 0
    figures, _ = figures_of(tmp_path, tmp_path / "out", *words)
    assert figures["iou"]["person"] == pytest.approx(6 / 41, abs=1e-6)


def test_photo_names_match_from_their_end():
    matcher = PhotoMatcher(Path("/data/CoCA/image"), ["Accordion/1.jpg", "whisk/1.jpg", "whisk/2.jpg"])
    assert matcher.add("whisk/1.png") == "whisk/1.jpg"
    assert matcher.add("pile.tar/whisk/2.jpg") == "whisk/2.jpg"
    assert matcher.add("/data/CoCA/image/whisk/2.jpg") == "whisk/2.jpg"
    assert matcher.add("2") == "whisk/2.jpg"
    assert matcher.add("dog/2.jpg") is None and matcher.add("3.jpg") is None and matcher.add("") is None
    assert matcher.matches == {
        "whisk/1.jpg": ((2, False), "whisk/1.png"),
        "whisk/2.jpg": ((5, True), "/data/CoCA/image/whisk/2.jpg"),
    }


def test_suffixes_tell_photos_of_the_same_name_apart():
    names = ["a/1.jpg", "a/1.PNG"]
    matcher = PhotoMatcher(Path("/photos"), names)
    assert [matcher.add(name) for name in names] == names
    with pytest.raises(UserError, match=r"'a/1\.gif' may be a/1\.PNG or a/1\.jpg in /photos"):
        matcher.add("a/1.gif")
    for order in (names, names[::-1]):
        matcher = PhotoMatcher(Path("/photos"), names[:1])
        assert [matcher.add(name) for name in order] == ["a/1.jpg"] * 2
        assert matcher.matches == {"a/1.jpg": ((2, True), "a/1.jpg")}


# -- wrong and incomplete folders ------------------------------------------------------------------------------------

WRONG = {
    "voc2012": {
        "VOCdevkit/VOC2012/ImageSets/Segmentation": "there is no folder ImageSets/Segmentation in it, nor in VOC2012",
        "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": "--split val: there is no such split in",
        "VOCdevkit/VOC2012/SegmentationClass": "VOC2012/SegmentationClass",
        "VOCdevkit/VOC2012/JPEGImages": "VOC2012/JPEGImages",
    },
    "coco2017": {
        "annotations": "there is no folder annotations in it",
        "annotations/instances_val2017.json": "expected instances_val2017.json",
        "val2017": "val2017, nor ",
    },
    "coca": {"image": "there is no folder image in it", "binary": "there is no folder"},
    "cityscapes-object": {
        "leftImg8bit": "there is no folder leftImg8bit in it",
        "leftImg8bit/val": "there is no such split in",
        "gtFine": "there is no folder",
        "gtFine/val/*/*_labelIds.png": "there are no CITY/*_gtFine_labelIds.png in",
    },
    "imagenet-s50": {
        "ImageNetS50": "there is no folder validation in it, nor in ImageNetS50",
        "ImageNetS50/validation-segmentation": "there is no folder",
    },
    "duts-te": {
        "DUTS-TE/DUTS-TE-Mask": "there is no folder DUTS-TE-Mask in it, nor in DUTS-TE, DUTS/DUTS-TE",
        "DUTS-TE/DUTS-TE-Mask/*": "there is no photo with ground truth in",
    },
}


@pytest.mark.parametrize("dataset", WRONG)
def test_what_is_missing_is_named(tmp_path, dataset):
    for number, (missing, message) in enumerate(WRONG[dataset].items()):
        root = miniatures.write(dataset, tmp_path / str(number))
        for path in root.glob(missing):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        expect_error(message, tmp_path, "--benchmark", dataset, "--root", root)
    expect_error("is not a folder", tmp_path, "--benchmark", dataset, "--root", tmp_path / "none")


def test_photos_and_truth_without_counterpart_are_counted_and_named(tmp_path):
    root = miniatures.write("coca", tmp_path)
    masks = write_predictions("coca", tmp_path / "predictions")
    (root / "image/Accordion/51499.jpg").rename(root / "image/Accordion/2.jpg")
    figures, done = figures_of(tmp_path, masks, "--benchmark", "coca", "--root", root)
    assert figures["photos"] == 2 and figures["photos_without_truth"] == figures["truth_without_photo"] == 1
    assert "photos without ground truth: 1, such as " in done.stderr and "Accordion/2.jpg" in done.stderr
    assert "missing photos: 1, such as " in done.stderr and "Accordion/51499.png" in done.stderr

    root = miniatures.write("voc2012", tmp_path)
    masks = write_predictions("voc2012", tmp_path / "predictions")
    (root / "VOCdevkit/VOC2012/JPEGImages/2007_000042.jpg").unlink()
    _, done = figures_of(tmp_path, masks, "--benchmark", "voc2012", "--root", root)
    assert "missing photos: 1, such as " in done.stderr and "2007_000042.jpg" in done.stderr


@pytest.mark.parametrize("folder", ["image", "binary"])
def test_files_of_the_same_name_are_named(tmp_path, folder):
    root = miniatures.write("coca", tmp_path)
    masks = write_predictions("coca", tmp_path / "predictions")
    suffixes = {"image": (".jpg", ".png"), "binary": (".PNG", ".png")}[folder]
    first, second = (root / folder / f"whisk/51499{suffix}" for suffix in suffixes)
    for path in {first, second} - {*first.parent.iterdir()}:
        Image.new("L", (6, 4)).save(path)
    message = f"{first} and {second} have the same name; remove one of them"
    expect_error(message, masks, "--benchmark", "coca", "--root", root)


def test_splits(tmp_path):
    roots = {
        name: miniatures.write(name, tmp_path) for name in ("voc2012", "cityscapes-object", "imagenet-s50", "coca")
    }
    for name, split, message in (
        ("voc2012", "test", "there are train, val"),
        ("cityscapes-object", "test", "there are train, val"),
        ("imagenet-s50", "test", "the labels of ImageNet-S's test photos are not public"),
        ("imagenet-s50", "train", "there are val"),
        ("coca", "val", "coca has only one split"),
    ):
        expect_error(message, tmp_path, "--benchmark", name, "--root", roots[name], "--split", split)


def damaged(tmp_path, dataset, path, content):
    root = miniatures.write(dataset, tmp_path)
    (root / path).write_bytes(content)
    return ["--benchmark", dataset, "--root", root]


def test_damaged_files_are_named(tmp_path):
    label = "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png"
    masks = write_predictions("voc2012", tmp_path / "voc")
    expect_error("2007_000033.png cannot be read", masks, *damaged(tmp_path / "0", "voc2012", label, b"text"))
    masks = write_predictions("coco2017", tmp_path / "coco")
    path = "annotations/instances_val2017.json"
    expect_error(f"{path}: ", masks, *damaged(tmp_path / "1", "coco2017", path, b"{"))
    expect_error("KeyError: 'categories'", masks, *damaged(tmp_path / "2", "coco2017", path, b"{}"))
    content = json.loads((miniatures.write("coco2017", tmp_path) / path).read_text())
    for number, (segmentation, message) in enumerate(
        (
            ({"size": [6, 4], "counts": [24]}, "its size is [6, 4], that of its photo [4, 6]"),
            ({"size": [4, 6], "counts": [4]}, "its run lengths do not fit its size"),
            ({"size": [4, 6], "counts": "d"}, "its run lengths do not fit its size"),
            ([[0, 0, 1]], "expected lists of x and y"),
            ([[0, 0, 1, 1, float("inf"), 0]], "coordinates far outside the photo"),
            ([[0, 0, 1, 1, 1e9, 0]], "coordinates far outside the photo"),
            ("abc", "damaged"),
        )
    ):
        content["annotations"][0]["segmentation"] = segmentation
        words = damaged(tmp_path / f"3{number}", "coco2017", path, json.dumps(content).encode())
        expect_error("000000000139.jpg: the segmentation of annotation 1 is damaged", masks, *words)
        expect_error(message, masks, *words)
    content["annotations"][1]["image_id"] = 7
    words = damaged(tmp_path / "6", "coco2017", path, json.dumps(content).encode())
    expect_error("annotation 2 is of image 7, which is not listed", masks, *words)
    content["categories"][0]["name"] = "wall"
    words = damaged(tmp_path / "4", "coco2017", path, json.dumps(content).encode())
    expect_error("'wall' is not one of the 80 categories", masks, *words)
    torch.save(constant_network(21, 15).state_dict(), tmp_path / "w.pth")
    words = damaged(tmp_path / "5", "voc2012", "VOCdevkit/VOC2012/JPEGImages/2007_000042.jpg", b"text")
    expect_error("2007_000042.jpg: not an image", tmp_path / "w.pth", "--encoder", ENCODER, *words)


def test_sizes_and_masks_that_do_not_fit(tmp_path):
    root = miniatures.write("voc2012", tmp_path)
    words = ["--benchmark", "voc2012", "--root", root]
    masks = write_predictions("voc2012", tmp_path / "masks")
    write_label_map(masks / "2007_000033.png", np.zeros((6, 4), int), 21)
    expect_error("2007_000033.png: the prediction is 6 x 4, the truth 4 x 6", masks, *words)
    write_label_map(masks / "2007_000033.png", np.full((4, 6), 22), 23)
    expect_error("masks/2007_000033.png has the id 22: classes are 0 to 20", masks, *words)
    (masks / "2007_000033.png").unlink()
    expect_error("JPEGImages/2007_000033.jpg: there is no mask of that name in", masks, *words)
    shutil.rmtree(masks)
    masks.mkdir()
    expect_error(f"there are no PNG masks in {masks}, nor a segmenter", masks, *words)
    expect_error("does not exist", tmp_path / "none", *words)
    coca = miniatures.write("coca", tmp_path)
    Image.fromarray(np.ones((4, 6), np.uint8)).save(coca / "binary/whisk/51499.png")
    masks = write_predictions("coca", tmp_path / "coca-masks")
    expect_error("whisk/51499.png holds 0 and 1; expected gray values", masks, "--benchmark", "coca", "--root", coca)
    write_label_map(coca / "binary/whisk/51499.png", np.eye(4, 6, dtype=int), 3)
    expect_error("51499.png is a picture of colors", masks, "--benchmark", "coca", "--root", coca)
    (coca / "binary/whisk").rename(coca / "binary/broom")
    expect_error("'broom' is not a category of CoCA", masks, "--benchmark", "coca", "--root", coca)


def test_options_that_do_not_fit_together(tmp_path):
    root = miniatures.write("ecssd", tmp_path)
    ecssd = ["--benchmark", "ecssd", "--root", root]
    expect_error("pass PREDICTIONS and TRUTH, or a --benchmark", tmp_path)
    expect_error("--root requires --benchmark", tmp_path, tmp_path, "--root", root)
    expect_error("a detector requires --benchmark", tmp_path, tmp_path, "--tau", 0.1)
    expect_error("pass the folder of ecssd with --root FOLDER", tmp_path, "--benchmark", "ecssd")
    expect_error("leave out TRUTH, --ignore: --benchmark ecssd", tmp_path, tmp_path, *ecssd, "--ignore", 3)
    expect_error("pass PREDICTIONS, or --detector", *ecssd)
    expect_error("ecssd has no categories", tmp_path, *ecssd, "--categories", "cat")
    expect_error("not both", tmp_path, *ecssd, "--detector", "spectral")
    voc = miniatures.write("voc2012", tmp_path)
    expect_error("--detector is for ecssd", "--benchmark", "voc2012", "--root", voc, "--detector", "spectral")
    torch.save(constant_network(21, 15).state_dict(), tmp_path / "w.pth")
    expect_error("ecssd scores masks of objects", tmp_path / "w.pth", *ecssd)


PUBLISHED = {  # photos, split, classes, ignored id, beginning of the published figures
    "voc2012": (1449, "val", 20, 255, "NamedMask 59.3 mIoU (89.2"),
    "coco2017": (5000, "val", 80, None, "NamedMask 27.7 mIoU (76.4"),
    "coca": (1295, None, 80, None, "NamedMask 27.4 mIoU (82.0"),
    "cityscapes-object": (500, "val", 14, None, "NamedMask 18.2 mIoU (93.0"),
    "imagenet-s50": (752, "val", 50, 1000, "NamedMask 47.5 mIoU"),
    "imagenet-s300": (4097, "val", 300, 1000, "NamedMask 33.1 mIoU"),
    "imagenet-s919": (12419, "val", 919, 1000, "NamedMask 23.1 mIoU"),
    "ecssd": (1000, None, 0, None, "SelfMask IoU 0.781, with the bilateral solver 0.818; cluster voting's"),
    "duts-te": (5019, None, 0, None, "SelfMask IoU 0.626, with the bilateral solver 0.660; cluster voting's"),
    "dut-omron": (5168, None, 0, None, "SelfMask IoU 0.582, with the bilateral solver 0.655; cluster voting's"),
}  # fmt: skip


def test_published_figures():
    assert list(PUBLISHED) == list(BENCHMARKS)
    for name, (*expected, figures) in PUBLISHED.items():
        about = BENCHMARKS[name]
        assert [about.photos, about.split, about.classes, about.ignore] == expected, name
        assert about.published.startswith(figures)
    assert BENCHMARKS["ecssd"].published.endswith("pseudo-masks 0.646")
    assert BENCHMARKS["duts-te"].published.endswith("pseudo-masks 0.466")
    assert BENCHMARKS["dut-omron"].published.endswith("pseudo-masks 0.403")


def test_gray_values(tmp_path):
    """Above 127 is object. A file of low values, colors, transparency or 16 bits does not hold 0 and 255."""

    def save(pixels, **options):
        Image.fromarray(pixels).save(tmp_path / "a.png", **options)
        return tmp_path / "a.png"

    values = np.array([[0, 1, 2, 127, 128, 255]], np.uint8)
    np.testing.assert_array_equal(read_gray(save(values)), values)
    assert read_mask(save(values)).tolist() == [[False] * 4 + [True] * 2]
    assert read_mask(save(values > 127)).tolist() == [[False] * 4 + [True] * 2]  # 1 bit
    assert not read_mask(save(0 * values)).any()
    for pixels, message in (
        (values[:, :2], "holds 0 and 1; expected gray values from 0 to 255"),
        (values.astype(np.uint16), "is a picture of colors, transparency or 16 bits"),
        (np.stack([values, values, values + 1], -1), "is a picture of colors, transparency or 16 bits"),
        (np.stack([values] * 4, -1), "is a picture of colors, transparency or 16 bits"),
    ):
        with pytest.raises(UserError, match=message):
            read_gray(save(pixels))
    (tmp_path / "a.png").write_bytes(encoded_png(1, 1, 16, 2, b"\0" + b"\xff" * 6))
    with pytest.raises(UserError, match="transparency or 16 bits"):
        read_gray(tmp_path / "a.png")
    for high in (2, 38, 127):
        assert read_gray(save(values[:, :2] * np.uint8(high))).max() == high  # of a prediction
        with pytest.raises(UserError, match=f"holds values from 0 to {high}; expected 0 and 255"):
            read_mask(tmp_path / "a.png")
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(UserError, match=r"a\.png cannot be read as a PNG"):
        read_gray(tmp_path / "a.png")


def test_segmentations_of_coco():
    square = [1, 1, 4, 1, 4, 3, 1, 3]
    expected = np.zeros((4, 6), bool)
    expected[1:3, 1:4] = True
    for polygons in ([square], [square, [5, 0, 5, 3]], [square, []], [square, square]):  # two points cover nothing
        np.testing.assert_array_equal(_rasterized(polygons, 4, 6), expected)
    for nothing in ([], None, {}):
        with pytest.raises(ValueError, match="annotation 8 has no segmentation: a box or a point is no mask"):
            Instance(3, nothing, 8).mask(4, 6)
    assert _rasterized([[-1e5, -1e5, 1e5, -1e5, 1e5, 1e5, -1e5, 1e5]], 4, 6).all()
    columns = {"size": [4, 6], "counts": [5, 2, 2, 2, 2, 2, 9]}
    np.testing.assert_array_equal(_rasterized(columns, 4, 6), expected)
    for counts in ([24], [0, 24]):
        assert _rasterized({"size": [4, 6], "counts": counts}, 4, 6).all() == (len(counts) == 2)
    for segmentation, message in (
        ([[0.0, 0, 1, 1, 1e5 + 1, 0]], "far outside"),
        ([[0, 0, 1, 1, -1e5 - 1, 0]], "far outside"),
        ([square, "ab"], "lists of x and y"),
        ({"size": [4, 6], "counts": [25, -1]}, "run lengths do not fit"),
        ({"size": [4, 6], "counts": [[24]]}, "run lengths do not fit"),
        ({"size": [4, 6], "counts": [23]}, "run lengths do not fit"),
        ({"size": [4, 6], "counts": []}, "run lengths do not fit"),
        ({"size": [4, 6], "counts": [1 << 62] * 4 + [24]}, "run lengths do not fit"),  # the sum overflows to 24
    ):
        with pytest.raises(ValueError, match=message):
            _rasterized(segmentation, 4, 6)
    top = Instance(7, columns | {"counts": [0, 6, 18]}, 2, crowd=True)
    photo = Instances((4, 6), [Instance(3, [square], 1), Instance(None, [square], 5), top])
    painted = photo.labels()
    for label, kind in ((3, 0), (7, 1)):
        expected = np.zeros((2, 4, 6), bool)
        expected[kind] = _rasterized([square], 4, 6) if label == 3 else top.mask(4, 6)
        assert (photo.masks(label) == expected).all()
    assert painted[:, 0].tolist() == [7] * 4 and painted[:2, 1].tolist() == [7, 7]
    assert (painted[2, 1:4] == 3).all() and painted[3].tolist() == [7, 0, 0, 0, 0, 0]


def test_names_of_classes_and_photos(printing, capsys):
    assert key_of("TV/monitor 2") == key_of("tvMonitor2") == "tvmonitor2" and key_of("Ka\u0308se") == "käse"
    names = ["หมี", "หมู", "कार", "कर", "☕", "⚽", "c", "c++"]  # vowels are marks in Thai and Hindi
    assert len(set(map(key_of, names))) == len(names)
    assert [_without_suffix(name) for name in ("a.jpg", "a.b.PNG", "a.b", "a", "jpg")] == [
        "a", "a.b", "a.b", "a", "jpg"]  # fmt: skip
    for name in (".jpg", "a/.jpg", "..jpg"):  # never without a name
        assert _without_suffix(name) == name and PhotoMatcher(Path("/"), [name]).add(name) == name
    assert path_parts("/a//./b/c") == ("a", "b", "c")
    assert [_shared_end([*"abc"], list(other)) for other in ("abc", "xbc", "bc", "c", "cb", "", "zabc")] == [
        3, 2, 2, 1, 0, 0, 3]  # fmt: skip
    table = class_table(["Dog", "cat"], ["cat", "bird", "dog"], "it")
    assert table.tolist() == [0, 3, 1] and table.dtype == np.uint16
    assert "it has no class for 1 of 3 categories, counted as missed: 'bird'" in capsys.readouterr().err
    assert class_table(["a"], ["a"], "it").tolist() == [0, 1] and not capsys.readouterr().err


def test_masks_of_a_photo_are_painted_in_the_order_of_their_scores():
    def record(category, score, columns):
        mask = np.zeros((2, 4), bool)
        mask[:, columns] = True
        return MaskRecord.from_mask("a.jpg", mask, category, score, 0.5)

    records = {"a.jpg": [record("cat", 0.5, [0, 1]), record("dog", None, [1, 2]), record("cat", -0.5, [2, 3])]}
    [(name, labels)] = _painted(records, ["dog", "cat"])
    assert name == "a.jpg" and labels.dtype == np.uint16 and labels.tolist() == [[2, 2, 1, 2]] * 2
    with pytest.raises(UserError, match=r"the category 'cat' of 'a.jpg' is not in archive\.json"):
        list(_painted(records, ["dog"]))
    [(_, united)] = _united(records)
    assert united.all()


# -- saliency --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [name for name in BENCHMARKS if not BENCHMARKS[name].classes])
def test_saliency_of_png_files_and_of_a_run(tmp_path, dataset):
    """One mask has twice the area of its object and contains it; the other is perfect."""
    root = miniatures.write(dataset, tmp_path)
    wide = np.zeros((32, 48), bool)
    wide[8:24, 8:40] = True
    right = np.zeros((32, 48), bool)
    right[:, 24:] = True
    names = sorted(path.stem for path in root.rglob("*.jpg"))
    (tmp_path / "png").mkdir()
    for name, mask in zip(names, (wide, right), strict=True):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "png" / f"{name}.png")
    (tmp_path / "run/masks").mkdir(parents=True)
    pairs = [(f"{name}.jpg", mask) for name, mask in zip(names, (wide, right), strict=True)]
    records = [MaskRecord.from_mask(name, mask, "thing", None, 0.5) for name, mask in pairs]
    write_shard(tmp_path / "run/masks/00000.jsonl", records)
    for predictions in (tmp_path / "png", tmp_path / "run"):
        figures, done = figures_of(tmp_path, predictions, "--benchmark", dataset, "--root", root)
        assert figures["iou"] == 0.75
        assert figures["pixel_accuracy"] == pytest.approx((5 / 6 + 1) / 2, abs=1e-6)
        assert figures["mean_absolute_error"] == pytest.approx(1 / 12, abs=1e-6)
        assert figures["max_f_beta"] == pytest.approx((1.3 * 0.5 / (0.3 * 0.5 + 1) + 1) / 2, abs=1e-6)
        assert 0.5 < figures["s_measure"] < 1
        assert f"\n2 photos of {dataset} " in done.stdout
        assert "0.750" in done.stdout and "published: SelfMask IoU 0." in done.stdout
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "png" / f"{names[0]}.png")
    expect_error("the prediction is 5 x 5, the truth 32 x 48", tmp_path / "png", "--benchmark", dataset, "--root", root)


def test_saliency_of_a_detector(tmp_path, detector_options):
    root = miniatures.write("ecssd", tmp_path)
    words = [
        "--benchmark",
        "ecssd",
        "--root",
        root,
        "--detector",
        "spectral",
        *detector_options,
        "--refine",
        "bilateral",
    ]
    figures, done = figures_of(tmp_path, *words)
    backbone, weights = detector_options[1], detector_options[3]
    detector = {"backbone": backbone, "backbone_weights": weights, "image_size": 96, "features": "tokens"}
    config = make_config({"photos": "", "detector": {**detector, "center_features": True}})
    photos, ious = root / "ECSSD/images", []
    for batch in Labeler(config, "cpu").label(PhotoSource(photos), [("0001.jpg", None), ("0002.jpg", None)]):
        for (name, _), label in batch:
            truth = np.asarray(Image.open(root / "ECSSD/ground_truth_mask" / name.replace("jpg", "png"))) > 127
            mask = label.mask.decode()
            ious.append((mask & truth).sum() / (mask | truth).sum())
    assert figures["iou"] == pytest.approx(np.mean(ious), abs=1e-6) and figures["photos"] == 2
    assert "detector spectral, refinement bilateral" in done.stdout


def test_s_measure_of_cases_computed_by_hand():
    corner = np.array([[True, False], [False, False]])
    # Object and background: 2 * 0.5 / (0.25 + 1) = 0.8 each; every region is one flat pixel, so its SSIM is 1.
    assert saliency.s_measure(np.full((2, 2), 0.5), corner) == pytest.approx(0.9, abs=1e-12)
    # Object: mean 0.5, deviation sqrt(0.5); background: 1. Left half: covariance 0, variance 0.5, so 0; right half: 1.
    half = np.array([[True, True, False, False]])
    expected = 0.5 * (0.5 / (1.25 + 0.5**0.5) + 0.5) + 0.5 * 0.5
    assert saliency.s_measure(np.array([[True, False, False, False]]), half) == pytest.approx(expected, abs=1e-12)
    assert saliency.s_measure(half, half) == pytest.approx(1, abs=1e-12)
    assert saliency.s_measure(~half, half) == 0.5  # objects 0, but both halves are flat
    assert saliency.s_measure(np.full((1, 4), 0.25), np.zeros((1, 4), bool)) == 0.75
    assert saliency.s_measure(np.full((1, 4), 0.25), np.ones((1, 4), bool)) == 0.25


def test_s_measure_equals_the_formula():
    """Means, deviations and covariances of numpy, on the four parts around the center of the object."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:13, :17]
    for center in ((4, 5), (9, 11), (6, 15)):
        truth = (y - center[0]) ** 2 + 0.7 * (x - center[1]) ** 2 < 14
        soft = np.clip(0.6 * truth + 0.4 * rng.random(truth.shape), 0, 1)
        parts = [(truth, soft), (~truth, 1 - soft)]
        objects = sum(
            part.mean() * 2 * values[part].mean() / (values[part].mean() ** 2 + 1 + values[part].std(ddof=1))
            for part, values in parts
        )
        row, column = (int(np.round(axis.mean() + 1)) for axis in np.nonzero(truth))
        regions = 0.0
        for part in (np.s_[:row, :column], np.s_[:row, column:], np.s_[row:, :column], np.s_[row:, column:]):
            a, b = soft[part].ravel(), truth[part].ravel().astype(float)
            if a.size > 1:
                (var_a, both), (_, var_b) = np.cov(a, b)
                products = a.mean() * b.mean() * both
                similarity = 4 * products / ((a.mean() ** 2 + b.mean() ** 2) * (var_a + var_b)) if products else 0
                regions += a.size / truth.size * similarity
        assert saliency.s_measure(soft, truth) == pytest.approx(0.5 * objects + 0.5 * regions, abs=1e-9)
    opposite = saliency.s_measure(1.0 - truth, truth)
    assert opposite == 0  # objects and regions are below 0


def test_f_beta_equals_the_formula_at_every_threshold():
    rng = np.random.default_rng(0)
    truth = rng.random((20, 30)) < 0.3
    soft = np.clip(0.5 * truth + 0.6 * rng.random((20, 30)), 0, 1)
    soft = np.round(soft * 255) / 255
    for prediction in (soft, soft > 0.5, np.zeros_like(soft)):
        expected = []
        for threshold in range(1, 256):
            mask = np.round(prediction * 255) >= threshold
            precision = (mask & truth).sum() / max(mask.sum(), 1)
            recall = (mask & truth).sum() / truth.sum()
            expected.append(1.3 * precision * recall / (0.3 * precision + recall) if precision else 0)
        np.testing.assert_allclose(saliency.f_beta(prediction, truth), expected, rtol=0, atol=1e-12)
    assert saliency.f_beta(soft > 2, np.zeros_like(truth)).max() == 0
    assert len(set(saliency.f_beta(soft > 0.5, truth))) == 1


def test_iou_and_error_of_soft_maps():
    truth = np.array([[True, True, False, False]])
    figures, _ = saliency.SaliencyScores.score(np.array([[1.0, 0.25, 0.75, 0.0]]), truth)
    assert figures[0] == pytest.approx(1 / 3) and figures[1] == 0.5 and figures[3] == 1.5 / 4
    assert saliency.iou(~truth & truth, ~truth & truth) == 1
