# SPDX-License-Identifier: MIT
"""`namedmask convert`: data sets are read by the tools that they are for, and give back the masks of the run."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from namedmask.convert import FORMATS, Options, convert, describe
from namedmask.convert.cvat import row_runs
from namedmask.convert.dataset import file_name, split_photos
from namedmask.convert.label_studio import LONGEST, brush_rle
from namedmask.errors import NothingUsable, UserError
from namedmask.formats import JPEG_SIDE, read_label_map, write_label_map
from namedmask.masks import MaskRecord, write_errors, write_shard
from namedmask.photos import PhotoSource
from namedmask.record import RunRecord, StageRecord
from namedmask.review import write_review
from namedmask.selection import Selection
from small_world import command, files_of

CATEGORIES = ["cat", "dog", 'a "b" & <ü>']
HOSTILE = ["a.png", "sub/a.jpg", "sub_a.jpg", "x y.v2.jpg", "ü" * 100 + ".png", os.fsdecode(b"caf\xe9.png")]
ROTATED = "turned.jpg"
SPLIT = (0.6, 0.2, 0.2)


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """A mask with parts, holes and single pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.hypot(y - height / 3, x - width / 3) < min(height, width) / 4
    mask &= np.hypot(y - height / 3, x - width / 3) > min(height, width) / 9
    mask |= (y > height * 0.8) & (x > width * 0.6)
    mask[tuple(rng.integers(0, side) for side in mask.shape)] = True
    return mask


def save_photo(path: Path, seed: int, height: int, width: int, orientation: int = 1, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path, exif=exif, **options)


def write_run(out: Path, photos: Path, records: list[MaskRecord]) -> Path:
    archive = {name: [{"photo": r.photo, "score": 0.3} for r in records if r.category == name] for name in CATEGORIES}
    (out / "masks").mkdir(parents=True)
    write_shard(out / "masks" / "00000.jsonl", records)
    write_errors(out / "masks" / "00000.errors.jsonl", [])
    (out / "archive.json").write_text(json.dumps({"categories": CATEGORIES, "photos": archive}))
    RunRecord(str(photos), {"archive": StageRecord({"categories": CATEGORIES}), "pseudolabel": StageRecord()}).write(
        out
    )
    return out


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[tuple[str, str], MaskRecord]:
    """The masks of the run, by photo and category: two masks per photo, which overlap; one empty."""
    found = {}
    for number, name in enumerate([*HOSTILE, ROTATED, *(f"{n}.jpg" for n in range(5))]):
        height, width = 48 + 4 * number, 96 - 4 * number
        for k in range(2):
            mask = blobs(2 * number + k, height, width) if k == 0 else np.roll(blobs(number, height, width), 5, 1)
            category = CATEGORIES[(number + k) % 3]
            found[name, category] = MaskRecord.from_mask(name, mask, category, 0.2, 0.3 + (number + 7 * k) / 40)
    empty = np.zeros(found["0.jpg", "dog"].size, bool)
    found["0.jpg", "cat"] = MaskRecord.from_mask("0.jpg", empty, "cat", 0.2, 0.0)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory, records) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    for number, (name, size) in enumerate({photo: record.size for (photo, _), record in records.items()}.items()):
        height, width = size
        if name == ROTATED:
            save_photo(folder / "photos" / name, number, width, height, orientation=6)
        else:
            save_photo(folder / "photos" / name, number, height, width)
    return write_run(folder / "run", folder / "photos", list(records.values()))


@pytest.fixture(scope="module")
def truth(records) -> dict[tuple[str, str], np.ndarray]:
    return {key: record.mask() for key, record in records.items() if record.area}


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def labels_of(records, photo: str) -> np.ndarray:
    """The label map of a photo: the mask with the higher score is on top."""
    own = sorted((r for (name, _), r in records.items() if name == photo), key=lambda r: r.score)
    labels = np.zeros(own[0].size, np.uint8)
    for record in own:
        labels[record.mask()] = CATEGORIES.index(record.category) + 1
    return labels


def photos_of(out: Path) -> dict[str, str]:
    """The photo of each NAME."""
    lines = map(json.loads, (out / "photos.jsonl").read_text().splitlines())
    return {line["name"]: line["photo"] for line in lines}


def test_coco_is_read_by_pycocotools_and_torchvision(run, truth, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from torchvision.datasets import CocoDetection

    result = convert(run, "coco", tmp_path / "out", Options(split=SPLIT))
    assert result.photos == {"train": 7, "val": 3, "test": 2} and result.masks == len(truth) and not result.failed
    found, image_ids = {}, []
    for split, count in result.photos.items():
        path = tmp_path / "out" / "annotations" / f"instances_{split}.json"
        coco = COCO(path)
        image_ids += list(coco.imgs)
        for annotation in coco.anns.values():
            image, category = coco.imgs[annotation["image_id"]], coco.cats[annotation["category_id"]]["name"]
            mask = coco.annToMask(annotation).astype(bool)
            found[image["file_name"], category] = mask
            ys, xs = mask.nonzero()
            assert annotation["area"] == mask.sum() and annotation["id"] == len(found)
            assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        detections = [
            {key: annotation[key] for key in ("image_id", "category_id", "segmentation", "score")}
            for annotation in coco.anns.values()
        ]
        score = COCOeval(coco, coco.loadRes(detections), "segm")
        score.evaluate()
        score.accumulate()
        score.summarize()
        assert score.stats[0] == 1
        dataset = CocoDetection(result.root, path)
        assert [len(target) for _, target in dataset] == [len(coco.imgToAnns[number]) for number in coco.imgs]
        assert len(dataset) == count
    assert image_ids == list(range(1, 13))
    assert found.keys() == truth.keys() and all((found[key] == mask).all() for key, mask in truth.items())


def test_the_coco_importer_of_fiftyone_reads_all_masks(run, truth, tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "1")
    coco = pytest.importorskip("fiftyone.utils.coco", reason="fiftyone is not installed")
    result = convert(run, "coco", tmp_path / "out", Options(split=SPLIT))
    found = {}
    for split in result.photos:
        importer = coco.COCODetectionDatasetImporter(  # Dataset.from_dir reads with it; a Dataset needs MongoDB
            data_path=str(result.root),
            labels_path=str(tmp_path / "out" / "annotations" / f"instances_{split}.json"),
            label_types="segmentations",
        )
        with importer:
            assert importer.get_dataset_info()["classes"] == CATEGORIES
            assert len(importer) == result.photos[split]
            for image, metadata, objects in importer:
                for detection in objects.detections:
                    mask = np.zeros((metadata.height, metadata.width), bool)
                    x, y, *_ = detection.bounding_box
                    left, top = round(x * metadata.width), round(y * metadata.height)
                    height, width = detection.mask.shape
                    mask[top : top + height, left : left + width] = detection.mask
                    found[os.path.relpath(image, result.root), detection.label] = mask
    assert found.keys() == truth.keys() and all((found[key] == mask).all() for key, mask in truth.items())


@pytest.mark.parametrize("to", ["coco", "yolo-seg"])
def test_supervision_reads_as_many_objects_as_there_are(to, run, truth, tmp_path):
    supervision = pytest.importorskip("supervision", reason="the extra `readers` is not installed")
    out = tmp_path / "out"
    convert(run, to, out, Options(photos="copy", upright=True))
    if to == "coco":
        path = out / "annotations" / "instances_train.json"
        images = json.loads(path.read_text())["images"]
        names = {str(out / "images" / image["file_name"]): image["photo"] for image in images}
        data = supervision.DetectionDataset.from_coco(str(out / "images"), str(path), force_masks=True)
    else:
        names = {str(path): photos_of(out)[path.stem] for path in (out / "images" / "train").iterdir()}
        folders = (str(out / "images" / "train"), str(out / "labels" / "train"), str(out / "data.yaml"))
        data = supervision.DetectionDataset.from_yolo(*folders, force_masks=True)
    found = {
        (names[path], data.classes[number]): mask
        for path, detections in data.annotations.items()
        for mask, number in zip(detections.mask, detections.class_id, strict=True)
    }
    assert found.keys() == truth.keys()
    ious = [iou(found[key], mask) for key, mask in truth.items()]
    assert min(ious) == 1 if to == "coco" else min(ious) > 0.8


def test_ultralytics_reads_yolo_seg_and_yolo_semantic(run, records, truth, tmp_path):
    pytest.importorskip("ultralytics", reason="the extra `readers` is not installed")
    from ultralytics.data.dataset import SemanticDataset, YOLODataset
    from ultralytics.data.utils import check_det_dataset, polygon2mask

    for to, kind in (("yolo-seg", YOLODataset), ("yolo-semantic", SemanticDataset)):
        out = tmp_path / to
        convert(run, to, out, Options(split=SPLIT))
        data, names, seen = check_det_dataset(out / "data.yaml"), photos_of(out), 0
        for split in ("train", "val", "test"):
            task = to.removeprefix("yolo-").replace("seg", "segment") if to == "yolo-seg" else "semantic"
            dataset = kind(img_path=data[split], data=data, task=task, augment=False)
            for number, label in enumerate(dataset.labels):
                photo = names[Path(label["im_file"]).stem]
                if to == "yolo-semantic":
                    assert (dataset.load_mask(number) == labels_of(records, photo)).all()
                    seen += 1
                    continue
                for segment, index in zip(label["segments"], label["cls"].ravel(), strict=True):
                    expected = truth[photo, data["names"][int(index)]]
                    mask = polygon2mask(expected.shape, [(segment * expected.shape[::-1]).ravel()]) > 0
                    assert iou(mask, expected) > 0.8
                    seen += 1
        assert seen == (len(truth) if to == "yolo-seg" else 12)


def test_yolo_label_files_hold_one_line_per_mask(run, truth, tmp_path):
    convert(run, "yolo-seg", tmp_path / "out")
    files = list((tmp_path / "out" / "labels" / "train").iterdir())
    lines = [line.split() for file in files for line in file.read_text().splitlines()]
    assert len(files) == 12 and len(lines) == len(truth)
    assert all(len(line) >= 7 and len(line) % 2 and 0 <= int(line[0]) < 3 for line in lines)
    assert all(0 <= float(value) < 1 for line in lines for value in line[1:])


def test_polygons_restore_masks_with_holes():
    cv2 = pytest.importorskip("cv2", reason="the extra `yolo` is not installed")
    from namedmask.convert.yolo import polygon

    rng = np.random.default_rng(0)
    whole = 0
    for _ in range(150):
        height, width = rng.integers(1, 50, 2)
        noise = cv2.GaussianBlur(rng.random((height, width)), (0, 0), rng.uniform(0.3, 4))
        mask = np.ascontiguousarray(noise.reshape(height, width) > np.quantile(noise, rng.uniform(0.05, 0.95)))
        if not mask.any():
            continue
        points = polygon(mask)
        drawn = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [points.astype(np.int32)], 1).astype(bool)
        assert len(points) >= 3 and drawn[mask].all()
        if cv2.connectedComponents(mask.view(np.uint8), connectivity=8)[0] == 2:  # with the background
            whole += 1
            assert (drawn == mask).all()
    assert whole > 20


@pytest.mark.parametrize("gray", [False, True])
def test_png_holds_the_classes(gray, run, records, tmp_path):
    convert(run, "png", tmp_path / "out", Options(gray=gray))
    names = photos_of(tmp_path / "out")
    assert sorted(names.values()) == sorted({photo for photo, _ in records})
    for name, photo in names.items():
        path = tmp_path / "out" / "masks" / "train" / f"{name}.png"
        assert (read_label_map(path) == labels_of(records, photo)).all()
        with Image.open(path) as image:
            assert image.mode == ("L" if gray else "P")
    assert json.loads((tmp_path / "out" / "categories.json").read_text()) == {"categories": CATEGORIES}
    assert not (tmp_path / "out" / "images").exists()


def test_voc_is_read_by_torchvision(run, records, tmp_path):
    from torchvision.datasets import VOCSegmentation

    convert(run, "voc", tmp_path / "out", Options(split=SPLIT, upright=True))
    names = photos_of(tmp_path / "out")
    counts = {split: len(VOCSegmentation(tmp_path / "out", image_set=split)) for split in ("train", "val", "trainval")}
    assert counts == {"train": 7, "val": 3, "trainval": 10}
    dataset = VOCSegmentation(tmp_path / "out", image_set="trainval")
    for (image, labels), path in zip(dataset, dataset.images, strict=True):
        with Image.open(path) as opened:
            assert opened.format == "JPEG" and image.size == labels.size
        expected = labels_of(records, names[Path(path).stem])
        assert (np.asarray(labels) == expected).all()
        objects = read_label_map(Path(path.replace("JPEGImages", "SegmentationObject")).with_suffix(".png"))
        assert ((objects > 0) == (expected > 0)).all() and len(np.unique(objects)) == len(np.unique(expected))
    assert (tmp_path / "out" / "labelmap.txt").read_text().splitlines()[1:3] == ["background:0,0,0::", "cat:128,0,0::"]


def test_cvat_masks_follow_the_documented_layout(run, truth, tmp_path):
    convert(run, "cvat", tmp_path / "out", Options(split=SPLIT))
    found = {}
    for split in ("train", "val", "test"):
        root = ET.parse(tmp_path / "out" / f"{split}.xml").getroot()
        assert root.findtext("version") == "1.1"
        assert [label.findtext("name") for label in root.iter("label")] == CATEGORIES
        for image in root.iter("image"):
            for element in image.iter("mask"):
                left, top, width, height = (int(element.get(key)) for key in ("left", "top", "width", "height"))
                runs = list(map(int, element.get("rle").split(", ")))
                part = np.repeat(np.arange(len(runs)) % 2 > 0, runs).reshape(height, width)
                mask = np.zeros((int(image.get("height")), int(image.get("width"))), bool)
                mask[top : top + height, left : left + width] = part
                found[image.get("name"), element.get("label")] = mask
    expected = {
        (photo.replace(os.fsdecode(b"\xe9"), "\\udce9"), category): mask for (photo, category), mask in truth.items()
    }
    assert found.keys() == expected.keys() and all((found[key] == mask).all() for key, mask in expected.items())


def test_datumaro_reads_cvat(run, truth, tmp_path):
    components = pytest.importorskip("datumaro.components.dataset", reason="datumaro is not installed")
    convert(run, "cvat", tmp_path / "out", Options(photos="copy", upright=True))
    dataset = components.Dataset.import_from(str(tmp_path / "out" / "train.xml"), "cvat")
    masks = [np.asarray(one.image).astype(bool) for item in dataset for one in item.annotations]
    key = lambda mask: (mask.shape, mask.tobytes())  # noqa: E731
    assert sorted(map(key, masks)) == sorted(map(key, truth.values()))


def decode_brush(data: list[int]) -> np.ndarray:
    """The values in Label Studio's RLE, read bit by bit as its documentation and its decoder do."""
    bits, place = "".join(f"{byte:08b}" for byte in data), 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    count, word = read(32), read(5) + 1
    sizes, values = [read(4) + 1 for _ in range(4)], []
    while len(values) < count:
        repeated, length = read(1), read(sizes[read(2)]) + 1
        values += [read(word)] * length if repeated else [read(word) for _ in range(length)]
    assert len(values) == count and len(bits) - place < 8
    return np.array(values, np.uint8)


def test_label_studio_gets_predictions_as_brush_strokes(run, truth, tmp_path):
    convert(run, "label-studio", tmp_path / "out")
    found = {}
    for task in json.loads((tmp_path / "out" / "train.json").read_text()):
        photo = os.fsdecode(unquote_to_bytes(task["data"]["image"].removeprefix("/data/local-files/?d=")))
        for result in task["predictions"][0]["result"]:
            height, width, value = result["original_height"], result["original_width"], result["value"]
            assert (result["type"], value["format"], result["image_rotation"]) == ("brushlabels", "rle", 0)
            values = decode_brush(value["rle"]).reshape(height, width, 4)
            assert (values == values[..., :1]).all() and set(np.unique(values)) <= {0, 255}
            found[photo, value["brushlabels"][0]] = values[..., 3] > 0
    assert found.keys() == truth.keys() and all((found[key] == mask).all() for key, mask in truth.items())
    config = ET.parse(tmp_path / "out" / "labels.xml").getroot()
    assert [label.get("value") for label in config.iter("Label")] == CATEGORIES


@pytest.mark.parametrize("first", [False, True])
def test_brush_runs_of_all_lengths(first):
    lengths = [1, 2, 3, 4, 5, 64, 65, LONGEST // 4, LONGEST // 4 + 1, LONGEST, 7]
    mask = (np.repeat(np.arange(len(lengths)) % 2 > 0, lengths) != first)[None]
    assert (decode_brush(brush_rle(mask)).reshape(-1, 4)[:, 0] > 0).tolist() == mask[0].tolist()
    assert row_runs(mask) == ([0, *lengths] if first else lengths)


def test_the_decoder_of_label_studio_agrees(truth):
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="label-studio-sdk is not installed")
    mask = truth["a.png", "cat"]
    assert (brush.decode_rle(brush_rle(mask)).reshape(*mask.shape, 4)[..., 3] > 0).tolist() == mask.tolist()


def check_objects(objects: list[dict], masks: dict[str, np.ndarray], names: list[str]) -> None:
    from pycocotools import mask as coco

    assert len(objects) == len(masks)
    for one in objects:
        size = next(iter(masks.values())).shape
        rle = one["rle"] if "rle" in one else one["segmentation"]["counts"]
        name = names[one["category"]] if isinstance(one["category"], int) else one["category"]
        assert (coco.decode({"size": list(size), "counts": rle.encode()}) == masks[name]).all()


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_datasets_reads_parquet_and_webdataset(to, run, records, truth, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `readers` is not installed")
    convert(run, to, tmp_path / "out", Options(split=SPLIT))
    # The suffix of a photo names its column in a WebDataset, so only photos with one suffix form a table.
    if to == "webdataset":
        pngs = [photo for photo, _ in records if photo.endswith(".png")]
        shutil.rmtree(tmp_path / "out")
        kept = [record for (photo, _), record in records.items() if photo not in pngs]
        convert(write_run(tmp_path / "run", run.parent / "photos", kept), to, tmp_path / "out", Options(split=SPLIT))
    data = datasets.load_dataset(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    rows = [row for split in data.values() for row in split]
    assert {row["photo"] if to == "parquet" else row["json"]["photo"] for row in rows} == {
        photo.encode("utf-8", "backslashreplace").decode()
        for photo, _ in records
        if to == "parquet" or not photo.endswith(".png")
    }
    for row in rows:
        photo = row["photo"] if to == "parquet" else row["json"]["photo"]
        photo = photo.replace("\\udce9", os.fsdecode(b"\xe9"))
        labels = row["labels"] if to == "parquet" else row["seg.png"]
        assert (np.asarray(labels) == labels_of(records, photo)).all()
        image = row["image"] if to == "parquet" else row["jpg"]
        assert image.size == labels.size  # `datasets` applies the EXIF orientation
        own = {category: mask for (name, category), mask in truth.items() if name == photo}
        check_objects(row["objects"] if to == "parquet" else row["json"]["objects"], own, ["background", *CATEGORIES])


def test_a_webdataset_holds_the_files_of_a_photo_together(run, truth, tmp_path):
    convert(run, "webdataset", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    names = list(members)
    keys = [name.split(".")[0] for name in names]
    assert len(names) == 36 and all(len(set(keys[k : k + 3])) == 1 for k in range(0, 36, 3)) and len(set(keys)) == 12
    for name, about in zip(names[::3], names[2::3], strict=True):
        fields = json.loads(members[about])
        with Image.open(io.BytesIO(members[name])) as image:
            assert {image.width, image.height} == {fields["width"], fields["height"]}


def test_webdataset_reads_its_tars(run, truth, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the extra `readers` is not installed")
    convert(run, "webdataset", tmp_path / "out")
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False))
    assert len(samples) == 12
    assert sum(len(json.loads(sample["json"])["objects"]) for sample in samples) == len(truth)


@pytest.mark.parametrize("to", FORMATS)
def test_bytes_depend_on_the_data_alone(to, run, tmp_path):
    for number in range(2):
        convert(run, to, tmp_path / str(number), Options(split=SPLIT))
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1")
    assert not list(tmp_path.glob(".tmp*"))


def test_names_of_files_are_unique_and_plain():
    taken: set[str] = set()
    assert file_name("sub/a.jpg", taken) == "sub_a"
    assert file_name("sub_a.png", taken).startswith("sub_a~")
    assert file_name("SUB/A.jpg", taken).startswith("SUB_A~")
    assert file_name("x y.v2.jpg", taken) == "x_y_v2"
    assert file_name(os.fsdecode(b"caf\xe9.jpg"), taken) == "caf_"
    assert file_name(os.fsdecode(b"caf\xe8.jpg"), taken).startswith("caf_~")
    long = file_name("ü" * 300 + ".jpg", taken)
    assert len(long.encode()) <= 200 and long != file_name("ü" * 301 + ".jpg", taken)
    assert len(taken) == 8


def test_a_split_depends_on_names_and_seed_alone():
    photos = [f"{n}.jpg" for n in range(1000)]
    split = split_photos(photos, (0.8, 0.1, 0.1))
    counts = [list(split.values()).count(one) for one in ("train", "val", "test")]
    assert counts == [800, 100, 100]
    assert split == split_photos(photos[::-1], (0.8, 0.1, 0.1))
    assert split != split_photos(photos, (0.8, 0.1, 0.1), seed=1)
    grown = split_photos([*photos, "new.jpg"], (0.8, 0.1, 0.1))
    assert sum(grown[photo] != split[photo] for photo in photos) <= 2
    with pytest.raises(UserError, match=r"sum to 1, such as \.8 \.1 \.1"):
        split_photos(photos, (0.8, 0.1, 0.2))
    with pytest.raises(UserError, match="of 3 photos, test would have none"):
        split_photos(photos[:3], (0.8, 0.1, 0.1))


def masks_in(out: Path) -> set[tuple[str, str]]:
    data = json.loads((out / "annotations" / "instances_train.json").read_text())
    photos = {image["id"]: image["photo"] for image in data["images"]}
    return {(photos[one["image_id"]], CATEGORIES[one["category_id"] - 1]) for one in data["annotations"]}


def test_selection_and_review_choose_masks(run, records, truth, tmp_path):
    written = convert(run, "coco", tmp_path / "scores", Options(Selection(min_score=0.5)))
    assert written.left_out == len(truth) - written.masks > 0
    assert f"left out by score: {written.left_out} masks" in describe(written, "coco", tmp_path / "scores")
    assert masks_in(tmp_path / "scores") == {key for key in truth if records[key].score >= 0.5}
    convert(run, "coco", tmp_path / "best", Options(Selection(per_category=2)))
    assert len(masks_in(tmp_path / "best")) == 6
    reviewed = tmp_path / "run"
    shutil.copytree(run, reviewed)
    write_review(reviewed, {("a.png", "cat"): "reject", ("1.jpg", CATEGORIES[2]): "accept"})
    convert(reviewed, "coco", tmp_path / "review", Options(Selection(min_score=0.99)))
    assert masks_in(tmp_path / "review") == {("1.jpg", CATEGORIES[2])}
    with (reviewed / "review.jsonl").open("a") as file:
        file.write('{"photo": "a.png", "category": "cta", "verdict": "reject"}\n')
    warned = command("convert", reviewed, "--to", "coco", "--out", tmp_path / "warned")
    assert warned.exit_code == 0 and "verdicts about no mask: 1 of 3, such as 'a.png' (cta)" in warned.stderr
    written = convert(reviewed, "coco", tmp_path / "rejected")
    assert (written.left_out, written.rejected) == (0, 1)
    assert "rejected by the review: 1 mask" in describe(written, "coco", tmp_path / "rejected")
    assert masks_in(tmp_path / "rejected") == set(truth) - {("a.png", "cat")}


def test_largest_part(run, truth, tmp_path):
    from pycocotools.coco import COCO
    from scipy import ndimage

    convert(run, "coco", tmp_path / "out", Options(largest_part=True))
    coco = COCO(tmp_path / "out" / "annotations" / "instances_train.json")
    for one in coco.anns.values():
        whole = truth[coco.imgs[one["image_id"]]["photo"], coco.cats[one["category_id"]]["name"]]
        parts, count = ndimage.label(whole)
        largest = np.bincount(parts.ravel())[1:].max()
        mask = coco.annToMask(one)
        assert count > 1 and one["area"] == mask.sum() == largest and whole[mask > 0].all()


def test_rotated_photos_are_named_or_written_upright(run, records, tmp_path):
    result = command("convert", run, "--to", "coco", "--out", tmp_path / "paths")
    assert result.exit_code == 0 and f"stored rotated (EXIF): 1 of 12 photos, '{ROTATED}'" in result.output
    assert (tmp_path / "paths" / "rotated.txt").read_text() == f"{ROTATED}\n"
    assert not (tmp_path / "paths" / "images").exists()
    result = command("convert", run, "--to", "coco", "--out", tmp_path / "upright", "--upright")
    assert result.exit_code == 0 and "EXIF" not in result.output
    original = PhotoSource(run.parent / "photos")
    for image in json.loads((tmp_path / "upright" / "annotations" / "instances_train.json").read_text())["images"]:
        path = tmp_path / "upright" / "images" / image["file_name"]
        with Image.open(path) as opened:
            assert opened.size == (image["width"], image["height"]) and opened.getexif().get(0x0112, 1) == 1
            difference = np.abs(np.asarray(opened.convert("RGB"), int) - original.decode(image["photo"]).pixels)
        assert difference.mean() < 3
        if image["photo"] != ROTATED:
            assert path.read_bytes() == original.read(image["photo"])


def test_photos_are_linked_or_copied(run, tmp_path):
    for option in ("link", "copy"):
        out = tmp_path / option
        assert command("convert", run, "--to", "png", "--out", out, f"--{option}").exit_code == 0
        files = list((out / "images" / "train").iterdir())
        assert len(files) == 12 and all(file.is_symlink() == (option == "link") for file in files)
        for file in files:
            assert file.read_bytes() == (run.parent / "photos" / photos_of(out)[file.stem]).read_bytes()


def test_photos_in_tars_are_extracted(records, run, tmp_path):
    (tmp_path / "photos").mkdir()
    with tarfile.open(tmp_path / "photos" / "some.tar", "w") as tar:
        for name in ("0.jpg", "1.jpg"):
            tar.add(run.parent / "photos" / name, name)
    own = [
        replace(one, photo=f"some.tar/{photo}") for (photo, _), one in records.items() if photo in ("0.jpg", "1.jpg")
    ]
    out = write_run(tmp_path / "run", tmp_path / "photos", own)
    result = command("convert", out, "--to", "coco", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "some.tar/0.jpg is in a tar" in result.output and "--copy" in result.output
    assert command("convert", out, "--to", "yolo-semantic", "--out", tmp_path / "out", "--copy").exit_code == 0
    for name in ("0", "1"):
        file = tmp_path / "out" / "images" / "train" / f"some_tar_{name}.jpg"
        assert file.read_bytes() == (run.parent / "photos" / f"{name}.jpg").read_bytes()


@pytest.fixture
def segmented(run, tmp_path) -> Path:
    """A folder as `namedmask segment` writes it: two photos with objects, one without, one that has failed."""
    out = tmp_path / "segmented"
    (out / "masks").mkdir(parents=True)
    shapes = {"0.jpg": 1, "1.jpg": 2, "2.jpg": 0}
    for name, classes in shapes.items():
        height, width = PhotoSource(run.parent / "photos").size(name)
        labels = np.zeros((height, width), np.uint8)
        for number in range(classes):
            labels[5 * number : 5 * number + 4, 3:20] = number + 1
        write_label_map(out / "masks" / f"{name[0]}.png", labels, 4)
    lines = [json.dumps({"photo": f"{n}.jpg", "mask": f"masks/{n}.png"}) for n in range(4)]
    (out / "photos.jsonl").write_text("\n".join(lines) + "\n")
    (out / "categories.json").write_text(json.dumps({"categories": CATEGORIES}))
    RunRecord(str(run.parent / "photos"), {"segment": StageRecord()}).write(out, "segment.json")
    return out


def test_label_maps_of_segment_are_converted(segmented, tmp_path):
    result = convert(segmented, "png", tmp_path / "out")
    assert result.photos == {"train": 3} and result.masks == 3 and result.failed == 1
    for n in range(3):
        old, new = segmented / "masks" / f"{n}.png", tmp_path / "out" / "masks" / "train" / f"{n}.png"
        assert old.read_bytes() == new.read_bytes()
    assert "it has no mask" in (tmp_path / "out" / "errors.jsonl").read_text()
    convert(segmented, "coco", tmp_path / "coco")
    data = json.loads((tmp_path / "coco" / "annotations" / "instances_train.json").read_text())
    assert len(data["images"]) == 3 and len(data["annotations"]) == 3 and "score" not in data["annotations"][0]
    with pytest.raises(UserError, match=r"no scores\.jsonl"):
        convert(segmented, "coco", tmp_path / "never", Options(Selection(min_score=0.5)))


def test_confidences_of_segment_are_scores(segmented, tmp_path):
    categories = {"cat": {"confidence": 0.9, "area": 68}, "dog": {"confidence": 0.4, "area": 68}}
    lines = [json.dumps({"photo": f"{n}.jpg", "confidence": 0.5, "categories": categories}) for n in range(2)]
    (segmented / "scores.jsonl").write_text("\n".join(lines) + "\n")
    convert(segmented, "coco", tmp_path / "out", Options(Selection(min_score=0.5)))
    data = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert [(one["category_id"], one["score"]) for one in data["annotations"]] == [(1, 0.9), (1, 0.9)]


def test_overwrite_replaces_only_what_convert_wrote(run, tmp_path):
    out = tmp_path / "out"
    convert(run, "png", out)
    (out / "notes.txt").write_text("mine")
    (out / "masks" / "train" / "mine.png").write_text("mine")
    before = files_of(out)
    with pytest.raises(UserError, match="has a data set already"):
        convert(run, "coco", out)
    assert files_of(out) == before
    convert(run, "coco", out, overwrite=True)
    assert {name for name in files_of(out) if not name.startswith(("annotations", "."))} == {
        "notes.txt",
        "masks/train/mine.png",
        "rotated.txt",
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="has not written"):
        convert(run, "coco", tmp_path / "other", overwrite=True)
    convert(run, "png", tmp_path / "third")
    (tmp_path / "third" / "annotations").write_text("mine")
    before = files_of(tmp_path / "third")
    with pytest.raises(UserError, match="annotations is in the way"):
        convert(run, "coco", tmp_path / "third", overwrite=True)
    assert files_of(tmp_path / "third") == before


def test_a_failure_leaves_the_folder_as_it_was(run, tmp_path, monkeypatch):
    from namedmask.convert import png

    convert(run, "coco", tmp_path / "out")
    before = files_of(tmp_path / "out")

    def fail(dataset):
        raise OSError(28, "No space left on device", "masks")

    monkeypatch.setattr(png, "list_photos", fail)
    for out in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            convert(run, "png", out, overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_photos_that_cannot_be_used_are_left_out(run, records, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(run.parent / "photos", photos)
    (photos / "0.jpg").unlink()
    save_photo(photos / "1.jpg", 0, 16, 16)
    result = command("convert", run, "--to", "png", "--out", tmp_path / "out", "--photos", photos)
    assert result.exit_code == 0 and "could not be used: 2 photos" in result.output
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert {error["photo"]: error["reason"][:8] for error in errors} == {"0.jpg": "no such ", "1.jpg": "has chan"}
    (tmp_path / "none").mkdir()
    with pytest.raises(NothingUsable, match="no photo of the chosen masks"):
        convert(run, "png", tmp_path / "never", photos=tmp_path / "none")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "coco", "--link", "--copy"], "--link or --copy, not both"),
        (["--to", "parquet", "--copy"], "leave out --copy"),
        (["--to", "coco", "--gray"], "--gray has no effect on --to coco"),
        (["--to", "coco", "--keep-fraction", "2"], "--keep-fraction: expected a number above 0"),
        (["--to", "coco", "--per-category", "0"], "--per-category: expected at least 1"),
        (["--to", "coco", "--min-score", "1"], "lower --min-score"),
        (["--to", "coco", "--min-score", "3"], "--min-score: expected a number from 0 to 1, got 3.0"),
        (["--to", "coco", "--split", "1", "1", "1"], "sum to 1"),
        (["--to", "yolo"], "is not one of"),
    ],
)
def test_wrong_options_are_one_line(options, message, run, tmp_path):
    result = command("convert", run, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "out").exists()
    assert len(result.output.strip().splitlines()) == 1


def test_other_folders_are_rejected(tmp_path):
    with pytest.raises(UserError, match="neither a run folder nor"):
        convert(tmp_path, "coco", tmp_path / "out")


def test_any_category_name_can_be_written(run, tmp_path):
    """Names of class folders may hold any bytes."""
    names = dict(zip(CATEGORIES, (os.fsdecode(b"caf\xe9"), "#a:\nb\x7f\x85\u2028", "\x01\U0001f600"), strict=True))
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run" / "archive.json", tmp_path / "run" / "masks" / "00000.jsonl"):
        text = path.read_text()
        for old, new in names.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        path.write_text(text)
    for name in FORMATS:
        convert(tmp_path / "run", name, tmp_path / name)
    shown = ["caf\\udce9", "#a:\nb\\u007f\\u0085\\u2028", "\\u0001\U0001f600"]
    yaml = pytest.importorskip("yaml")
    assert list(yaml.safe_load((tmp_path / "yolo-seg" / "data.yaml").read_bytes())["names"].values()) == shown
    assert [one.get("value") for one in ET.parse(tmp_path / "label-studio" / "labels.xml").iter("Label")] == shown
    results = json.loads((tmp_path / "label-studio" / "train.json").read_text())[0]["predictions"][0]["result"]
    assert {one["value"]["brushlabels"][0] for one in results} <= set(shown)
    assert [one.text for one in ET.parse(tmp_path / "cvat" / "train.xml").iter("name")][1:] == shown
    coco = json.loads((tmp_path / "coco" / "annotations" / "instances_train.json").read_text())
    assert [one["name"] for one in coco["categories"]] == list(names.values())
    labels = (tmp_path / "voc" / "labelmap.txt").read_text().split("\n")
    assert [line.split(":")[0] for line in labels[2:5]] == [shown[0], "_a__b\\u007f\\u0085\\u2028", shown[2]]


def test_photos_of_every_format_are_written_upright(tmp_path):
    names = [f"turned.{suffix}" for suffix in ("jpg", "png", "webp", "tif")]
    compressions = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    names += [f"{compression}.tif" for compression in compressions]
    records = [MaskRecord.from_mask(name, blobs(0, 48, 72), "cat", 0.2, 0.5) for name in names]
    for name in names:
        compression = {"compression": Path(name).stem} if Path(name).stem in compressions else {}
        save_photo(tmp_path / "photos" / name, 0, 72, 48, orientation=6, **compression)
    write_run(tmp_path / "run", tmp_path / "photos", records)
    assert convert(tmp_path / "run", "coco", tmp_path / "out").rotated == names
    voc = convert(tmp_path / "run", "voc", tmp_path / "voc")
    assert voc.rotated == names[:1]  # the others are encoded as JPEG, upright
    for path in (tmp_path / "voc").rglob("*.jpg"):
        with Image.open(path) as opened:
            assert (opened.getexif().get(0x0112, 1) != 1) == (opened.size == (48, 72))
    convert(tmp_path / "run", "coco", tmp_path / "upright", Options(upright=True))
    for path in (tmp_path / "upright" / "images" / "train").iterdir():
        with Image.open(path) as image:
            assert image.getexif().get(0x0112, 1) == 1 and image.size == (72, 48), path
            assert path.stem not in compressions or image.info["compression"] == path.stem


@pytest.mark.parametrize("upright", [False, True])
def test_photos_have_suffixes_that_readers_know(upright, tmp_path):
    """Readers choose files, and how to decode them, by suffixes; names in lists and URLs may have others or none."""
    kinds = {
        "scan": "png",
        "a.dat": "jpeg",
        "a.JFIF": "jpeg",
        "b.jpeg": "jpeg",
        "false.jpg": "png",
        "moving.gif": "gif",
    }
    kinds |= {"b.tiff": "tiff", "two.jpe": "mpo"}
    expected = {
        "scan": "png",
        "a.dat": "jpg",
        "a.JFIF": "jpg",
        "b.jpeg": "jpg",
        "false.jpg": "png",
        "moving.gif": "gif",
    }
    expected |= {"b.tiff": "tif", "two.jpe": "jpg"}
    for number, (name, kind) in enumerate(kinds.items()):
        save_photo(tmp_path / name, number, 48, 72, orientation=1, format=kind)
    (tmp_path / "list.txt").write_text("\n".join(kinds))
    records = [MaskRecord.from_mask(name, blobs(0, 48, 72), "cat", 0.2, 0.5) for name in kinds]
    run, original = write_run(tmp_path / "run", tmp_path / "list.txt", records), PhotoSource(tmp_path / "list.txt")
    for to in FORMATS:
        convert(run, to, tmp_path / to, Options(upright=upright))

    def suffixes(files) -> dict[str, str]:
        names = photos_of(tmp_path / "voc")
        return {names[file.split(".")[0]]: file.split(".", 1)[1] for file in map(os.path.basename, files)}

    for to in ("yolo-seg", "yolo-semantic"):
        files = list((tmp_path / to / "images" / "train").iterdir())
        assert suffixes(map(str, files)) == {**expected, "moving.gif": "png"}
        for file in files:
            pixels = np.asarray(Image.open(file).convert("RGB"))
            assert (pixels == original.decode(photos_of(tmp_path / to)[file.stem]).pixels).all()
    with tarfile.open(tmp_path / "webdataset" / "train-000000.tar") as tar:
        names = [name for name in tar.getnames() if not name.endswith((".seg.png", ".json"))]
    assert suffixes(names) == expected
    pq = pytest.importorskip("pyarrow.parquet")
    rows = pq.read_table(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet").to_pylist()
    assert suffixes(row["image"]["path"] for row in rows) == expected
    jpegs = list((tmp_path / "voc" / "VOCdevkit" / "VOC2012" / "JPEGImages").iterdir())
    assert len(jpegs) == len(kinds) and all(file.read_bytes()[:2] == b"\xff\xd8" for file in jpegs)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (None, {"train": "train", "val": "train"}),
        ((0, 1, 0), {"train": "val", "val": "val"}),
        ((0, 0, 1), {"train": "test", "val": "test", "test": "test"}),
        ((0.5, 0, 0.5), {"train": "train", "val": "train", "test": "test"}),
    ],
)
def test_data_yaml_names_folders_that_exist(shares, expected, run, tmp_path):
    yaml = pytest.importorskip("yaml")
    convert(run, "yolo-seg", tmp_path / "out", Options(split=shares))
    data = yaml.safe_load((tmp_path / "out" / "data.yaml").read_bytes())
    assert {split: data[split] for split in data if split != "names"} == {k: f"images/{v}" for k, v in expected.items()}
    assert all((tmp_path / "out" / data[split]).is_dir() for split in expected)


@pytest.mark.parametrize(
    ("lines", "root"),
    [
        (["x.jpg", "sub/y.jpg"], "lists"),
        (["{}/lists/x.jpg", "{}/lists/sub/y.jpg"], "lists"),
        (["{}/lists/sub/y.jpg"], "lists/sub"),
        (["x.jpg", "../other/z.jpg"], "."),
        (["linked/../w.jpg", "x.jpg"], "."),
    ],
)
def test_photos_of_a_list_are_below_one_folder(lines, root, tmp_path):
    """CVAT and Label Studio find a photo by its path below a folder, others join that to the folder."""
    for name in ("lists/x.jpg", "lists/sub/y.jpg", "other/z.jpg", "other/w.jpg"):
        save_photo(tmp_path / name, 0, 48, 72)
    (tmp_path / "other" / "in").mkdir()
    (tmp_path / "lists" / "linked").symlink_to(tmp_path / "other" / "in")
    names = [line.format(tmp_path) for line in lines]
    (tmp_path / "lists" / "list.txt").write_text("\n".join(names))
    records = [MaskRecord.from_mask(name, blobs(0, 48, 72), "cat", 0.2, 0.5) for name in names]
    run, found = write_run(tmp_path / "run", tmp_path / "lists" / "list.txt", records), {}
    for to in ("coco", "cvat", "label-studio"):
        assert convert(run, to, tmp_path / to).root == (tmp_path / root).resolve()
    coco = json.loads((tmp_path / "coco" / "annotations" / "instances_train.json").read_text())
    found["coco"] = [image["file_name"] for image in coco["images"]]
    found["cvat"] = [image.get("name") for image in ET.parse(tmp_path / "cvat" / "train.xml").iter("image")]
    tasks = json.loads((tmp_path / "label-studio" / "train.json").read_text())
    found["label-studio"] = [task["data"]["image"].partition("?d=")[2] for task in tasks]
    assert [image["photo"] for image in coco["images"]] == [task["data"]["photo"] for task in tasks] == names
    original = PhotoSource(tmp_path / "lists" / "list.txt")
    for paths in found.values():
        for path, name in zip(paths, names, strict=True):
            assert not path.startswith("/") and ".." not in path.split("/")
            assert (tmp_path / root / path).samefile(original.file(name))


@pytest.mark.parametrize("to", ["png", "voc", "yolo-semantic"])
def test_data_sets_among_the_photos_are_not_photos(to, run, tmp_path):
    shutil.copytree(run.parent / "photos", tmp_path / "photos")
    before = list(PhotoSource(tmp_path / "photos"))
    convert(run, to, tmp_path / "photos" / "sub" / "labels", Options(photos="copy"), tmp_path / "photos")
    assert list(PhotoSource(tmp_path / "photos")) == before
    assert list(PhotoSource(tmp_path / "photos" / "sub" / "labels"))


@pytest.mark.parametrize(("name", "to", "option"), [("a.jpg", "coco", "--upright"), ("a.png", "png", "--upright")])
def test_photos_that_were_cut_off_since_are_named(name, to, option, tmp_path):
    save_photo(tmp_path / "a.jpg", 0, 480, 640, orientation=6)  # a JPEG, whatever its name
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes((tmp_path / "a.jpg").read_bytes()[:-500])
    record = MaskRecord.from_mask(name, blobs(0, 640, 480), "cat", 0.2, 0.5)
    out = write_run(tmp_path / "run", tmp_path / "photos", [record])
    result = command("convert", out, "--to", to, "--out", tmp_path / "out", option)
    assert result.exit_code == 2 and result.stderr.startswith(f"namedmask: '{name}': truncated: "), result.output
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_photos_that_no_jpeg_can_hold_are_named(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (JPEG_SIDE + 1, 1)).save(tmp_path / "photos" / "long.png")
    record = MaskRecord.from_mask("long.png", np.ones((1, JPEG_SIDE + 1), bool), "cat", 0.2, 0.5)
    out = write_run(tmp_path / "run", tmp_path / "photos", [record])
    result = command("convert", out, "--to", "voc", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "'long.png' has a side of 65,501 pixels" in result.stderr, result.output
    assert "--to png" in result.stderr and not (tmp_path / "out").exists()
    convert(out, "png", tmp_path / "out")


def test_full_disk_under_the_masks_is_named(run, tmp_path, monkeypatch):
    full = lambda dir, **options: open("/dev/full", "wb", **options)  # noqa: E731, SIM115, PTH123
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"\.tmp-out cannot be written: No space left on device \(the disk mounted at "):
        convert(run, "coco", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_splits_and_cuts_that_select_nothing(run, tmp_path):
    convert(run, "voc", tmp_path / "val", Options(split=(0, 1, 0)))
    sets = tmp_path / "val" / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    assert {path.name for path in sets.iterdir()} == {"val.txt", "trainval.txt"}
    with pytest.raises(UserError, match="three shares that sum to 1"):
        split_photos(["a"], (float("nan"), 0.5, 0.5))
    shutil.copytree(run, tmp_path / "run")
    keys = [json.loads(line) for line in (run / "masks" / "00000.jsonl").read_text().splitlines()]
    write_review(tmp_path / "run", {(one["photo"], one["category"]): "reject" for one in keys})
    with pytest.raises(UserError, match=r"its review\.jsonl rejects them"):
        convert(tmp_path / "run", "coco", tmp_path / "out")
    (tmp_path / "run" / "review.jsonl").unlink()
    empty = [MaskRecord.from_mask(name, np.zeros((4, 5), bool), "cat", 0.2, 0.0) for name in ("0.jpg", "1.jpg")]
    with pytest.raises(UserError, match=r"all masks of .*empty are empty"):
        convert(write_run(tmp_path / "empty", run.parent / "photos", empty), "coco", tmp_path / "out")
    record = tmp_path / "run" / "stages.json"
    record.write_text(record.read_text().replace(str(run.parent / "photos"), "/gone"))
    with pytest.raises(UserError, match="'/gone' does not exist; if they have moved, say where they are"):
        convert(tmp_path / "run", "coco", tmp_path / "out")


def test_processes_that_convert_at_the_same_time(run, tmp_path):
    """While one moves its folder, others have opened its lock: none may clear the files of another."""
    context = multiprocessing.get_context("fork")
    convert(run, "png", tmp_path / "alone")

    def work() -> None:
        with contextlib.suppress(UserError):
            convert(run, "png", tmp_path / "out")

    for _ in range(3):
        processes = [context.Process(target=work) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
        assert {path.name for path in tmp_path.iterdir()} <= {"alone", "out", ".tmp-out"}
        shutil.rmtree(tmp_path / "out")
    for name in ("loop", "n" * 300):
        if name == "loop":
            (tmp_path / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match="cannot be written"):
            convert(run, "png", tmp_path / name)
