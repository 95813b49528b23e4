# SPDX-License-Identifier: MIT
"""Masks of a run against labels made by hand: PNG label maps, masks of objects, COCO files; the suggested cut."""

from __future__ import annotations

import json
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.stats import spearmanr

from namedmask.archive import Archive, Retrieved, write_archive
from namedmask.evaluate.runs import best_cut, rank_correlation, read_coco_labels
from namedmask.masks import MaskRecord, read_masks, write_shard
from small_world import command

SIZE = (4, 5)
# Columns of the mask and of the label; the score. IoUs: 1, 1/2, 0, and both empty.
PHOTOS = {
    "cat/1.jpg": ("cat", slice(0, 2), slice(0, 2), 0.9),
    "cat/2.jpg": ("cat", slice(0, 4), slice(2, 4), 0.55),
    "dog/1.jpg": ("dog", slice(0, 1), slice(2, 4), 0.2),
    "dog/2.jpg": ("dog", slice(0, 0), slice(0, 0), 0.0),
    "dog/without label.jpg": ("dog", slice(0, 1), None, 0.3),
}


def columns(which) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[:, which] = True
    return mask


@pytest.fixture
def run(tmp_path):
    """A run whose photos have the names of class folders."""
    out = tmp_path / "run"
    (out / "masks").mkdir(parents=True)
    records = [
        MaskRecord.from_mask(name, columns(mask), category, None, score)
        for name, (category, mask, _, score) in PHOTOS.items()
    ]
    write_shard(out / "masks" / "00000.jsonl", records)
    archive = {"cat": [], "dog": []}
    for record in records:
        archive[record.category].append(Retrieved(record.photo, None))
    write_archive(out / "archive.json", Archive(list(archive), archive))
    return out


def write_png(folder, name: str, labels: np.ndarray) -> None:
    path = (folder / name).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(path)


def label_pngs(folder, value=None):
    """The labels as PNGs: label maps, or masks of the object with this value."""
    for name, (category, _, label, _) in PHOTOS.items():
        if label is not None:
            write_png(folder, name, columns(label) * (value or 1 + (category == "dog")))
    return folder


def coco_file(path, unlabeled=()):
    """The labels as a COCO file, one rectangle per object."""
    labels = {name: (category, label) for name, (category, _, label, _) in PHOTOS.items() if label is not None}
    images, annotations = [], []
    for number, (name, (category, label)) in enumerate(labels.items()):
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        low, high = label.start, label.stop
        annotation = {"id": number, "image_id": number, "category_id": 7 if category == "cat" else 3}
        if name not in unlabeled:
            annotations.append({**annotation, "segmentation": [[low, 0, high, 0, high, SIZE[0], low, SIZE[0]]]})
    categories = [{"id": 3, "name": "Dog"}, {"id": 7, "name": "cat"}, {"id": 9, "name": "sofa"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def figures_of(out, truth, *words):
    path = truth.parent / "figures.json"
    done = command("evaluate", out, truth, *words, "--json", path)
    assert done.exit_code == 0, done.output
    return json.loads(path.read_text()), done


@pytest.mark.parametrize("kind", ["label maps", "0 and 255", "0 and 1", "coco"])
def test_figures_of_a_run(run, tmp_path, kind):
    truth = tmp_path / "truth"
    if kind == "coco":
        coco_file(truth)
    else:
        label_pngs(truth, {"label maps": None, "0 and 255": 255, "0 and 1": 1}[kind])
    for out in (run, run / "masks"):
        figures, done = figures_of(out, truth)
        assert figures == {
            "photos": 4,
            "labels": 4,
            "masks": 3,  # in the fourth photo, neither mask nor label have a pixel
            "mean_iou": 0.5,
            "categories": {"cat": {"masks": 2, "mean_iou": 0.75}, "dog": {"masks": 1, "mean_iou": 0.0}},
            "scores": [
                {"from": 0.2, "to": 0.3, "masks": 1, "mean_iou": 0.0},
                {"from": 0.5, "to": 0.6, "masks": 1, "mean_iou": 0.5},
                {"from": 0.9, "to": 1.0, "masks": 1, "mean_iou": 1.0},
            ],
            "rank_correlation": 1.0,
            "suggested_min_score": 0.55,  # F1 0.8, 0.857 and 0.667
            "kept_masks": 2,
            "kept_mean_iou": 0.75,
            "predictions": f"photos with masks in {run / 'masks'}: 4 of 4; others, which are not scored: 1",
        }
        assert "suggested --min-score 0.55: keeps 2 of 3 masks, with a mean IoU of 75.0 %" in done.stdout
        assert "warning: only 3 masks with a label" in done.stderr


def test_ignored_pixels_do_not_count(run, tmp_path):
    truth = label_pngs(tmp_path / "truth")
    labels = columns(slice(2, 4)).astype(np.uint8)
    labels[:, 0] = 255  # the mask of columns 0 to 3 has one wrong column left
    write_png(truth, "cat/2.jpg", labels)
    assert figures_of(run, truth)[0]["categories"]["cat"]["mean_iou"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    labels[:, 0] = 9
    write_png(truth, "cat/2.jpg", labels)
    assert figures_of(run, truth, "--ignore", 9)[0]["mean_iou"] == pytest.approx((1 + 2 / 3) / 3, abs=1e-6)


def test_crowd_regions_are_ignored_unless_there_is_nothing_else(run, tmp_path):
    truth = coco_file(tmp_path / "labels.json")
    content = json.loads(truth.read_text())
    crowds = [one | {"iscrowd": 1, "id": 9 + one["id"]} for one in content["annotations"]]
    # The mask of cat/2.jpg has columns 0 to 3, its object columns 2 and 3; the crowd is all but the last two columns.
    crowds[1]["segmentation"] = [[0, 0, 3, 0, 3, SIZE[0], 0, SIZE[0]]]
    truth.write_text(json.dumps(content | {"annotations": [*content["annotations"], *crowds]}))
    figures, done = figures_of(run, truth)
    assert figures["categories"]["cat"]["mean_iou"] == 1.0
    assert figures["categories"]["dog"]["mean_iou"] == 0.0  # crowds where objects are, change nothing
    assert "crowd regions are ignored, 4 of 8 annotations. " in done.stderr
    truth.write_text(json.dumps(content | {"annotations": crowds}))
    figures, done = figures_of(run, truth)  # 3 of 4 columns
    assert figures["categories"]["cat"]["mean_iou"] == (1 + 3 / 4) / 2 and "crowd" not in done.stderr


@pytest.mark.parametrize("kind", ["brush", "url"])
def test_photos_of_label_studio_are_found_by_their_urls(run, tmp_path, kind):
    """Its export of painted masks has the last part of the URL, and the URL as `path`; others have the URL alone."""
    truth = coco_file(tmp_path / "labels.json")
    content = json.loads(truth.read_text())
    names = {"cat/1.jpg": "cat/a b.jpg", "cat/2.jpg": "100%é.jpg", "dog/1.jpg": "dog/a b.jpg", "dog/2.jpg": "x/?d=.jpg"}
    records = [replace(one, photo=names.get(one.photo, one.photo)) for one in read_masks(run / "masks")]
    write_shard(run / "masks" / "00000.jsonl", records)
    for image in content["images"]:
        url = f"/data/local-files/?d={quote(names[image['file_name']])}"
        image |= {"file_name": url.rpartition("/")[2], "path": url} if kind == "brush" else {"file_name": url}
    truth.write_text(json.dumps(content))
    figures, _ = figures_of(run, truth)
    assert (figures["photos"], figures["mean_iou"]) == (4, 0.5)


def test_labels_without_folders_and_other_orders_of_categories(run, tmp_path):
    write_png(tmp_path / "flat", "2.png", columns(slice(2, 4)) * 2)
    (run / "masks" / "00000.jsonl").write_text((run / "masks" / "00000.jsonl").read_text().replace("dog/2", "dog/3"))
    figures, _ = figures_of(run, tmp_path / "flat", "--categories", "dog,cat")
    assert figures["categories"] == {"cat": {"masks": 1, "mean_iou": 0.5}} and figures["rank_correlation"] is None


def test_masks_that_cannot_be_compared_are_left_out(run, tmp_path):
    second = MaskRecord.from_mask("cat/1.jpg", columns(slice(0, 2)), "dog", None, 0.1)
    write_shard(run / "masks" / "00001.jsonl", [second])
    figures, done = figures_of(run, label_pngs(tmp_path / "binary", 255))
    assert figures["masks"] == 2 and "2 of 5 masks cannot be compared: a mask in" in done.stderr
    assert figures_of(run, label_pngs(tmp_path / "maps"))[0]["categories"]["dog"]["masks"] == 2
    figures, done = figures_of(run, label_pngs(tmp_path / "cats"), "--categories", "cat,bird")
    assert list(figures["categories"]) == ["cat"] and "has no category dog" in done.stderr
    # Photos in a COCO file without any annotation are not labeled yet.
    figures, _ = figures_of(run, coco_file(tmp_path / "some.json", unlabeled=["cat/1.jpg", "dog/2.jpg"]))
    assert (figures["photos"], figures["masks"]) == (2, 2)


def test_errors_have_one_line(run, tmp_path):
    def expect_error(message, truth, *words):
        done = command("evaluate", run, truth, *words)
        assert done.exit_code == 2 and message in done.stderr.splitlines()[-1], done.output
        assert all("warning" in line for line in done.stderr.splitlines()[:-1])

    write_png(tmp_path / "other", "holiday.png", columns(slice(1, 2)))
    expect_error(f"no photo, such as 'cat/1.jpg', has the name of one in {tmp_path / 'other'}, such as 'holiday'",
                 tmp_path / "other")  # fmt: skip
    expect_error(f"{tmp_path / 'none'} does not exist", tmp_path / "none")
    truth = label_pngs(tmp_path / "truth")
    expect_error("shows the category of its photo", truth, "--categories", "bird,fish,cat,dog")
    expect_error("4 of 4 masks cannot be compared", truth, "--categories", "bird,fish")
    expect_error("has the id 2: classes are 0 to 1, and 255 is ignored", truth, "--categories", "dog")
    write_png(truth, "cat/1.jpg", np.ones(SIZE[::-1]))
    expect_error("1.png is 5 x 4, as if its photo were not upright; the mask of 'cat/1.jpg' is 4 x 5", truth)
    coco = coco_file(tmp_path / "labels.json")
    content = json.loads(coco.read_text())
    for change, message in (
        ({"annotations": []}, "labels.json has no annotation"),
        ({"categories": 3}, "labels.json: TypeError"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]}, "masks cannot be compared"),
    ):
        coco.write_text(json.dumps(content | change))
        expect_error(message, coco)
    for change, message in (
        ({"file_name": ""}, "image 1 has the file name ''"),
        ({"height": 10**12}, "image 1 is 1000000000000 x 5 (height x width)"),
        ({"height": -1}, "image 1 is -1 x 5 (height x width)"),
        ({"height": float("inf")}, "labels.json: OverflowError"),
        ({"height": float("nan")}, "labels.json: cannot convert"),
        ({"height": None}, "labels.json: TypeError"),
    ):
        coco.write_text(
            json.dumps(content | {"images": [content["images"][0] | {"id": 1} | change], "annotations": []})
        )
        expect_error(message, coco)
    for key, other in (  # as in files that were joined from several
        ("images", {"file_name": "cat/2.jpg"}), ("images", {"id": 1}), ("categories", {"id": 7})
    ):  # fmt: skip
        coco.write_text(json.dumps(content | {key: [content[key][0] | other, *content[key][1:]]}))
        ((name, value),) = other.items()
        expect_error(
            f"labels.json: several {key} have the {name.replace('_', ' ')} {value!r}; the file is damaged: export it",
            coco,
        )
    own = [one for one in content["annotations"] if one["image_id"] == 0]
    for name in (".jpg", "cat/.jpg", "..jpg"):
        images = [content["images"][0] | {"file_name": name}]
        coco.write_text(json.dumps(content | {"images": images, "annotations": own}))
        expect_error("no photo, such as 'cat/1.jpg', has the name of one in", coco)
    for change in ({"segmentation": []}, {}):  # boxes of CVAT and Label Studio; of others
        coco.write_text(json.dumps(content | {"annotations": [
            {key: one[key] for key in ("id", "image_id", "category_id")} | change for one in content["annotations"]
        ]}))  # fmt: skip
        expect_error("labels.json: cat/1.jpg: annotation 0 has no segmentation: a box or a point is no mask", coco)
    content["annotations"][0]["segmentation"] = {"size": [4, 5], "counts": "zz"}
    coco.write_text(json.dumps(content))
    expect_error("cat/1.jpg: the segmentation of annotation 0 is damaged", coco)


def test_names_that_differ_in_punctuation_are_told_apart(tmp_path):
    truth = coco_file(tmp_path / "labels.json")
    content = json.loads(truth.read_text())
    truth.write_text(json.dumps(content | {"categories": [{"id": 3, "name": "C"}, {"id": 7, "name": "c#"}]}))
    labels = read_coco_labels(truth, ["c#", "c"])
    for name in labels.where:
        category, _, label, _ = PHOTOS[name]
        own, other = ("c", "c#") if category == "dog" else ("c#", "c")
        np.testing.assert_array_equal(labels.read(name, own)[0], columns(label))
        assert not labels.read(name, other)[0].any()


@settings(max_examples=30)
@given(hnp.arrays(float, st.integers(2, 30), elements=st.integers(0, 5).map(float)), st.randoms())
def test_rank_correlation_is_that_of_scipy(values, random):
    other = np.array([value + random.randint(0, 3) for value in values])
    if len(set(values)) < 2 or len(set(other)) < 2:
        assert np.isnan(rank_correlation(values, other))
    else:
        assert rank_correlation(values, other) == pytest.approx(spearmanr(values, other).statistic)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1))
def test_no_cut_has_a_higher_f1(pairs):
    scores, ious = (np.array(values) / 8 for values in zip(*pairs, strict=True))

    def f1(cut):
        kept = ious[scores >= cut]
        return 2 * kept.sum() / (len(kept) + ious.sum()) if len(kept) else 0

    cut = best_cut(scores, ious)
    assert f1(cut) == pytest.approx(max(map(f1, scores)))
    assert all(f1(lower) < f1(cut) + 1e-9 for lower in scores[scores < cut])
