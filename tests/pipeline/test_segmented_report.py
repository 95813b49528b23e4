# SPDX-License-Identifier: MIT
"""The page of a segmented folder: its figures, its legend, what it shows of bad folders, and its filter in Chromium."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from golden import fill_weights
from namedmask.backbones import untrained_encoder
from namedmask.formats import write_label_map
from namedmask.segmenter import report
from namedmask.segmenter.deeplab import DeepLab, save_segmenter
from small_world import command, draw_photos

NAMES = ["cat", "<i>dog</i>", "zebra"]
CONFIDENCES = {"cat0000.jpg": 0.25, "gone.jpg": 1.0}


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """Six segmented photos, whose masks are replaced by known ones: 25% cat; and in the last one, 1% dog."""
    folder = tmp_path_factory.mktemp("segmented")
    names = draw_photos(folder / "photos", 6)
    (folder / "photos" / "broken.jpg").write_bytes(b"no photo")
    network = fill_weights(DeepLab(untrained_encoder("test_resnet"), len(NAMES) + 1, head_channels=16))
    (folder / "weights").mkdir()
    save_segmenter(folder / "weights", network, NAMES)
    result = command("segment", folder / "weights", folder / "photos", "--out", folder / "out")
    assert result.exit_code == 0, result.output
    from PIL import Image

    for number, name in enumerate(sorted(names)):
        path = folder / "out" / "masks" / f"{name[:-4]}.png"
        labels = np.zeros(np.asarray(Image.open(path)).shape, np.uint8)
        labels[: labels.shape[0] // 2, : labels.shape[1] // 2] = 1
        if number == 5:
            labels[-1, :] = 2
        write_label_map(path, labels, len(NAMES) + 1)
    return folder


@pytest.fixture
def out(segmented, tmp_path):
    return shutil.copytree(segmented / "out", tmp_path / "out")


def text(page: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)).split())


def test_page_counts_pixels_and_photos(out):
    (out / "scores.jsonl").unlink()  # `segment` writes it at the end
    result = command("report", out)
    assert result.exit_code == 0 and result.output.strip() == str(out / "report.html")
    page = (out / "report.html").read_text()
    shown = text(page)
    assert "Photos 6 Categories found 2 Background 75" in shown and "Errors 1" in shown
    assert re.search(r"cat 6 24\.\d% &lt;i&gt;dog&lt;/i&gt; 1 0\.\d%", shown)
    assert "1 category was found in no photo." in shown and "zebra" not in shown
    assert page.count("background:#800000") == page.count("background:#008000") == 1  # the colors of the masks
    assert (
        page.count('class="tile"') == 6 and len(re.findall(r"cat 2[45]\.\d%", shown)) == 6 and "broken.jpg : " in shown
    )
    assert 'href="overlays/cat0000.jpg"' in page and "confidence" not in shown
    assert "http:" not in page and "https:" not in page
    assert report.write_segmented_report(out).read_text() == page


def test_rare_categories_are_shown_and_the_page_is_bounded(out, monkeypatch):
    monkeypatch.setattr(report, "MAX_PHOTOS", 2)
    page = report.write_segmented_report(out).read_text()
    assert re.findall(r'<img src="data:image/jpeg.*? alt="(.*?)"', page) == [
        "cat0000.jpg",
        "dog0001.jpg",
        "dog0005.jpg",
    ]


def test_confidences_are_shown(out):
    lines = [{"photo": name, "confidence": value, "categories": {}} for name, value in CONFIDENCES.items()]
    (out / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.write_segmented_report(out).read_text()
    assert "0.250 confidence" in text(page) and page.count("data-confidence") == 1 and "lowest confidence" in page


def test_photos_and_masks_that_are_gone_are_said(out, segmented, tmp_path):
    shutil.copytree(segmented / "photos", tmp_path / "photos")
    record = json.loads((out / "segment.json").read_text())
    (out / "segment.json").write_text(json.dumps(record | {"photos": str(tmp_path / "photos")}))
    (tmp_path / "photos" / "cat0000.jpg").unlink()
    (out / "masks" / "cat0002.png").unlink()
    shown = text(report.write_segmented_report(out).read_text())
    assert "Photos 5" in shown and "Cannot be shown: no such file" in shown and "1 photo is not segmented yet" in shown
    shutil.rmtree(tmp_path / "photos")
    assert text(report.write_segmented_report(out).read_text()).count("does not exist") == 5
    page = command("report", out, "--photos", segmented / "photos")  # where they are now
    assert page.exit_code == 0 and "does not exist" not in text((out / "report.html").read_text())
    shutil.rmtree(out / "masks")
    result = command("report", out)
    assert result.exit_code == 2 and "has no masks; run `namedmask segment` first" in result.output


@pytest.mark.parametrize(
    "file, content, complaint",
    [
        ("categories.json", "[]", "categories.json: "),
        ("categories.json", '{"categories": ["cat"]}', "class 2 has no name"),
        ("scores.jsonl", "{}\n", "scores.jsonl:1: "),
        ("masks/cat0000.png", "no PNG", "cannot be read as a PNG"),
    ],
)
def test_damaged_folder_is_one_line(out, file, content, complaint):
    (out / file).write_text(content)
    result = command("report", out)
    assert result.exit_code == 2 and complaint in result.output and result.output.count("\n") == 1
    assert not (out / "report.html").exists()


def test_filter_in_a_browser(browser, out):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(report.write_segmented_report(out).as_uri())
    assert page.locator("#count").text_content() == "6 of 6 photos"
    dog = page.get_by_role("button", name="dog")
    dog.click()
    assert page.locator(".tile:visible").count() == 1
    assert page.locator("#count").text_content() == "1 of 6 photos, those with <i>dog</i>"
    dog.click()
    assert page.locator(".tile:visible").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()
