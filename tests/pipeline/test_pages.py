# SPDX-License-Identifier: MIT
"""The pages of a run in Chromium, with mouse and keys: the static report and the one that `namedmask review` serves."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from namedmask.report import write_report
from namedmask.review import read_review, reviewed_masks, write_review
from namedmask.review_server import Review, ReviewServer
from small_world import reviewable_run

expect = pytest.importorskip("playwright.sync_api").expect

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
LONG = "a folder with a long name/and a photo with a name that no caption of a phone can show in one line.png"
OTHER = "<i>round</i> & more"
NAMES = {"disc": [f"{n:02}.png" for n in range(40)], OTHER: [NOT_UTF8, LONG, "00.png"], "nothing found": []}
FIRST_PAINT = 5000  # ms, on a machine that does other things


@pytest.fixture(params=SIZES)
def page(browser, request) -> Iterator:
    """An empty tab; the test fails at an error or a message of the page's script."""
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(f"{message.text} {message.location}"))
    yield page
    page.close()
    assert not problems


@pytest.fixture
def out(tmp_path) -> Path:
    return reviewable_run(tmp_path / "run", NAMES)


def serve(out: Path) -> ReviewServer:
    server = ReviewServer(Review(out))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def expect_layout(page) -> None:
    """Nothing is wider than the window, no caption is cut, no picture is beyond its frame."""
    measured = page.evaluate("""() => {
      const box = element => element.getBoundingClientRect();
      const all = selector => [...document.querySelectorAll(selector)];
      return {
        wide: document.documentElement.scrollWidth - innerWidth,
        cut: all(".tile figcaption *").filter(one => one.scrollWidth > one.clientWidth + 1 && one.clientWidth).length,
        spill: all(".photo").filter(one => box(one).right > box(one.parentElement).right + 1).length,
        unnamed: all("button").filter(one => !(one.getAttribute("aria-label") ?? one.textContent).trim()).length,
      };
    }""")
    assert measured == {"wide": 0, "cut": 0, "spill": 0, "unnamed": 0}


def tile(page, category: str, number: int):
    section = page.locator(".category").nth(list(NAMES).index(category))
    return section.locator(".tile").nth(number)


def test_static_page_reviews_with_keys_and_mouse(page, out, tmp_path):
    write_review(out, {("00.png", "disc"): "accept", (NOT_UTF8, OTHER): "reject", ("gone.png", "gone"): "accept"})
    page.goto(write_report(out).as_uri())
    expect_layout(page)
    total, counts = page.locator("#review output"), page.locator("#counts")
    assert total.text_content() == "42 of 43 stay with --min-score 0"
    assert counts.text_content() == "1 accepted, 1 rejected"
    frame = tile(page, "disc", 0).locator(".frame")
    frame.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.closest('.tile').id") == "mask/disc/01.png"
    for key in ("r", "d", "a"):  # of 01, 02 and 03; each moves on
        page.keyboard.press(key)
    assert counts.text_content() == "2 accepted, 2 rejected, 1 with the detector's mask"
    page.keyboard.press("u")
    assert counts.text_content() == "1 accepted, 2 rejected, 1 with the detector's mask"
    assert page.evaluate("document.activeElement.closest('.tile').id") == "mask/disc/03.png"
    page.keyboard.press("ArrowDown")
    below = page.evaluate("document.activeElement.closest('.tile').id")
    page.keyboard.press("ArrowUp")
    assert (
        below > "mask/disc/04.png" and page.evaluate("document.activeElement.closest('.tile').id") == "mask/disc/03.png"
    )
    long = tile(page, OTHER, 1)
    long.get_by_role("button", name="Accept").click()
    long.get_by_role("button", name="Reject").click()
    long.get_by_role("button", name="Reject").click()  # takes it back
    tile(page, OTHER, 2).get_by_role("button", name="Reject").click()
    slider = page.locator(".category input[type=range]").first
    slider.fill("51")  # masks 0 to 19 have at least 0.51; 1 is rejected
    assert page.locator(".category output").first.text_content() == "19 of 40 stay at 0.51"
    slider.fill("98")  # mask 0, and 2, whose verdict is the detector's mask
    assert page.locator(".category output").first.text_content() == "2 of 40 stay at 0.98"
    assert "out" in tile(page, "disc", 4).get_attribute("class") and "out" in tile(page, "disc", 1).get_attribute(
        "class"
    )
    assert "out" not in tile(page, "disc", 2).get_attribute("class")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download review.jsonl").click()
    shutil.copy(download.value.path(), out / "review.jsonl")
    expected = {
        ("00.png", "disc"): "accept", ("01.png", "disc"): "reject", ("02.png", "disc"): "detector",
        (NOT_UTF8, OTHER): "reject", ("00.png", OTHER): "reject", ("gone.png", "gone"): "accept",
    }  # fmt: skip
    assert read_review(out) == expected
    assert sum(1 for _ in reviewed_masks(out)) == 40


def test_enlarged_view_compares_the_stages(page, out):
    page.goto(write_report(out).as_uri() + "#mask/disc/02.png")
    dialog = page.locator("dialog")
    assert dialog.locator(".view-title").text_content().strip() == "disc · 02.png"
    captions = [" ".join(text.split()) for text in dialog.locator(".view figcaption").all_text_contents()]
    assert captions[0] == "Expert0.950 mask" and len(captions) == 3
    assert re.fullmatch(r"Detector0.950 mask · IoU 0.5\d\d with expert", captions[1])
    assert re.fullmatch(r"Detector, before refining0.950 mask · IoU 0.3\d\d with expert", captions[2])
    assert "Photo at full size." in dialog.text_content() or "Part of the photo at full size." in dialog.text_content()
    pictures = dialog.locator(".photo img")
    assert pictures.count() == 6
    assert all(pictures.evaluate_all("images => images.map(image => image.complete && image.naturalWidth > 60)"))
    assert dialog.evaluate("one => one.scrollWidth <= one.clientWidth")
    page.keyboard.press("m")
    assert dialog.locator("img.mask").first.evaluate("one => getComputedStyle(one).visibility") == "hidden"
    page.keyboard.press("f")
    assert dialog.locator(".photo").first.bounding_box()["width"] == int(pictures.first.get_attribute("width"))
    page.keyboard.press("a")
    assert page.evaluate("decodeURIComponent(location.hash)") == "#mask/disc/03.png"
    page.keyboard.press("ArrowLeft")
    accept = dialog.get_by_role("button", name="Accept")
    assert accept.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    expect(tile(page, "disc", 2).locator(".frame")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_a_contrast_of_4_5(browser, out, scheme):
    page = browser.new_page(color_scheme=scheme)
    (out.parent / "photos" / "03.png").unlink()
    page.goto(write_report(out).as_uri())
    tile(page, "disc", 0).locator(".frame").focus()
    for key in "ard":
        page.keyboard.press(key)
    low = page.evaluate("""() => {
      const channels = color => color.match(/[\\d.]+/g).map(Number);
      const linear = value => value <= 10 ? value / 3294 : ((value / 255 + 0.055) / 1.055) ** 2.4;
      const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
      const behind = element => {
        const color = channels(getComputedStyle(element).backgroundColor);
        return color[3] === 0 ? behind(element.parentElement) : color;
      };
      const hasText = one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
      const texts = [...document.querySelectorAll("body *")].filter(one => hasText(one) && one.getClientRects().length);
      if (texts.length < 300) throw new Error(`${texts.length} texts`);
      return texts.filter(one => {
        const pair = [channels(getComputedStyle(one).color), behind(one)].map(luminance).sort((a, b) => a - b);
        return (pair[1] + 0.05) / (pair[0] + 0.05) < 4.5;
      }).map(one => one.outerHTML);
    }""")
    page.close()
    assert low == []


@pytest.mark.parametrize("served", [False, True])
def test_search_finds_categories_and_photos(page, out, served):
    with serve(out) as server:
        page.goto(server.url if served else write_report(out).as_uri())
        tile(page, "disc", 0).wait_for()
        expect(page.locator(".category").nth(1).locator("h3").first).to_be_attached()

        def search(text: str, shown: dict[str, int]) -> None:
            """Searches, and expects the number of tiles of each category that is shown."""
            page.get_by_label("Search").fill(text)
            for section, name in zip(page.locator(".category").all(), NAMES, strict=True):
                expect(section).to_be_visible() if name in shown else expect(section).to_be_hidden()
                if name in shown:
                    section.scroll_into_view_if_needed()  # the served page loads what comes into view
                    expect(section.locator(".tile:visible")).to_have_count(shown[name])
            expect(page.locator(".contents li:visible")).to_have_count(len(shown))

        search("ROUND", {OTHER: 3})
        search("00.PNG", {"disc": 1, OTHER: 1})  # a name of a photo of both
        if not served:  # no title above no tile
            assert page.locator(".category h3:visible").count() == 2
        tile(page, "disc", 0).locator(".frame").focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("JSON.parse(document.activeElement.closest('.tile').dataset.key)[1]") == OTHER
        search("a folder with", {OTHER: 1})
        search(r"caf\udce9", {OTHER: 1})  # as the page shows it
        search("zebra", {})
        where = "" if served else "on this page "
        assert page.locator("#no-match").text_content() == f"No category and no photo {where}matches “zebra”."
        assert page.locator("#no-match").is_visible()
        page.get_by_label("Search").fill("")
        expect(page.locator(".category:visible")).to_have_count(3)
        page.locator(".category").nth(1).scroll_into_view_if_needed()
        expect(page.locator(".category").nth(1).locator(".tile:visible")).to_have_count(3)
        expect_layout(page)
        server.shutdown()


def test_served_page_saves_at_once(page, out):
    with serve(out) as server:
        page.goto(server.url)
        tile(page, "disc", 5).wait_for()
        page.locator(".category").nth(1).scroll_into_view_if_needed()
        tile(page, OTHER, 0).wait_for()
        expect_layout(page)
        tile(page, OTHER, 0).get_by_role("button", name="Use the detector's mask").click()
        tile(page, "disc", 0).locator(".frame").click()
        for _ in range(30):  # beyond the tiles that are loaded first
            with page.expect_response("**/review"):
                page.keyboard.press("r")
        expect(page.locator("#status")).to_have_text("Saved.")
        expect(page.locator("#enlarged")).to_have_text("disc · 30.png")
        assert (
            page.locator("dialog .photo img").first.evaluate("one => one.decode().then(() => one.naturalWidth)") == 120
        )
        assert read_review(out) == {(f"{n:02}.png", "disc"): "reject" for n in range(30)} | {
            (NOT_UTF8, OTHER): "detector"
        }
        page.reload()
        assert page.locator("#counts").text_content() == "0 accepted, 30 rejected, 1 with the detector's mask"
        assert page.locator("#review output").text_content().startswith("13 of 43 stay")
        page.keyboard.press("Escape")
        page.locator("#show").select_option("open")
        expect(page.locator(".tile").first).to_have_attribute("id", "mask/disc/30.png")
        page.locator("#show").select_option("accept")
        expect(page.locator(".tiles .more").first).to_have_text("no mask")
        server.shutdown()


def test_served_page_shows_all_masks_without_a_verdict(page, out):
    with serve(out) as server:
        page.goto(server.url)
        page.locator("#show").select_option("open")
        tile(page, "disc", 0).locator(".frame").click()
        for n in range(40):
            expect(page.locator("#enlarged")).to_have_text(f"disc · {n:02}.png")
            with page.expect_response("**/review"):
                page.keyboard.press("r")
        expect(page.locator("#status")).to_have_text("Saved.")
        assert {photo for photo, category in read_review(out) if category == "disc"} == set(NAMES["disc"])
        server.shutdown()


def test_a_linked_mask_that_is_not_loaded_leads_into_its_category(page, out):
    with serve(out) as server:
        for leave in ("ArrowRight", "r"):
            page.goto("about:blank")
            page.goto(server.url + "#mask/disc/39.png")
            title = page.locator("#enlarged")
            expect(title).to_have_text("disc · 39.png")
            page.keyboard.press("ArrowLeft")
            expect(title).to_have_text("disc · 39.png")
            page.keyboard.press(leave)
            expect(title).to_have_text("disc · 00.png")
        page.keyboard.press("u")
        expect(title).to_have_text("disc · 39.png")
        page.keyboard.press("Escape")
        server.shutdown()


def test_undo_reaches_a_tile_that_was_loaded_again(page, out):
    with serve(out) as server:
        page.goto(server.url)
        first = tile(page, "disc", 0)
        first.get_by_role("button", name="Reject").click()
        expect(page.locator("#status")).to_have_text("Saved.")
        page.locator("#show").select_option("reject")
        expect(page.locator(".category").first.locator(".tile")).to_have_count(1)
        expect(first).to_have_attribute("data-verdict", "reject")
        page.locator("#undo").click()
        expect(first).to_have_attribute("data-verdict", "")
        expect(first.locator(".frame")).to_be_focused()
        server.shutdown()


def test_served_page_says_why_a_photo_is_not_shown(browser, out):
    (out.parent / "photos" / "01.png").unlink()
    page = browser.new_page()
    with serve(out) as server:
        page.goto(server.url)
        expect(tile(page, "disc", 1).locator(".frame")).to_have_text("Cannot be shown: '01.png': no such file")
        server.shutdown()
    page.close()


def test_10000_masks_are_shown_at_once(browser, tmp_path):
    names = {f"name {c}": [f"{c}/{n}.png" for n in range(500)] for c in range(20)}
    out = reviewable_run(tmp_path / "run", names, refined=False)
    with serve(out) as server:
        for url in (server.url, write_report(out).as_uri()):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(url, wait_until="load")
            page.locator(".tile img.mask").first.wait_for()
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            assert paint < FIRST_PAINT
            assert page.locator("#review output").text_content() == "10,000 of 10,000 stay with --min-score 0"
            page.locator("#review input").fill("50")
            assert page.locator("#review output").text_content() == "5,020 of 10,000 stay with --min-score 0.5"
            if url == server.url:
                assert page.locator(".tile").count() < 200
                page.locator(".category").last.scroll_into_view_if_needed()
                page.locator(".category").last.locator(".tile").first.wait_for()
            page.close()
        server.shutdown()
