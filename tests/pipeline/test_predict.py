# SPDX-License-Identifier: MIT
"""Inference: masks against those of the plain network, independence of threads, and `namedmask segment`."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import os
import shutil
import tarfile
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from golden import GOLDEN, fill_weights
from namedmask import config
from namedmask.backbones import untrained_encoder
from namedmask.distributed import Worker
from namedmask.formats import read_label_map, write_label_map
from namedmask.masks import read_errors
from namedmask.photos import Photo, PhotoError, PhotoSource
from namedmask.segmenter import predict
from namedmask.segmenter.deeplab import DeepLab, save_segmenter
from namedmask.segmenter.folder import read_scores
from namedmask.segmenter.mask_names import stem
from namedmask.segmenter.overlay import overlay, shown_photos
from namedmask.segmenter.predict import (
    Segmenter,
    batches_by_shape,
    fold_batch_norms,
    scored_argmax,
    upsampled_argmax,
)
from namedmask.segmenter.segment import segment_photos
from small_world import command, draw_photo, draw_photos, files_of

TINY = "test_resnet"
SIZES = [(37, 53), (64, 48), (33, 1), (1, 1), (90, 121)]


def tiny_network(classes: int = 3, encoder: str = TINY) -> DeepLab:
    """A network with random weights and with BatchNorm statistics that differ from the initial ones."""
    torch.manual_seed(1)
    network = DeepLab(untrained_encoder(encoder), classes, head_channels=16)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.2)
    return network.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    save_segmenter(folder, tiny_network(), ["cat", "dog"])
    return folder


def make_photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.asarray(draw_photo(seed, "cat", (max(20, width), max(20, height))))[:height, :width].copy()


@torch.inference_mode()
def plain_logits(image: np.ndarray) -> torch.Tensor:
    network = tiny_network()
    return network(network.normalized(torch.from_numpy(image).permute(2, 0, 1)[None]))[0]


def assert_masks(labels: np.ndarray, logits: torch.Tensor) -> None:
    """Asserts that labels [H, W] are the argmax of logits [classes, H, W], except at near ties."""
    best = logits.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-4).numpy()
    assert clear.mean() > 0.98 or clear.size < 100
    np.testing.assert_array_equal(labels[clear], logits.argmax(0).numpy()[clear])


@pytest.mark.parametrize("size", SIZES)
def test_masks_equal_those_of_the_plain_network(weights, size):
    image = make_photo(*size)
    mask, names, scores = Segmenter.load(weights)(image)
    assert mask.shape == size and mask.dtype == np.uint16 and names == ["background", "cat", "dog"]
    assert_masks(mask, plain_logits(image))
    probability = plain_logits(image).softmax(0).amax(0).numpy()
    assert scores.confidence == pytest.approx(probability.mean(), abs=0.005)
    found = {names[label]: mask == label for label in np.unique(mask) if label}
    assert list(scores.categories) == list(found)
    for name, pixels in found.items():
        assert scores.categories[name].area == pytest.approx(pixels.mean())
        assert scores.categories[name].confidence == pytest.approx(probability[pixels].mean(), abs=0.02)
    if size[0] > 60:
        assert len(np.unique(mask)) > 1


@pytest.mark.parametrize("scales", [(1.0,), (0.5,), (0.5, 1.5)])
@pytest.mark.parametrize("flip", [False, True])
@torch.inference_mode()
def test_test_time_augmentation_averages_probabilities(weights, scales, flip):
    image, network = make_photo(40, 64), tiny_network()

    def probability(scale: float, flipped: bool) -> torch.Tensor:
        size = round(64 * scale), round(40 * scale)
        pixels = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        if flipped:
            pixels = pixels[:, ::-1].copy()
        found = network.coarse_logits(network.normalized(torch.from_numpy(pixels).permute(2, 0, 1)[None])).softmax(1)
        grid = [math.ceil(side * max(scales) / 4) for side in (40, 64)]
        return F.interpolate(found.flip(3) if flipped else found, grid, mode="bilinear")

    expected = torch.stack([probability(*one) for one in itertools.product(scales, {False, flip})]).mean(0)
    segmenter = Segmenter.load(weights, scales=scales, horizontal_flip=flip)
    np.testing.assert_allclose(segmenter.coarse_logits([image]).softmax(1), expected, atol=1e-4)
    assert segmenter(image).mask.shape == (40, 64)


def test_scales_are_checked_and_keep_large_photos_within_the_limit(weights, monkeypatch):
    for scales in ((), (0.0,), (5.0,)):
        with pytest.raises(ValueError, match="scales: expected"):
            Segmenter.load(weights, scales=scales)
    monkeypatch.setattr(predict, "MAX_PIXELS", 600)
    assert predict.reduced(make_photo(40, 60), 4.0).shape == predict.reduced(make_photo(40, 60)).shape == (20, 30, 3)
    assert predict.reduced(make_photo(40, 60), 0.5).shape == (10, 15, 3)


@pytest.mark.parametrize("encoder", [TINY, "resnet10t", "test_convnext", "test_efficientnet"])
def test_folding_batch_norm_preserves_logits(encoder):
    network, folded = tiny_network(5, encoder), fold_batch_norms(tiny_network(5, encoder))
    photos = torch.randn(2, 3, 45, 67)
    with torch.inference_mode():
        np.testing.assert_allclose(folded.coarse_logits(photos), network.coarse_logits(photos), atol=1e-4, rtol=1e-4)
    norms = [m for m in folded.classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not norms  # all of the head are folded


def test_labels_equal_the_authors():
    with np.load(GOLDEN / "deeplab_forward.npz") as golden:
        low = torch.from_numpy(golden["logits_lowres"])[0]
        exact = F.interpolate(low[None].double(), (97, 129), mode="bilinear")[0]
        labels = upsampled_argmax(low, 97, 129)
        assert_masks(labels.numpy(), exact)
        best = exact.topk(2, dim=0).values
        clear = (best[0] - best[1] > 1e-3).numpy()
        np.testing.assert_array_equal(labels.numpy()[clear], golden["argmax"][clear])


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 9, 7), (36, 28)), ((300, 3, 5), (11, 17)), ((2, 1, 1), (3, 2)), ((7, 8, 8), (8, 8))]
)
def test_upsampled_argmax_equals_argmax_of_interpolated_logits(shape, size):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_masks(upsampled_argmax(logits, *size).numpy(), F.interpolate(logits[None], size, mode="bilinear")[0])


def test_probabilities_near_edges_are_those_of_the_interpolated_logits():
    """Neighbors differ in their class, so every pixel but the corners is near an edge."""
    sign = (-1.0) ** (torch.arange(6)[:, None] + torch.arange(7))
    logits = torch.stack([sign, -sign]) * (0.5 + torch.rand(6, 7, generator=torch.Generator().manual_seed(0)))
    best, expected = F.interpolate(logits[None], (23, 26), mode="bilinear")[0].softmax(0).max(0)
    labels, pixels, certainty = scored_argmax(logits, 23, 26)
    assert torch.equal(labels, expected.int()) and pixels.tolist() == [(expected == k).sum() for k in (0, 1)]
    sums = torch.stack([best[expected == k].double().sum() for k in (0, 1)])
    torch.testing.assert_close(certainty, sums, atol=1e-4, rtol=0)


def test_accepts_arrays_pil_images_and_paths(weights, tmp_path):
    segmenter = Segmenter.load(weights / "model.safetensors")
    image = make_photo(40, 60)
    upright = Image.fromarray(image)
    mask = segmenter(image).mask
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    for image_or_path in (upright, tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(segmenter(image_or_path).mask, mask)
    with pytest.raises(ValueError, match=r"expected an image .*, got float64 \[4, 4, 3\]"):
        segmenter(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="expected an image with pixels, got 0 x 5"):
        segmenter(Image.new("RGB", (0, 5)))
    (tmp_path / "text.png").write_text("hello")
    for name, reason in (
        ("none.png", "no such file"),
        ("gone/a.png", "no such file"),
        ("text.png", "not an image: text"),
    ):
        with pytest.raises(PhotoError, match=f"'{tmp_path / name}': {reason}"):
            segmenter(tmp_path / name)
    for precision in ("bf16", "float16", "int8"):
        with pytest.raises(ValueError, match=f"precision: expected float32 or bfloat16, got '{precision}'"):
            Segmenter.load(weights / "model.safetensors", precision=precision)


def test_bfloat16_agrees_at_most_pixels(weights):
    image = make_photo(96, 96)
    exact, rounded = Segmenter.load(weights)(image).mask, Segmenter.load(weights, precision="bfloat16")(image).mask
    assert (exact == rounded).mean() > 0.95


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", None])
def test_on_a_gpu(weights, tmp_path, precision):
    """Not run on a GPU yet."""
    cpu, gpu = Segmenter.load(weights), Segmenter.load(weights, device="cuda", precision=precision)
    source = PhotoSource(tmp_path)
    for batch in gpu.segment(source, draw_photos(tmp_path, 5)):
        for name, _, mask in batch:
            assert (mask == cpu(source.decode(name).pixels).mask).mean() > 0.95


def test_masks_do_not_depend_on_threads_or_other_photos(weights, tmp_path, monkeypatch):
    draw_photos(tmp_path / "photos", 9)
    (tmp_path / "photos" / "bad.jpg").write_text("no photo")
    segmenter, source = Segmenter.load(weights), PhotoSource(tmp_path / "photos")
    expected = {name: None if name == "bad.jpg" else segmenter(tmp_path / "photos" / name).mask for name in source}
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        results = [item for batch in segmenter.segment(source, source) for item in batch]
        assert [name for name, _, _ in results] == list(source)
        for name, _, mask in results:
            np.testing.assert_array_equal(mask, expected[name])


def test_batches_have_one_shape_and_stay_within_their_window(monkeypatch):
    wide, tall = (Photo("", make_photo(*size)) for size in ((30, 40), (40, 30)))
    photos = list(enumerate([wide, tall, PhotoError("", "no photo"), wide, tall, wide, tall, tall]))

    def numbers(window=8):
        batches = batches_by_shape(((n, str(n), photo) for n, photo in photos), window)
        return [[n for n, *_ in batch] for batch in batches]

    assert numbers() == [[0, 3, 5], [1, 4, 6, 7], [2]]
    monkeypatch.setattr(predict, "GPU_PIXELS", 3 * 30 * 40)
    assert numbers() == [[0, 3, 5], [1, 4, 6], [7], [2]]
    assert numbers(5) == [[0, 3], [1, 4], [2], [5], [6, 7]] and numbers(1) == [[n] for n in range(8)]
    monkeypatch.setattr(predict, "BATCH_PIXELS", 3 * 30 * 40)
    assert numbers() == [[0, 3], [1], [2], [4, 6], [5], [7]]
    monkeypatch.setattr(predict, "GPU_PIXELS", 1)
    assert numbers() == [[0], [3], [1], [2], [4], [6], [5], [7]]
    assert list(batches_by_shape([], 8)) == []
    monkeypatch.setattr(predict, "MAX_PIXELS", 300)  # both are reduced to 15 x 20
    assert predict.network_size(30, 40) == predict.network_size(60, 80) == (15, 20)


def test_batches_give_the_masks_of_single_photos_in_order(weights, tmp_path, monkeypatch):
    """The batches of a GPU, on the CPU."""
    names = draw_photos(tmp_path, 9)
    for name in names[::4]:
        Image.fromarray(make_photo(40, 40)).save(tmp_path / name)
    (tmp_path / "bad.jpg").write_text("no photo")
    segmenter, source, sizes = Segmenter.load(weights), PhotoSource(tmp_path), []
    expected = [(name, mask) for batch in segmenter.segment(source, source) for name, _, mask in batch]

    def masks(photos):
        sizes.append(len(photos))
        return segmenter.masks([photo.pixels for photo in photos])

    segmenter.window = 8
    results = [(name, mask) for batch in segmenter.map_photos(source, source, masks) for name, _, mask in batch]
    assert [name for name, _ in results] == [name for name, _ in expected] and max(sizes) > 2
    for (_, mask), (_, one) in zip(results, expected, strict=True):
        assert mask is one is None or (mask == one).mean() > 0.999


def segment(*arguments):
    return command("segment", *arguments)


def test_segment_command(weights, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    names = draw_photos(photos / "deep", 3)
    (photos / "bad.jpg").write_text("no photo")
    done = segment(weights, photos, "--out", out)
    assert done.exit_code == 0 and "1 photo failed" in done.output, done.output
    segmenter = Segmenter.load(weights)
    for name in names:
        mask = segmenter(photos / "deep" / name).mask
        path = (out / "masks" / "deep" / name).with_suffix(".png")
        np.testing.assert_array_equal(read_label_map(path), mask)
        assert Image.open(path).mode == "P"
        assert Image.open(out / "overlays" / "deep" / name).size == mask.shape[::-1]
    assert [(e.photo, e.stage) for e in read_errors(out / "errors.jsonl")] == [("bad.jpg", "segment")]
    # Run again: existing masks are kept, missing ones are computed.
    (out / "masks" / "deep" / names[0]).with_suffix(".png").unlink()
    kept = (out / "masks" / "deep" / names[1]).with_suffix(".png")
    before = kept.stat().st_mtime_ns
    (out / "masks" / ".tmp-killed").touch()
    done = segment(weights, photos, "--out", out)
    assert done.exit_code == 0 and "segment: 4 photos, " in done.output and ", 2 done before, " in done.output
    assert kept.stat().st_mtime_ns == before and len(list((out / "masks").rglob("*"))) == 4
    # Evaluated against its own masks.
    evaluated = functools.partial(command, "evaluate")
    for arguments in ((out, out / "masks"), (weights, out / "masks", "--photos", photos)):
        done = evaluated(*arguments, "--json", tmp_path / "figures.json")
        assert done.exit_code == 0, done.output
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["mean_iou"] == figures["pixel_accuracy"] == 1 and figures["photos"] == 3
    write_label_map(out / "masks" / "other.png", np.zeros((3, 3), int), 3)
    done = evaluated(weights, out / "masks", "--photos", photos)
    assert done.exit_code == 2 and "there is no photo called other" in done.stderr


def test_photos_from_macos_have_labels_from_other_systems(weights, tmp_path):
    """The names of its files have decomposed characters."""
    (tmp_path / "photos").mkdir()
    draw_photo(0, "cat").save(tmp_path / "photos" / unicodedata.normalize("NFD", "crème.jpg"))
    assert segment(weights, tmp_path / "photos", "--out", tmp_path / "out").exit_code == 0
    (tmp_path / "truth").mkdir()
    (mask,) = (tmp_path / "out" / "masks").iterdir()
    shutil.copy(mask, tmp_path / "truth" / "crème.png")
    for words in (
        [tmp_path / "out", tmp_path / "truth"],
        [weights, tmp_path / "truth", "--photos", tmp_path / "photos"],
    ):
        done = command("evaluate", *words)
        assert done.exit_code == 0 and "mIoU 100.0 %" in done.output, done.output


@pytest.mark.parametrize("name", config.AUGMENTATION)
def test_settings_that_an_earlier_version_has_not_recorded_had_their_defaults(weights, tmp_path, name):
    out = tmp_path / "out"
    draw_photos(tmp_path / "photos", 2)
    words = weights, tmp_path / "photos", "--out", out
    assert segment(*words).exit_code == 0
    record = json.loads((out / "segment.json").read_text())
    del record["stages"]["segment"]["settings"][name]
    (out / "segment.json").write_text(json.dumps(record))
    other = {"scales": ("--scales", "1,2"), "horizontal_flip": ("--horizontal-flip",)}[name]
    assert f"made with other settings: {name}: " in segment(*words, *other).stderr
    continued = segment(*words)
    assert continued.exit_code == 0 and "2 done before" in continued.output, continued.output
    assert name in json.loads((out / "segment.json").read_text())["stages"]["segment"]["settings"]


def results_of(out: Path) -> dict[str, bytes]:
    """All files but the record."""
    return {name: data for name, data in files_of(out).items() if name != "segment.json"}


def test_scores_and_files_do_not_depend_on_workers_or_interruptions(weights, tmp_path, monkeypatch):
    names = sorted([*draw_photos(tmp_path / "photos", 9, (60, 40)), "bad.jpg"])
    (tmp_path / "photos" / "bad.jpg").write_text("no photo")
    monkeypatch.setattr("namedmask.segmenter.segment.SHARD", 4)
    words = (weights, tmp_path / "photos", "--out")
    assert segment(*words, tmp_path / "one").exit_code == 0
    expected, segmenter = results_of(tmp_path / "one"), Segmenter.load(weights)
    lines = [json.loads(line) for line in expected["scores.jsonl"].splitlines()]
    assert [line["photo"] for line in lines] == [name for name in names if name != "bad.jpg"]
    for line, (name, scores) in zip(lines, read_scores(tmp_path / "one").items(), strict=True):
        own = segmenter(tmp_path / "photos" / name).scores
        assert line["photo"] == name and scores.confidence == line["confidence"] == round(own.confidence, 4)
        assert scores.categories.keys() == own.categories.keys()
        assert all(scores.categories[n].area == round(own.categories[n].area, 6) for n in own.categories)
    # Interrupted: the next command makes what is missing.
    write, made = write_label_map, []

    def interrupted(*arguments):
        made.append(arguments)
        if len(made) == 6:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("namedmask.segmenter.segment.write_label_map", interrupted)
        assert segment(*words, tmp_path / "two").exit_code == 130
    journal = next((tmp_path / "two" / ".segmenting").glob("*.scores.jsonl"))
    with journal.open("ab") as file:
        file.write(b'{"photo": "cut')
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "two" / "masks").iterdir()}
    scored = len(journal.read_text().splitlines()) - 1
    # Two workers, and a shard that a lost one had claimed.
    assert segment(*words, tmp_path / "two", "--workers", 2).exit_code == 0
    assert results_of(tmp_path / "two") == expected
    assert sum(path.stat().st_mtime_ns == time for path, time in kept.items()) >= scored > 0
    # Without its score, a photo is segmented again.
    (tmp_path / "one" / "scores.jsonl").unlink()
    assert segment(*words, tmp_path / "one").exit_code == 0 and results_of(tmp_path / "one") == expected
    (tmp_path / "one" / "scores.jsonl").write_text("{}\n")
    result = segment(*words, tmp_path / "one")
    assert result.exit_code == 2 and "scores.jsonl:1: expected an object" in result.stderr, result.stderr


def test_photos_of_a_lost_worker_are_segmented_by_the_main_one(weights, tmp_path, monkeypatch):
    draw_photos(tmp_path / "photos", 4, (60, 40))
    monkeypatch.setattr("namedmask.segmenter.segment.SHARD", 2)
    lost = types.SimpleNamespace(rank=0, count=2, is_main=True, attempt=0, barrier=lambda name: None,
                                 device=lambda kind: kind, count_done=Worker().count_done, fail=print,
                                 claim=lambda stage, shards: iter([1]))  # fmt: skip
    monkeypatch.setattr("namedmask.distributed.current", lambda: lost)
    assert segment_photos(weights, tmp_path / "photos", tmp_path / "out") == (4, 0)
    assert len(read_scores(tmp_path / "out")) == 4 and not (tmp_path / "out" / ".segmenting").exists()


def test_overlays_of_none_a_sample_or_all_photos(weights, tmp_path, monkeypatch):
    names = draw_photos(tmp_path / "photos", 5, (40, 30))
    monkeypatch.setattr("namedmask.segmenter.overlay.SAMPLE", 2)
    for overlays, shown in (("none", []), ("sample", [0, 2]), ("all", range(5))):  # each continues
        assert segment(weights, tmp_path / "photos", "--out", tmp_path / "out", "--overlays", overlays).exit_code == 0
        made = {path.name for path in (tmp_path / "out").glob("overlays/*")}
        assert made == {sorted(names)[number] for number in shown}
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 5
    assert shown_photos(["a"] * 2, "sample") == {"a"}


def test_segment_reports_errors_in_one_line(weights, tmp_path):
    draw_photos(tmp_path / "photos", 2)
    out = tmp_path / "out"

    def assert_error(message, *arguments):
        done = segment(*arguments, "--out", out)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr

    assert_error("does not exist", weights, tmp_path / "none")
    assert_error("there is no such file", tmp_path / "none", tmp_path / "photos")
    result = segment(weights, tmp_path / "photos", "--out", out, "--precision", "int8")
    assert result.exit_code == 2 and "--precision" in result.stderr and "'bfloat16'" in result.stderr
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "model.safetensors").symlink_to(weights / "model.safetensors")
    shutil.copy(weights / "categories.json", tmp_path / "link")
    for loaded in (weights, weights / "model.safetensors", tmp_path / "link" / "model.safetensors"):
        own = segment(
            loaded, tmp_path / "photos", "--out", loaded if loaded == weights else loaded.parent, "--overwrite"
        )
        assert own.exit_code == 2 and "holds the weights" in own.stderr
    assert (weights / "categories.json").exists()
    assert segment(weights, tmp_path / "photos", "--out", out).exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    network = tiny_network()
    network.classifier.classifier[3].bias.data += 1
    save_segmenter(other, network, ["cat", "bird"])
    assert_error("categories: ['cat', 'dog'] -> ['cat', 'bird']", other, tmp_path / "photos")
    assert segment(other, tmp_path / "photos", "--out", out, "--overwrite").exit_code == 0
    draw_photo(0, "cat").save(tmp_path / "photos" / "cat0000.png")
    masks = tmp_path / "truth"
    masks.mkdir()
    write_label_map(masks / "cat0000.png", np.zeros((3, 3), int), 3)
    result = command("evaluate", other, masks, "--photos", tmp_path / "photos")
    assert "would both become cat0000.png" in result.stderr
    (tmp_path / "useless").mkdir()
    assert_error("there are no photos in", other, tmp_path / "useless", "--overwrite")
    (tmp_path / "useless" / "bad.jpg").write_text("no photo")
    assert segment(other, tmp_path / "useless", "--out", tmp_path / "out3").exit_code == 3
    assert_error("was made from the photos in", other, tmp_path / "useless")
    masks = {path: path.read_bytes() for path in (out / "masks").iterdir()}
    assert segment(other, tmp_path / "useless", "--out", out, "--overwrite").exit_code == 3
    assert {path: path.read_bytes() for path in (out / "masks").iterdir()} == masks  # nothing has replaced them


def test_released_weights_require_names(tmp_path):
    """A .pth file without a categories.json; more than 255 classes make 16-bit masks."""
    network = fill_weights(tiny_network(300))
    torch.save(network.state_dict(), tmp_path / "released.pth")
    draw_photos(tmp_path / "photos", 1)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {n}" for n in range(299)))
    arguments = (tmp_path / "released.pth", tmp_path / "photos", "--out", tmp_path / "out", "--encoder", TINY)
    assert "categories.json is missing" in segment(*arguments).stderr
    done = segment(*arguments, "--categories-file", names)
    assert done.exit_code == 0, done.output
    mask = tmp_path / "out" / "masks" / "cat0000.png"
    assert Image.open(mask).mode == "I;16"
    segmenter = Segmenter.load(tmp_path / "released.pth", categories=names.read_text().splitlines(), encoder=TINY)
    np.testing.assert_array_equal(read_label_map(mask), segmenter(tmp_path / "photos" / "cat0000.jpg").mask)


def test_large_photos_are_reduced(weights, monkeypatch):
    segmenter, photo = Segmenter.load(weights), make_photo(120, 90)
    whole = segmenter(photo).mask
    monkeypatch.setattr(predict, "MAX_PIXELS", 120 * 90)
    np.testing.assert_array_equal(segmenter(photo).mask, whole)  # at the limit, nothing changes
    monkeypatch.setattr(predict, "MAX_PIXELS", 60 * 45)
    small = np.array(Image.fromarray(photo).resize((45, 60), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(predict.reduced(photo), small)
    assert_masks(segmenter(photo).mask, F.interpolate(segmenter.coarse_logits([small]), (120, 90), mode="bilinear")[0])
    assert segmenter(make_photo(5000, 1)).mask.shape == (5000, 1)


def test_masks_and_overlays_do_not_depend_on_the_size_of_blocks(monkeypatch):
    logits = torch.randn(4, 11, 13)
    mask, photo = upsampled_argmax(logits, 60, 50), make_photo(60, 50)
    blended = overlay(photo, mask.numpy())
    monkeypatch.setattr(predict, "ROWS_AT_ONCE", 7 * 50)
    monkeypatch.setattr("namedmask.segmenter.overlay.ROWS", 7)
    assert torch.equal(upsampled_argmax(logits, 60, 50), mask)
    np.testing.assert_array_equal(overlay(photo, mask.numpy()), blended)


def test_no_name_ends_a_run(weights, tmp_path):
    """Every photo gets a mask of its own or a line of errors.jsonl, whatever its name."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    image = io.BytesIO()
    draw_photo(0, "cat").save(image, "png")
    names = [
        "a.jpg",
        "a.png/b.jpg",
        "a.jpg.png",
        "c.jpg",
        "c.png",
        os.fsdecode(b"caf\xe9.png"),
        "..jpg.png",
        "x" * 251 + ".png",
    ]
    for name in names:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(image.getvalue())
    members = ["n" * 300 + ".jpg", "/".join(["d" * 290, "e.jpg"]), "/".join(["deep"] * 900) + "/f.jpg", "A.jpg"]
    with tarfile.open(photos / "s.tar", "w") as tar:
        for member in members:
            info = tarfile.TarInfo(member)
            info.size = len(image.getvalue())
            tar.addfile(info, io.BytesIO(image.getvalue()))
    odd = [".", "/", "..", "a\0b.jpg", "sub/", "a.png", "..jpg", "y" * 255, "a.jpg"]
    lines = [*names, "s.tar", *odd]
    (photos / "list.txt").write_bytes(b"\n".join(map(os.fsencode, lines)))
    done = segment(weights, photos / "list.txt", "--out", out)
    assert done.exit_code == 0, done.output
    record = {line["photo"]: line["mask"] for line in map(json.loads, (out / "photos.jsonl").open())}
    assert len(set(record.values())) == len(record) == len(names) + len(members) + len(odd) - 1
    made = {photo for photo, mask in record.items() if (out / mask).is_file()}
    assert made == {*names, *(f"s.tar/{member}" for member in members)}
    assert {e.photo for e in read_errors(out / "errors.jsonl") if e.stage == "segment"} == record.keys() - made
    assert record["a.jpg"] == "masks/a.png" and record["c.jpg"] == "masks/c.png" and "~" in record["c.png"]
    # A photo that is added later does not take the mask of another one.
    (photos / "list.txt").write_bytes(b"c.gif\n" + (photos / "list.txt").read_bytes())
    assert segment(weights, photos / "list.txt", "--out", out).exit_code == 0
    again = {line["photo"]: line["mask"] for line in map(json.loads, (out / "photos.jsonl").open())}
    assert again.pop("c.gif") not in record.values() and again == record


def test_photo_wider_than_a_jpeg_can_be(weights, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (70000, 3)).save(tmp_path / "photos" / "wide.png")
    done = segment(weights, tmp_path / "photos", "--out", tmp_path / "out")
    assert done.exit_code == 0 and Image.open(tmp_path / "out" / "masks" / "wide.png").size == (70000, 3)


def test_output_inside_the_photo_folder_is_not_segmented(weights, tmp_path):
    draw_photos(tmp_path, 2)
    for _ in range(2):
        assert segment(weights, tmp_path, "--out", tmp_path / "out").exit_code == 0
    assert segment(weights, tmp_path, "--out", tmp_path).exit_code == 0
    assert len(list((tmp_path / "masks").rglob("*.png"))) == len(list((tmp_path / "out").rglob("*.png"))) == 2


def test_categories_that_are_not_utf_8(tmp_path):
    """As class folders may be."""
    name = os.fsdecode(b"caf\xe9")
    save_segmenter(tmp_path, tiny_network(), [name, "dog"])
    draw_photos(tmp_path / "photos", 1)
    assert Segmenter.load(tmp_path).names[1] == name
    assert segment(tmp_path, tmp_path / "photos", "--out", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "categories.json").read_text())["categories"] == [name, "dog"]


def test_stem_stays_below_its_folder():
    assert stem("a/b.c.jpg") == "a/b.c" and stem("/abs/x.jpg") == "abs/x" and stem("../../x.jpg") == "up/up/x"
    assert stem("shard.tar/x.jpg") == "shard.tar/x" and stem("//x.png") == "x"


def test_overlay_colors_only_objects():
    image = np.full((6, 6, 3), 100, np.uint8)
    mask = np.zeros((6, 6), np.uint16)
    mask[2:5, 2:5] = 1
    result = overlay(image, mask)
    assert (result[0] == 100).all() and result[3, 3].tolist() == [114, 50, 50] and result[2, 2].tolist() == [255] * 3
