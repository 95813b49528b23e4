# SPDX-License-Identifier: MIT
"""The report page, checked as text, and as HTML; test_pages.py looks at it in Chromium."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namedmask import pages, report
from namedmask.errors import UserError
from namedmask.masks import ErrorRecord, MaskRecord, write_errors, write_shard
from namedmask.pages import histogram, pictures
from namedmask.record import RunRecord, StageRecord

HOSTILE = "\"><script>alert(1)</script>'&\n.png"
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


def draw_photo(path: Path, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Saves a photo of a disc and returns its mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    y, x = np.mgrid[:height, :width]
    mask = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(size) / 3) ** 2
    Image.fromarray(np.where(mask[..., None], (200, 60, 20), (30, 90, 160)).astype(np.uint8)).save(path)
    return mask


def write_run(out: Path, photos: Path, records: list[MaskRecord], names: list[str], errors: list[ErrorRecord]) -> None:
    archive = {name: [{"photo": r.photo, "score": 0.3} for r in records if r.category == name] for name in names}
    (out / "masks").mkdir(parents=True)
    write_shard(out / "masks" / "00000.jsonl", records)
    write_errors(out / "masks" / "00000.errors.jsonl", errors)
    write_errors(out / "errors.jsonl", errors)
    (out / "archive.json").write_text(json.dumps({"categories": names, "photos": archive}))
    stages = {
        "archive": StageRecord({"categories": names}),
        "pseudolabel": StageRecord(made_with={"device": "<b>CPU</b>"}),
    }
    RunRecord(str(photos), stages).write(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small run folder that contains every problem the report handles, with its report."""
    folder = tmp_path_factory.mktemp("report")
    photos, out = folder / "photos", folder / "out"
    sizes = {f"{n}.png": (48, 64) for n in range(8)} | {HOSTILE: (90, 30), NOT_UTF8: (3, 200)}
    masks = {name: draw_photo(photos / name, size) for name, size in sizes.items()}
    records = [
        MaskRecord.from_mask(name, mask, "disc", None if n == 3 else 0.2 + n / 100, 0.5 + n / 100)
        for n, (name, mask) in enumerate(masks.items())
    ]
    draw_photo(photos / "7.png", (20, 20))  # another size than when its mask was made
    records += [
        MaskRecord.from_mask("0.png", np.zeros((48, 64), bool), "<i>round</i>", 0.1, 0.0),
        MaskRecord.from_mask("1.png", masks["1.png"], "<i>round</i>", 0.2, 0.9),
        MaskRecord.from_mask("gone.png", masks["1.png"], "not in the archive", 0.2, 0.9),
    ]
    errors = [ErrorRecord(f"{n}{HOSTILE}", "index", "truncated <at> 3 & more") for n in range(pages.ERRORS_SHOWN + 7)]
    write_run(out, photos, records, ["disc", "<i>round</i>", "nothing found"], errors)
    assert report.write_report(out) == out / "report.html"
    return out


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += data + " "

    def all(self, tag: str, of_class: str | None = None) -> list[dict]:
        found = [attrs for name, attrs in self.tags if name == tag]
        return [a for a in found if of_class is None or of_class in (a.get("class") or "").split()]


def test_page_lists_masks_scores_errors_and_settings(run):
    page = Page(run / "report.html")
    text = " ".join(page.text.split())
    assert "Masks 13 Photos 11 Categories 4 Mean score 0.558 Empty masks 1 Errors 207" in text
    assert "disc 10 masks, 10 photos in the archive, mean score 0.545" in text
    assert "round</i> 2 masks, 2 photos in the archive, mean score 0.450, 1 empty" in text
    assert "nothing found 0 masks, 0 photos in the archive" in text
    assert "not in the archive 1 mask, 0 photos in the archive" in text.replace("1 masks", "1 mask")
    assert "Best masks" not in text and text.count("All masks, best first") == 3
    # Best first; the lowest two of ten masks have a list of their own.
    assert [a["title"] for a in page.all("span", "name") if "title" in a][:11] == [
        "caf\\udce9.png", HOSTILE.replace("\n", "\\n"), *(f"{n}.png" for n in (7, 6, 5, 4, 3, 2, 1, 0)), "1.png",
    ]  # fmt: skip
    assert "0.580 mask · 0.280 match" in text and "0.530 mask 3.png" in text
    assert text.count("empty mask") == 1
    assert "the photo has changed: the mask is 64 x 48, the photo 20 x 20" in text
    assert "Cannot be shown: no such file" in text
    assert text.count("truncated <at> 3 & more") == 200 and "and 7 more in errors.jsonl" in text
    assert "<b>CPU</b>" in text and "sigma_spatial = 16.0" in text


def test_page_escapes_names_and_fetches_nothing(run):
    page = Page(run / "report.html")
    assert [a.get("type") for a in page.all("script")] == ["application/json", None] and not page.all("i")
    assert "http:" not in page.source and "https:" not in page.source and "@import" not in page.source
    assert not page.all("link") and "url(" not in page.source
    assert all(value.startswith("data:image/") for _, attrs in page.tags if (value := attrs.get("src")))
    assert all(value.startswith("#") for _, attrs in page.tags if (value := attrs.get("href")))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.all("a") if "href" in a} <= set(ids)


def test_page_has_alt_texts_and_ordered_headings(run):
    page = Page(run / "report.html")
    assert all("alt" in attrs for attrs in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_same_run_gives_same_bytes(run):
    before = (run / "report.html").read_bytes()
    assert report.write_report(run).read_bytes() == before


def test_page_is_bounded_at_3000_masks(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((400, 300)).save(photos / "busy.jpg")  # more detail than most photos
    mask = draw_photo(photos / "disc.png", (300, 400))
    for number in range(30):
        (photos / f"{number}.jpg").hardlink_to(photos / ("busy.jpg", "disc.png")[number % 2])
    names = [f"name {n}" for n in range(100)]
    records = [
        MaskRecord.from_mask(f"{n // 100}.jpg", mask, names[n % 100], 0.2, round(n / 3000, 4)) for n in range(3000)
    ]
    write_run(tmp_path / "out", photos, records, names, [])
    decoded = []
    decode = report.PhotoSource.decode
    monkeypatch.setattr(report.PhotoSource, "decode", lambda self, name: decoded.append(name) or decode(self, name))
    path = report.write_report(tmp_path / "out")
    page = Page(path)
    assert sorted(decoded) == sorted(f"{n}.jpg" for n in (0, 1, 2, *range(18, 30)))  # each once
    thumbnails = [attrs for attrs in page.all("img") if "loading" in attrs and "mask" not in attrs.get("class", "")]
    assert len(thumbnails) == report.MAX_THUMBNAILS
    assert all(max(int(a["width"]), int(a["height"])) == 224 for a in thumbnails)
    larger = [
        a for a in page.all("img") if a["alt"].endswith(", detector") and max(int(a["width"]), int(a["height"])) > 224
    ]
    assert len(larger) == page.source.count("Part of the photo at full size") == 100
    assert path.stat().st_size < 25e6
    assert page.text.count("Best masks") == page.text.count("Lowest scores") == 100
    assert "All photos were processed." in page.text


@pytest.mark.parametrize(("categories", "tiles"), [(0, 30), (1, 30), (50, 30), (51, 29), (750, 2), (5000, 2)])
def test_tiles_per_category(categories, tiles):
    assert report._tiles_per_category(categories) == tiles


@pytest.mark.parametrize(
    "masks, expected", [(0, (0, 0)), (1, (1, 0)), (4, (4, 0)), (5, (4, 1)), (10, (8, 2)), (31, (24, 6)), (500, (24, 6))]
)
def test_best_and_lowest_masks_of_a_category(masks, expected):
    category = report.Category("dog", masks)
    scores = np.random.default_rng(1).permutation(masks) // 2  # every score twice: the earlier mask wins ties
    pixels = np.ones((2, 2), bool)
    for n, score in enumerate(scores):
        category.add(MaskRecord.from_mask(str(n), pixels, "dog", None, int(score)), 30)
    best, lowest = category.best_and_lowest(30)
    order = sorted(range(masks), key=lambda n: (-scores[n], n))
    assert (len(best), len(lowest)) == expected
    assert [int(r.photo) for r in best] == order[: len(best)]
    assert [int(r.photo) for r in lowest] == order[masks - len(lowest) :]


def test_category_scores_decide_between_equal_scores():
    category = report.Category("dog", 3)
    for name, match in (("a", None), ("b", 0.1), ("c", 0.2), ("d", -0.5), ("e", None), ("f", 0.1)):
        category.add(MaskRecord.from_mask(name, np.ones((2, 2), bool), "dog", match, 0.5), 3)
    category.add(MaskRecord.from_mask("g", np.zeros((2, 2), bool), "dog", None, 0.5), 3)
    best, lowest = category.best_and_lowest(3)
    assert [r.photo for r in best] == ["c", "b"] and [r.photo for r in lowest] == ["g"]
    assert category.empty == 1 and list(category.scores) == [0.5] * 7


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_overlay_of_a_square():
    """In the colors of the page: background, object, light and dark outline."""
    mask = np.zeros((7, 8), bool)
    mask[2:5, 2:5] = True
    overlay = decoded(pictures.overlay_uri(mask, (8, 7)))
    rows = ["00000000", "00333000", "03222300", "03212300", "03222300", "00333000", "00000000"]
    assert np.asarray(overlay).tolist() == [[int(value) for value in row] for row in rows]
    assert overlay.getpalette()[:12] == [0, 0, 0, 255, 40, 140, 255, 255, 255, 0, 0, 0]
    assert overlay.info["transparency"] == bytes([80, 72, 255, 200])
    assert base64.b64decode(pictures.overlay_uri(mask, (8, 7)).partition(",")[2])[24] == 2  # bits per pixel


def test_object_of_less_than_a_256th_thumbnail_pixel_is_not_shown():
    mask = np.zeros((1, 200_000), bool)
    mask[0, 5] = True
    assert (np.asarray(decoded(pictures.overlay_uri(mask, (224, 1)))) == pictures._BACKGROUND).all()


@pytest.mark.parametrize(("pixels", "shown"), [(1, 0), (2, 1), (3, 1), (4, 1)])
def test_half_of_a_thumbnail_pixel_is_enough(pixels, shown):
    mask = np.zeros((2, 8), bool)
    mask[:, :2] = True
    mask[:, -2:].flat = [n < pixels for n in range(4)]
    overlay = np.asarray(decoded(pictures.overlay_uri(mask, (4, 1))))
    assert overlay[0, 0] == pictures._LIGHT and (overlay[0, 3] == pictures._LIGHT) == shown


@pytest.mark.parametrize(
    ("size", "thumbnail"),
    [((90, 30), (75, 224)), ((30, 90), (224, 75)), ((1, 600), (224, 1)), ((600, 1), (1, 224)), ((4, 4), (224, 224))],
)
def test_longer_side_of_a_thumbnail_is_224_pixels(tmp_path, size, thumbnail):
    mask = np.ones(size, bool)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "a.png")
    records = [
        MaskRecord.from_mask("a.png", mask, "dog", None, 0.5),
        MaskRecord.from_mask("a.png", ~mask, "dog", None, 0),
    ]
    records.append(MaskRecord.from_mask("a.png", np.ones((9, 9), bool), "dog", None, 0))
    shown, empty, other = report._draw(report.PhotoSource(tmp_path), [[("Detector", record)] for record in records])
    (view,), picture = shown.views, shown.thumbnail
    assert picture[1:3] == decoded(picture.image).size == decoded(view.overlay).size == thumbnail
    assert empty.views[0].overlay == shown.problem == "" and shown.thumbnail == empty.thumbnail
    assert other.problem == f"the photo has changed: the mask is 9 x 9, the photo {size[1]} x {size[0]}"


def test_tiles_are_in_the_order_of_the_records(tmp_path, monkeypatch):
    masks = {name: draw_photo(tmp_path / name) for name in ("a.png", "b.png")}
    records = [MaskRecord.from_mask(name, masks[name], "dog", None, 0.5) for name in ("a.png", "b.png", "a.png")]
    damaged = dataclasses.replace(records[1], rle="0")
    held, hold = [], report.MemoryBudget.hold
    monkeypatch.setattr(report.MemoryBudget, "hold", lambda self, amount: held.append(amount) or hold(self, amount))
    tiles = list(report._draw_all(str(tmp_path), [records[0], damaged, records[2]]))
    assert held == [48 * 64 * 24] * 2
    assert [tile.record.photo for tile in tiles] == ["a.png", "b.png", "a.png"]
    assert [tile.problem for tile in tiles] == ["", "the mask is damaged", ""]


def test_histogram_is_a_path_of_20_bars():
    assert histogram(np.array([0, 0.01, 0.5, 0.97, 1]), 0, 1) == "M0 1V0.000h.9V1zM10 1V0.500h.9V1zM19 1V0.000h.9V1z"
    assert histogram(np.array([-1.0, 1.0]), -1, 1) == "M0 1V0.000h.9V1zM19 1V0.000h.9V1z"
    assert histogram(np.zeros(0), 0, 1) == ""


def test_scores_beyond_0_and_1_widen_the_histogram(tmp_path):
    mask = draw_photo(tmp_path / "photos" / "a.png")
    records = [MaskRecord.from_mask("a.png", mask, "dog", None, score) for score in (-0.5, 2.5)]
    write_run(tmp_path / "out", tmp_path / "photos", records, ["dog"], [])
    page = report.write_report(tmp_path / "out").read_text()
    assert page.count(histogram(np.array([-0.5, 2.5]), -0.5, 2.5)) == 2
    write_shard(tmp_path / "out" / "masks" / "00000.jsonl", [dataclasses.replace(records[0], score=0.25)])
    page = report.write_report(tmp_path / "out").read_text()
    assert page.count(histogram(np.array([0.25]), 0, 1)) == 2


def test_masks_of_the_experts_are_shown_once_they_have_finished(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "out")
    (out / "refined").mkdir()
    mask = np.ones((48, 64), bool)
    write_shard(out / "refined" / "00000.jsonl", [MaskRecord.from_mask("0.png", mask, "disc", None, 0.125)])
    write_errors(out / "refined" / "00000.errors.jsonl", [])
    record = json.loads((out / "stages.json").read_text())
    record["stages"]["experts"] = {**record["stages"]["pseudolabel"], "made_with": {"device": "experts' device"}}
    (out / "stages.json").write_text(json.dumps(record))
    text = " ".join(Page(report.write_report(out)).text.split())
    assert "Masks 1 Photos 1" in text and "Mean score 0.125" in text
    assert "experts' device" in text and "<b>CPU</b>" not in text


def test_tiny_masks_and_photo_borders_are_outlined():
    speck = np.zeros((1000, 1000), bool)
    speck[500, 500] = True
    full = np.ones((10, 20), bool)
    for mask, size in ((speck, (224, 224)), (full, (224, 112))):
        uri = pictures.overlay_uri(mask, size)
        overlay = np.asarray(decoded(uri))
        assert (overlay == pictures._LIGHT).any()
    assert (overlay[0] == pictures._LIGHT).all() and (overlay[1:-1, 1:-1] == pictures._OBJECT).all()


def test_missing_photo_folder_is_reported_in_every_tile(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "out")
    record = (out / "stages.json").read_text()
    (out / "stages.json").write_text(re.sub('"photos": ".*?"', '"photos": "/no/such/photos"', record))
    page = Page(report.write_report(out))
    assert page.text.count("does not exist") == 13 and not page.all("img")


def test_run_without_masks(tmp_path):
    write_run(tmp_path / "out", tmp_path, [], [], [])
    (tmp_path / "out" / "errors.jsonl").unlink()
    (tmp_path / "out" / "masks" / "00000.errors.jsonl").unlink(missing_ok=True)
    assert "Mean score –" in " ".join(Page(report.write_report(tmp_path / "out")).text.split())


@pytest.mark.parametrize(
    "file, text, complaint",
    [
        ("archive.json", None, "archive.json is missing"),
        ("stages.json", None, "stages.json is missing"),
        ("stages.json", "{}", "stages.json: "),
        ("archive.json", "[]", "archive.json: this is not an archive"),
        ("archive.json", "{", "archive.json: this is not an archive"),
        ("masks/00000.jsonl", "{}\n", "00000.jsonl:1: "),
        ("errors.jsonl", "{}\n", "errors.jsonl:1: "),
        ("sheets.json", "{}\n", "sheets.json: "),
    ],
)
def test_damaged_run_raises_user_error(run, tmp_path, file, text, complaint):
    out = shutil.copytree(run, tmp_path / "out")
    (out / "report.html").unlink()
    if text is None:
        (out / file).unlink()
    else:
        (out / file).write_text(text)
    with pytest.raises(UserError, match=complaint):
        report.write_report(out)
    assert not (out / "report.html").exists()


def test_sheets_are_shown_until_the_results_change(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "out")
    Image.new("RGB", (30, 20), "red").save(out / "red.png")
    sheets = {"red.png": "A <red> sheet", "missing.png": "No such picture"}
    first = report.write_report(out, sheets).read_text()
    captions = re.findall(r'<section class="sheet">\s*<h2>(.*?)</h2>\s*<img src="data:image/jpeg;base64,', first)
    assert captions == ["A &lt;red&gt; sheet"]
    assert report.write_report(out).read_text() == first
    (out / "masks" / "00000.jsonl").write_text("")
    assert 'class="sheet"' not in report.write_report(out).read_text()
    assert 'class="sheet"' in report.write_report(out, sheets).read_text()
    assert 'class="sheet"' not in report.write_report(out, {}).read_text()


def test_damaged_sheet_raises_user_error(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "out")
    (out / "red.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"sheets.json: .*red.png.*; the file is damaged: delete it"):
        report.write_report(out, {"red.png": "red"})


def rectangle(rows: int, columns: int, hollow: bool = False) -> MaskRecord:
    """The record of a rectangle in the corner of a photo of 40 x 50 pixels."""
    mask = np.zeros((40, 50), bool)
    mask[:rows, :columns] = True
    if hollow:
        mask[5:35, 5:45] = False
    return MaskRecord.from_mask("a.png", mask, "dog", None, 0.5)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (rectangle(0, 0), report.EMPTY),
        (rectangle(1, 3), report.TINY),
        (rectangle(1, 4), ""),
        (rectangle(40, 50, hollow=True), report.FRAMES),
        (rectangle(40, 50), ""),
        (rectangle(40, 49, hollow=True), ""),
    ],
)
def test_problems_show_in_the_fields_of_a_record(record, problem):
    assert report.problem_of(record) == problem


@pytest.mark.parametrize(
    ("settings", "remedy"), [({}, "try --largest-component"), ({"largest_component": True}, "try another --detector")]
)
def test_hints_name_an_option_that_is_not_used_yet(tmp_path, settings, remedy):
    draw_photo(tmp_path / "photos" / "a.png", (40, 50))
    records = [rectangle(40, 50, hollow=True)] * 2 + [rectangle(10, 10)] * 7
    write_run(tmp_path / "out", tmp_path / "photos", records, ["dog"], [])
    values = {f"refine.{name}": value for name, value in settings.items()}
    RunRecord(str(tmp_path / "photos"), {"pseudolabel": StageRecord(values)}).write(tmp_path / "out")
    text = " ".join(Page(report.write_report(tmp_path / "out")).text.split())
    assert f"2 of 9 masks: frames the photo; {remedy}" in text
    assert text.count(f"frames the photo: {remedy}") == 2


def test_iou_of_records():
    assert report.iou(rectangle(10, 20), rectangle(20, 10)) == 1 / 3
    assert report.iou(rectangle(0, 0), rectangle(0, 0)) == 1 and report.iou(rectangle(0, 0), rectangle(1, 1)) == 0
    assert report.iou(rectangle(1, 1), MaskRecord.from_mask("a.png", np.ones((2, 2), bool), "dog", None, 1)) is None


def test_counts_at_each_cut():
    category = report.Category("dog", 3)
    for score in (0.2, 0.5, 0.5, 0.9):
        category.add(dataclasses.replace(rectangle(9, 9), score=score), 3)
    assert category.counts([0.0, 0.2, 0.21, 0.5, 0.51, 1.0]) == [4, 4, 3, 3, 1, 0]
