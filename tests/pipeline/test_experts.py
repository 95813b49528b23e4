# SPDX-License-Identifier: MIT
"""Category experts, separate and shared: better masks, no repeated work, resuming, multiple workers."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from namedmask import experts, run
from namedmask.archive import Archive, Retrieved, write_archive
from namedmask.backbones import untrained_encoder
from namedmask.config import ExpertTraining, make_config
from namedmask.errors import UserError
from namedmask.experts import SharedExperts, _by_category, certainty, expert_samples, file_name
from namedmask.masks import MaskRecord, best_masks, read_errors, read_masks, read_shard, write_shard
from namedmask.photos import PhotoSource
from namedmask.report import write_report
from namedmask.review import write_review
from namedmask.segmenter.augment import IGNORE
from namedmask.segmenter.deeplab import DeepLab
from namedmask.segmenter.predict import Segmenter
from namedmask.segmenter.training import samples_digest
from namedmask.selection import Selection, select
from namedmask.training import trained_on
from small_world import command, interrupted_after

ENCODER = "test_resnet"  # timm's, for tests
COLORS = {"cat": (220, 60, 40), "hot/dog": (40, 90, 220)}  # one name cannot be a file name
ONE, BOTH = 6, 3  # number of photos of each category, and of both categories


def scene(seed: int, categories: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Discs in the colors of the categories, side by side on a grainy background: pixels and masks."""
    rng = np.random.default_rng(seed)
    h, w = 56 + seed % 9, 60 + seed % 13
    y, x = np.mgrid[:h, :w]
    pixels, masks = rng.integers(90, 160, (h, w, 1)).repeat(3, 2), {}
    for index, category in enumerate(categories):
        center = rng.uniform(20, h - 20), (index + 0.5) * w / len(categories)
        masks[category] = (y - center[0]) ** 2 + (x - center[1]) ** 2 < rng.uniform(9, 13) ** 2
        pixels[masks[category]] = COLORS[category]
    return pixels.astype(np.uint8), masks


def shifted(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mask of a detector that errs differently on every photo."""
    return np.roll(mask, rng.integers(-5, 6, 2), (0, 1))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, dict, dict]:
    """A run folder with poor masks, settings of experts, and the true masks by photo and category."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(ENCODER), 2, 16)
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    truth, records, archive = {}, {name: [] for name in COLORS}, {name: [] for name in COLORS}
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    scenes = [[category] for category in COLORS for _ in range(ONE)] + [list(COLORS)] * BOTH
    for number, shown in enumerate(scenes):
        pixels, masks = scene(number, shown)
        network.backbone(network.normalized(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
        name = f"{number:02}.png"
        Image.fromarray(pixels).save(root / "photos" / name)
        for category in shown:
            truth[name, category] = masks[category]
            archive[category].append(Retrieved(name, 0.5))
            records[category].append(MaskRecord.from_mask(name, shifted(masks[category], rng), category, 0.5, 0.9))
    weights = root / "encoder.safetensors"
    save_file(network.backbone.state_dict(), weights)
    out = root / "out"
    out.mkdir()
    categories = list(COLORS)
    run.settle(out, {"photos": str(root / "photos"), "categories": categories}, ["archive", "pseudolabel"])
    write_archive(out / "archive.json", Archive(categories, archive))
    (out / "masks").mkdir()
    by_photo = sorted((r for masks in records.values() for r in masks), key=lambda r: r.photo)
    write_shard(out / "masks" / "00000.jsonl", by_photo)
    settings = {
        "encoder": ENCODER, "encoder_weights": str(weights), "head_channels": 16, "crop_size": 48, "scale": (0.5, 1.0),
        "batch_size": 4, "lr": 3e-3, "encoder_lr": 1e-4, "steps": 120, "color_jitter_prob": 0.0, "grayscale_prob": 0.0,
    }  # fmt: skip
    return out, settings, truth


def copy_of(out: Path, folder: Path) -> Path:
    return shutil.copytree(
        out, folder / "out", ignore=lambda _, names: {"experts", "refining", "refined", ".lock"} & set(names)
    )


def iou(record: MaskRecord, truth: dict) -> float:
    mask, true = record.mask(), truth[record.photo, record.category]
    return (mask & true).sum() / (mask | true).sum()


def start(out: Path, settings: dict, workers: int = 1) -> None:
    assert run.start(out, {"experts": settings}, ["experts"], workers, 0, False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("mode", ["separate", "shared"])
def test_experts_improve_their_training_masks(world, tmp_path, mode, one_thread):
    original, settings, truth = world
    out = copy_of(original, tmp_path)
    if mode == "shared":  # as many steps as the separate trainings together, and a larger head
        settings = {**settings, "steps": settings["steps"] * len(COLORS), "head_channels": 32}
    start(out, {**settings, "mode": mode})
    before, after = list(read_masks(out / "masks")), list(read_masks(best_masks(out)))
    assert best_masks(out) == out / "refined"
    key = lambda record: (record.photo, record.category)  # noqa: E731
    assert sorted(map(key, after)) == sorted(map(key, before)) and all(r.category_score == 0.5 for r in after)
    assert all(r.size == truth[key(r)].shape and 0 <= r.score <= 1 for r in after)
    assert np.mean([iou(r, truth) for r in after]) > np.mean([iou(r, truth) for r in before]) + 0.06
    both = [r for r in after if sum(o.photo == r.photo for o in after) == 2]
    # Each of the two records is from the expert of its category.
    assert len(both) == 2 * BOTH and np.mean([iou(r, truth) for r in both]) > 0.5
    names = {"cat", "hot%2Fdog"} if mode == "separate" else {"shared"}
    assert {p.name for p in (out / "experts").glob("*.safetensors")} == {f"{name}.safetensors" for name in names}
    assert all((out / "experts" / name / "metrics.jsonl").exists() for name in names)
    assert not list((out / "experts").rglob("checkpoint.pt"))
    if mode == "separate":
        assert {r.category for r in read_shard(out / "refined" / "00001.jsonl")} == {"hot/dog"}
    # Nothing is recomputed; if the masks are lost, only the relabeling is repeated.
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    refined = files(out / "refined")
    start(out, {})
    shutil.rmtree(out / "refined")
    start(out, {})
    assert files(out / "refined") == refined
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "refined by category experts" in write_report(out).read_text()


def test_killed_run_resumes_bit_identically(world, tmp_path, one_thread, monkeypatch):
    """Interrupted during the training of the first expert, killed during that of the second."""
    original, settings, _ = world
    out = copy_of(original, tmp_path)
    settings = {**settings, "steps": 16}
    start(out, settings)
    expected = files(out / "refined")
    shutil.rmtree(out / "refined")
    shutil.rmtree(out / "experts")
    setup = "import pathlib; from namedmask import run, training; training.SAVE_EVERY = 0.05; "
    command = setup + f"run.start(pathlib.Path({str(out)!r}), {{}}, ['experts'], 1, 0, False)"
    with interrupted_after(5, monkeypatch):
        start(out, {})
    first, second = (out / "experts" / f"{name}.safetensors" for name in ("cat", "hot%2Fdog"))
    assert first.with_suffix("").joinpath("checkpoint.pt").exists() and not first.exists()
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not second.with_suffix("").joinpath("checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert first.exists() and not second.exists() and best_masks(out) == out / "masks"
    time_written = first.stat().st_mtime_ns
    (out / "experts" / "hot%2Fdog" / ".tmp-half").touch()
    start(out, {})
    assert files(out / "refined") == expected and first.stat().st_mtime_ns == time_written
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.parametrize("mode", ["separate", "shared"])
def test_two_workers(world, tmp_path, mode, one_thread):
    """Separate experts are bit-identical to those of one worker; the shared network is equal up to rounding."""
    original, settings, _ = world
    masks = []
    for workers in (1, 2):
        out = copy_of(original, tmp_path / str(workers))
        start(out, {**settings, "mode": mode, "steps": 12}, workers)
        masks.append(list(read_masks(out / "refined")))
    if mode == "separate":
        assert masks[0] == masks[1]
    else:
        assert [(r.photo, r.category) for r in masks[0]] == [(r.photo, r.category) for r in masks[1]]
        same = [(a.mask() == b.mask()).mean() for a, b in zip(*masks, strict=True)]
        assert np.mean(same) > 0.97


def test_changed_settings_raise_with_the_difference(world, tmp_path):
    original, settings, _ = world
    out = copy_of(original, tmp_path)
    start(out, {**settings, "steps": 2})
    experts = functools.partial(command, "experts", out)
    for changed, difference in (
        (["--steps", 3], "experts.steps: 2 -> 3"),
        (["--mode", "shared"], "'separate' -> 'shared'"),
    ):
        done = experts(*changed)
        assert done.exit_code == 2 and difference in done.stderr and "--overwrite" in done.stderr
    assert experts("--mode", "shared", "--overwrite").exit_code == 0
    assert [p.name for p in (out / "experts").glob("*.safetensors")] == ["shared.safetensors"]
    with pytest.raises(UserError, match="one object, so nothing is pasted"):
        make_config({"photos": "p", "experts": {"paste_objects": (1, 2)}})


def test_a_missing_clip_model_is_said_before_the_training(world, tmp_path):
    """With `--select auto`, names select the masks of runs that have an index."""
    original, settings, _ = world
    out = copy_of(original, tmp_path)
    weights = tmp_path / "clip.pt"
    weights.write_bytes(b"x")
    run.settle(out, {"index": {"clip_weights": str(weights)}}, ["index"])
    weights.unlink()
    (out / "index").mkdir()
    (out / "index" / "00000.safetensors").touch()
    with pytest.raises(UserError, match=r"--clip-weights .*clip\.pt is gone: put it back"):
        start(out, {**settings, "steps": 2})
    assert not list(out.glob("experts/*"))


@pytest.mark.parametrize("mode", ["separate", "shared"])
def test_experts_train_on_the_selected_masks_and_relabel_all(world, tmp_path, printing, capsys, mode):
    original, settings, _ = world
    out = copy_of(original, tmp_path)
    records = list(read_masks(out / "masks"))
    review = {(r.photo, r.category): "reject" for r in records if r.photo in ("00.png", "01.png", "06.png")}
    write_review(out, review)
    start(out, {**settings, "mode": mode, "steps": 1, "per_category": 5})
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cat ")] == [
        ["cat", str(ONE + BOTH), "5", "5"], ["cat", str(ONE + BOTH), str(ONE + BOTH)],
    ]  # fmt: skip
    assert len(list(read_masks(out / "refined"))) == len(records)
    kept = _by_category(select(records, Selection(per_category=5), review), list(COLORS))
    networks = {"shared": list(COLORS)} if mode == "shared" else {"cat": ["cat"], "hot%2Fdog": ["hot/dog"]}
    for name, categories in networks.items():
        samples = expert_samples(kept, categories, ExpertTraining())
        assert trained_on(out / "experts" / name, "") == samples_digest(samples)
    start(out, {})
    assert "trained on other masks" not in capsys.readouterr().err
    write_review(out, {("00.png", "cat"): "accept"})
    start(out, {})
    changed = "shared.safetensors" if mode == "shared" else "cat.safetensors, hot%2Fdog.safetensors"
    assert f"warning: {changed} in {out / 'experts'}: trained on other masks" in capsys.readouterr().err


def test_empty_masks_and_missing_photos(world, tmp_path, printing, capsys):
    """A category of empty masks is an error or keeps its records; an unreadable photo is listed in the errors."""
    original, settings, _ = world
    out = copy_of(original, tmp_path)
    records = list(read_masks(out / "masks"))
    empty = [MaskRecord.from_mask(r.photo, np.zeros(r.size, bool), r.category, 0.5, 0.0) for r in records]
    mixed = [e if r.category == "hot/dog" else r for r, e in zip(records, empty, strict=True)]
    write_shard(out / "masks" / "00000.jsonl", mixed)
    with pytest.raises(UserError, match=r"'hot/dog' has no usable mask in .*masks: detect with other settings"):
        start(out, {**settings, "steps": 2})
    assert not (out / "experts").exists()
    start(out, {**settings, "steps": 2, "allow_empty": True})
    refined = list(read_masks(out / "refined"))
    assert [r for r in refined if r.category == "hot/dog"] == [r for r in mixed if r.category == "hot/dog"]
    assert not (out / "experts" / "hot%2Fdog.safetensors").exists()
    shared = copy_of(out, tmp_path / "shared")
    (shared / "stages.json").write_text((original / "stages.json").read_text())
    start(shared, {**settings, "mode": "shared", "steps": 2, "allow_empty": True})
    kept = [r for r in read_masks(shared / "refined") if r.category == "hot/dog"]
    assert kept == [r for r in mixed if r.category == "hot/dog"]
    # An expert that always predicts background makes empty masks with the score 0.
    path = out / "experts" / "cat.safetensors"
    state = load_file(path)
    state["classifier.classifier.3.weight"][:] = 0
    state["classifier.classifier.3.bias"][:] = torch.tensor([1.0, -1.0])
    save_file(state, path)
    shutil.rmtree(out / "refined")
    photos = shutil.copytree(original.parent / "photos", tmp_path / "photos")
    (photos / "00.png").write_bytes(b"")
    assert run.start(out, {"photos": str(photos)}, ["experts"], gpus=0)
    cats = [r for r in read_masks(out / "refined") if r.category == "cat"]
    assert len(cats) == ONE + BOTH - 1 and all(r.area == 0 and r.score == 0 for r in cats)
    assert f"usable masks in {out / 'refined'}: 0 of 17" in capsys.readouterr().out
    assert [(e.photo, e.stage) for e in read_errors(out / "errors.jsonl")] == [("00.png", "experts")]
    write_shard(out / "masks" / "00000.jsonl", empty)
    shutil.rmtree(out / "refined")
    shutil.rmtree(out / "experts")
    for mode in ("separate", "shared"):
        with pytest.raises(UserError, match=r"all masks in .* are empty"):
            start(out, {"mode": mode})


@pytest.mark.parametrize("mode", ["separate", "shared"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_photos_are_relabeled_in_the_precision_of_the_settings(world, tmp_path, monkeypatch, mode, precision):
    """A segmenter by itself would take bfloat16 on a GPU, whatever the settings say."""
    original, settings, _ = world
    dtypes, relabel = set(), experts.relabel

    def spy(source, by_photo, segmenter, *others):
        dtypes.update({segmenter.dtype, *(parameter.dtype for parameter in segmenter.network.parameters())})
        return relabel(source, by_photo, segmenter, *others)

    monkeypatch.setattr(experts, "relabel", spy)
    start(copy_of(original, tmp_path), {**settings, "mode": mode, "steps": 1, "precision": precision})
    assert dtypes == {getattr(torch, precision)}


def test_scores_of_relabeled_masks(tmp_path):
    """The mean of the detector's score, the IoU of both masks, and the expert's certainty times the free border."""
    pixels, masks = scene(1, ["cat"])
    Image.fromarray(pixels).save(tmp_path / "1.png")
    before = MaskRecord.from_mask("1.png", masks["cat"], "cat", 0.5, 0.8)
    torch.manual_seed(3)
    segmenter = Segmenter(DeepLab(untrained_encoder(ENCODER), 2, 16), ["cat"])
    difference = segmenter.coarse_logits([pixels])[0].diff(dim=0)[0]
    object_logits = (difference.quantile(0.7) - difference) / difference.std()
    [(_, [record])] = experts.relabel(PhotoSource(tmp_path), {"1.png": [before]}, segmenter, lambda *_: object_logits)
    logits = F.interpolate(object_logits[None, None], pixels.shape[:2], mode="bilinear")[0, 0]
    mask, soft = record.mask(), object_logits.sigmoid()
    assert (mask != (logits > 0).numpy()).mean() < 1e-3 and 0.2 < mask.mean() < 0.8
    iou = (mask & masks["cat"]).sum() / (mask | masks["cat"]).sum()
    confidence = 2 * soft[soft > 0.5].sum() / (soft.sum() + (soft > 0.5).sum())
    border = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]]).mean()
    assert 0.05 < border < 0.5
    assert record.score == pytest.approx((0.8 + iou + float(confidence) * (1 - border)) / 3, abs=1e-5)


class Names:
    """A scorer for which the name of a category is found in the old and in the new mask with given probabilities."""

    def __init__(self, *probabilities: float):
        self.probabilities = torch.tensor([probabilities])

    def score(self, images, masks, numbers, categories):
        assert numbers.tolist() == [[0, 1]] and categories == ["cat"]
        return self.probabilities


@pytest.mark.parametrize(
    ("columns", "probabilities", "is_replaced"),
    [(6, (0.2, 0.31), True), (6, (0.2, 0.29), False), (7, (0.2, 0.9), False), (0, (0.9, 0.2), False)],
)
def test_masks_are_replaced_where_they_hardly_overlap_and_the_name_is_likelier(
    tmp_path, columns, probabilities, is_replaced
):
    """The expert's mask is the left half, the detector's the right half and some columns more: IoU .094 or .109."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "1.png")
    mask = np.zeros((64, 64), bool)
    mask[:, 32 - columns :] = True
    before = MaskRecord.from_mask("1.png", mask, "cat", 0.5, 0.8)
    segmenter = Segmenter(DeepLab(untrained_encoder(ENCODER), 2, 16), ["cat"])
    logits = torch.full((16, 16), -9.0)
    logits[:, :8] = 9
    scorer = Names(*probabilities)
    by_photo = {"1.png": [before]}
    [(_, [record])] = experts.relabel(PhotoSource(tmp_path), by_photo, segmenter, lambda *_: logits, scorer)
    assert (record is not before) == is_replaced
    assert not is_replaced or (record.mask()[:, :32].all() and not record.mask()[:, 32:].any())


def test_shared_loss_trains_only_the_output_layer_of_the_category():
    torch.manual_seed(0)
    network = SharedExperts(untrained_encoder(ENCODER), 3, 16, dropout=0.0)
    labels = torch.randint(0, 2, (2, 24, 32), dtype=torch.int32)
    labels[:, :5] = IGNORE
    labels[0][labels[0] >= 0] += 4  # of category 2: 4 and 5
    photos = torch.randn(2, 3, 24, 32)
    torch.nn.init.normal_(network.layers.bias)
    loss = network.loss(network(photos), labels)
    loss.backward()
    layers = network.layers
    assert layers.weight.grad[2].any() and layers.weight.grad[0].any() and not layers.weight.grad[1].any()
    with torch.no_grad():
        expected = 0.0
        for photo, category in ((0, 2), (1, 0)):
            coarse = torch.einsum("chw,c->hw", network(photos)[photo], layers.weight[category]) + layers.bias[category]
            logits = F.interpolate(coarse[None, None], (24, 32), mode="bilinear")[0, 0]
            targets = (labels[photo] - 2 * category).float()
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            expected += losses[labels[photo] != IGNORE].sum()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-3)


def test_file_names():
    assert [file_name(name) for name in ("traffic light", "hot/dog", "..", "a%2Fb")] == [
        "traffic light", "hot%2Fdog", "%2E%2E", "a%252Fb",
    ]  # fmt: skip
    odd = [
        "\u72d7" * 30,
        "\u72d7" * 31,
        "n" * 255,
        "n" * 254 + "m",
        os.fsdecode(b"caf\xe9"),
        "caf\xe9",
        "a\0",
        "\ud800",
    ]
    files = [file_name(name) for name in odd]
    assert len(set(files)) == len(odd) and all(name.isascii() and len(name) <= 200 for name in files)


def test_samples_and_certainty():
    masks = {"empty": np.zeros((4, 6), bool), "full": np.ones((4, 6), bool)}
    records = {c: [MaskRecord.from_mask(name, m, c, None, 0) for name, m in masks.items()] for c in "xy"}
    records["z"] = records["x"][:1]  # a category of empty masks

    def samples(empty_masks):
        found = expert_samples(records, list(records), ExpertTraining(empty_masks=empty_masks))
        return [(s.record.photo, s.record.category, s.label, s.background) for s in found]

    assert samples("skip") == [("full", "x", 1, 0), ("full", "y", 3, 2)]
    assert samples("background") == [(name, *rest) for _, *rest in samples("skip") for name in ("empty", "full")]
    soft = torch.zeros(4, 6)
    assert certainty(soft) == 0.0
    soft[1:3, 1:3] = 1.0
    assert certainty(soft) == 1.0
    soft[1, 1] = 0.6
    soft[0, 0] = 0.4
    assert float(certainty(soft)) == pytest.approx(2 * 3.6 / (4.0 + 4))
