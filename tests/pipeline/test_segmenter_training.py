# SPDX-License-Identifier: MIT
"""The training of a segmenter: what it learns, killed and gone on, by one worker and by two."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import two_workers
from namedmask import run, training
from namedmask.archive import Archive, Retrieved, write_archive
from namedmask.backbones import untrained_encoder
from namedmask.cli import app
from namedmask.config import SegmenterTraining
from namedmask.distributed import Worker
from namedmask.errors import UserError
from namedmask.masks import MaskRecord, write_shard
from namedmask.photos import PhotoSource
from namedmask.progress import Progress
from namedmask.record import read_config
from namedmask.segmenter import training as segmenter_training
from namedmask.segmenter.augment import IGNORE
from namedmask.segmenter.deeplab import DeepLab, load_segmenter
from namedmask.segmenter.training import Sample, accumulate_gradients, batches, train

ENCODER = "test_resnet"  # timm's, for tests
COLORS = {"cat": (220, 60, 40), "dog": (40, 90, 220)}


def scene(seed: int, kinds: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Discs of the kinds' colors side by side on a grainy ground: pixels and labels."""
    rng = np.random.default_rng(seed)
    h, w = 56 + seed % 9, 60 + seed % 13
    y, x = np.mgrid[:h, :w]
    pixels, labels = rng.integers(90, 160, (h, w, 1)).repeat(3, 2), np.zeros((h, w), np.int64)
    for place, kind in enumerate(kinds):
        r, cx = rng.uniform(9, 13), (place + 0.5) * w / len(kinds)
        disc = (y - rng.uniform(20, h - 20)) ** 2 + (x - cx) ** 2 < r * r
        pixels[disc], labels[disc] = COLORS[kind], list(COLORS).index(kind) + 1
    return pixels.astype(np.uint8), labels


@pytest.fixture(scope="module")
def encoder_weights(tmp_path_factory) -> str:
    """Random weights, with BatchNorm statistics of scenes: in training they move too slowly for a test."""
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(ENCODER), 2, 16)
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    for seed in range(16):
        network.backbone(network.normalized(photo_tensor(scene(seed, list(COLORS))[0])))
    path = tmp_path_factory.mktemp("encoder") / "model.safetensors"
    save_file(network.backbone.state_dict(), path)
    return str(path)


def photo_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@pytest.fixture
def run_of_discs(tmp_path) -> Path:
    """A run folder with true masks of 16 photos of one disc each."""
    records, archive = [], {}
    for kind in COLORS:
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for seed in range(8):
            pixels, labels = scene(seed, [kind])
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{seed}.png")
            name = f"{kind}/{seed}.png"
            records.append(MaskRecord.from_mask(name, labels > 0, kind, None, 0.9))
            archive.setdefault(kind, []).append(Retrieved(name, None))
    out = tmp_path / "out"
    out.mkdir()
    run.settle(out, {"photos": str(tmp_path / "photos")}, ["pseudolabel"])
    write_archive(out / "archive.json", Archive(list(archive), archive))
    (out / "masks").mkdir()
    write_shard(out / "masks" / "00000.jsonl", records)
    return out


@pytest.fixture
def small(encoder_weights) -> dict:
    return {"encoder": ENCODER, "encoder_weights": encoder_weights, "head_channels": 16, "crop_size": 48,
            "scale": (0.5, 1.0), "batch_size": 4, "lr": 3e-3, "encoder_lr": 1e-4}  # fmt: skip


def train_run(out: Path, settings: dict, workers: int = 1, gpus: int = 0) -> dict[str, torch.Tensor]:
    assert run.start(out, {"segmenter": settings}, ["train"], workers, gpus, False)
    return load_file(out / "segmenter" / "model.safetensors")


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "segmenter" / "metrics.jsonl").read_text().splitlines()]


def test_it_tells_several_objects_apart_that_it_saw_one_by_one(run_of_discs, small):
    train_run(run_of_discs, {**small, "steps": 120, "grayscale_prob": 0.0, "color_jitter_prob": 0.0})
    network, categories = load_segmenter(run_of_discs / "segmenter")
    assert categories == list(COLORS)
    hits = []
    for seed in range(100, 108):
        pixels, labels = scene(seed, ["dog", "cat"])
        with torch.inference_mode():
            found = network(network.normalized(photo_tensor(pixels)))[0].argmax(0).numpy()
        hits.append([((found == i) & (labels == i)).sum() / ((found == i) | (labels == i)).sum() for i in range(3)])
    assert np.mean(hits, axis=0).min() > 0.6
    first, *rest = lines(run_of_discs)
    assert first["settings"]["crop_size"] == 48 and [line["step"] for line in rest] == [50, 100, 120]
    assert rest[-1]["loss"] < 0.6 * rest[0]["loss"] and rest[0]["photos_per_second"] > 0
    assert {path.name for path in (run_of_discs / "segmenter").iterdir()} == {
        "model.safetensors",
        "categories.json",
        "metrics.jsonl",
        "tensorboard",
    }
    time_made = (run_of_discs / "segmenter" / "model.safetensors").stat().st_mtime_ns
    train_run(run_of_discs, {})  # again: done before
    assert (run_of_discs / "segmenter" / "model.safetensors").stat().st_mtime_ns == time_made
    with pytest.raises(UserError, match=r"segmenter.steps: 120 -> 9"):
        train_run(run_of_discs, {"steps": 9})


def test_killed_and_gone_on_it_ends_with_the_same_bits(run_of_discs, small, monkeypatch):
    settings = {**small, "steps": 60}
    whole = train_run(run_of_discs, settings)
    whole_lines = lines(run_of_discs)
    shutil.rmtree(run_of_discs / "segmenter")
    patience = "import time; from namedmask import run, training; training.SAVE_EVERY = 0.2; "
    start = f"run.start(__import__('pathlib').Path({str(run_of_discs)!r}), {{}}, ['train'], 1, 0, False)"
    killed = subprocess.Popen([sys.executable, "-c", patience + start], stdout=subprocess.DEVNULL)
    checkpoint = run_of_discs / "segmenter" / "checkpoint.pt"
    while not checkpoint.exists():
        assert killed.poll() is None
        time.sleep(0.01)
    first = checkpoint.stat().st_ino
    while checkpoint.stat().st_ino == first:  # until the second checkpoint, each a file of its own
        assert killed.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)  # some steps that are lost
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = torch.load(checkpoint)["step"]
    assert 0 < done < 60
    again = train_run(run_of_discs, settings)
    assert all(torch.equal(again[name], whole[name]) for name in whole) and again.keys() == whole.keys()
    losses = [[(line["step"], line["loss"]) for line in some[1:]] for some in (whole_lines, lines(run_of_discs))]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_interrupted_and_gone_on_on_a_gpu(run_of_discs, small, precision, monkeypatch):
    """No GPU has run this yet; it need not give the same bits, as some of torch's gradients are not reproducible."""
    settings = {**small, "precision": precision, "steps": 120, "grayscale_prob": 0.0, "color_jitter_prob": 0.0}
    steps = iter(range(70))

    def interrupted(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return accumulate_gradients(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "SAVE_EVERY", 0)
        patch.setattr(segmenter_training, "accumulate_gradients", interrupted)
        train_run(run_of_discs, settings, gpus=1)
    assert torch.load(run_of_discs / "segmenter" / "checkpoint.pt")["step"] == 70
    train_run(run_of_discs, settings, gpus=1)
    _, *rest = lines(run_of_discs)
    assert [line["step"] for line in rest] == [50, 100, 120] and rest[-1]["loss"] < 0.6 * rest[0]["loss"]


def test_a_checkpoint_of_other_masks_is_refused(run_of_discs, small, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    samples, source = samples_of(run_of_discs)
    arguments = (3, run_of_discs, SegmenterTraining(**small, steps=2), Worker(), "cpu", Progress("", Worker()))
    with Progress("train", Worker()) as progress:
        train(source, samples, *arguments[:-1], progress)
        with pytest.raises(UserError, match="other settings or masks"):
            train(source, samples[1:], *arguments[:-1], progress)
        (run_of_discs / "metrics.jsonl").unlink()  # lost, while the checkpoint is there
        train(source, samples, *arguments[:-1], progress)
    assert len((run_of_discs / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_segmenter_of_other_masks_is_refused(run_of_discs, small):
    folder, words = run_of_discs / "segmenter", ["train", str(run_of_discs)]
    train_run(run_of_discs, {**small, "steps": 1})
    (folder / "checkpoint.pt").touch()  # killed just before it was to go
    assert CliRunner().invoke(app, words).exit_code == 0 and not (folder / "checkpoint.pt").exists()
    made = (folder / "model.safetensors").read_bytes()
    (run_of_discs / "refined").mkdir()
    write_shard(run_of_discs / "refined" / "00000.jsonl", [s.record for s in samples_of(run_of_discs)[0][:9]])
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"trained on other masks than {run_of_discs / 'refined'}" in refused.stderr
    assert "--overwrite" in refused.stderr and (folder / "model.safetensors").read_bytes() == made
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
    assert (folder / "model.safetensors").read_bytes() != made
    assert CliRunner().invoke(app, words).exit_code == 0


def test_masks_that_are_not_finished_are_refused(run_of_discs):
    record = (run_of_discs / "stages.json").read_text()
    (run_of_discs / "stages.json").write_text(
        record.replace('shard_size": 64', 'shard_size": 8')
    )  # two shards, one made
    for stage in ("experts", "train"):
        refused = CliRunner().invoke(app, [stage, str(run_of_discs)])
        assert refused.exit_code == 2 and "masks is not finished; run" in refused.stderr, refused.output
    assert not (run_of_discs / "refined").exists() and not (run_of_discs / "segmenter").exists()


def samples_of(out: Path) -> tuple[list[Sample], PhotoSource]:
    records = [MaskRecord.from_json(line) for line in (out / "masks" / "00000.jsonl").open()]
    samples = [Sample(record, list(COLORS).index(record.category) + 1) for record in records]
    return samples, PhotoSource(out.parent / "photos")


def test_the_command_takes_its_options(run_of_discs, encoder_weights):
    options = {"--encoder": ENCODER, "--encoder-weights": encoder_weights, "--head-channels": 16, "--crop-size": 32,
               "--batch-size": 4, "--steps": 2, "--lr": 1e-3, "--encoder-lr": 0, "--precision": "bfloat16",
               "--grad-accum-steps": 2,
               "--seed": 3}  # fmt: skip
    words = ["train", str(run_of_discs), *(str(word) for option in options.items() for word in option)]
    result = CliRunner().invoke(app, [*words, "--paste-objects", "0,3"])
    assert result.exit_code == 0, result.output
    assert f"the segmenter is in {run_of_discs / 'segmenter'}" in result.output
    kept = read_config(run_of_discs).segmenter
    assert kept.paste_objects == (0, 3) and kept.precision == "bfloat16" and kept.seed == 3
    assert (
        CliRunner().invoke(app, ["train", str(run_of_discs)]).exit_code == 0
    )  # with the settings that it was made with


def test_every_step_draws_by_itself_and_workers_share_it(run_of_discs, small):
    samples, source = samples_of(run_of_discs)
    settings = SegmenterTraining(**small)
    whole = list(batches(source, samples, settings, Worker(), range(6)))
    for (photos, labels), (again, labels_again) in zip(
        whole[3:], batches(source, samples, settings, Worker(), range(3, 6)), strict=True
    ):
        assert torch.equal(photos, again) and torch.equal(labels, labels_again)
    halves = [batches(source, samples, settings, Worker(rank, 2), range(6)) for rank in range(2)]
    for (photos, labels), *parts in zip(whole, *halves, strict=True):
        assert torch.equal(photos, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))
    photos, labels = whole[0]
    assert photos.shape == (4, 3, 48, 48) and photos.dtype == torch.uint8 and labels.dtype == torch.int32
    plain = settings.model_copy(update={"paste_objects": (0, 0)})
    for _, labels in batches(source, samples, plain, Worker(), range(4)):
        assert all(len(view[view > 0].unique()) == 1 for view in labels)


def test_an_expert_has_two_classes(run_of_discs, small):
    samples, source = samples_of(run_of_discs)
    settings = SegmenterTraining(**{**small, "paste_objects": (0, 0), "batch_size": 2}, steps=3)
    cats = [Sample(record, 1) for record, label, _ in samples if label == 1]
    with Progress("experts", Worker()) as progress:
        network = train(source, cats, 2, run_of_discs, settings, Worker(), "cpu", progress)
    assert network.classes == 2 and progress.done == 6


def batch_of(count: int, encoder: str, **settings) -> dict:
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)
    labels = torch.randint(IGNORE, 4, (count, 40, 40), dtype=torch.int32, generator=generator)
    labels[0] = IGNORE  # of the photos' labeled pixels, the workers have different numbers
    return {"encoder": encoder, "photos": photos, "labels": labels, "settings": settings}


def test_two_workers_have_the_gradients_of_one(tmp_path):
    """With BatchNorm as torch has it, and with timm's, which an activation follows."""
    several = [batch_of(4, encoder) for encoder in ("test_resnet", "test_efficientnet")]
    torch.save(several, tmp_path / "batches.pt")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, two_workers.__file__, str(tmp_path / "batches.pt")]
    workers = [subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank)}) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    for batch, found in zip(several, torch.load(tmp_path / "batches.out"), strict=True):
        want = two_workers.step(batch, Worker())
        assert found.keys() == want.keys()
        for name, value in want.items():
            size = value.abs().max().clamp_min(1e-3) if value.is_floating_point() else 1
            assert (found[name] - value).abs().max() / size < 1e-3, name


def test_two_workers_train_what_one_does(run_of_discs, small, one_thread):
    settings = {**small, "steps": 4, "lr": 1e-4, "encoder_lr": 1e-4}
    alone = train_run(run_of_discs, settings)
    loss = lines(run_of_discs)[-1]["loss"]
    shutil.rmtree(run_of_discs / "segmenter")
    together = train_run(run_of_discs, settings, workers=2)
    assert lines(run_of_discs)[-1]["loss"] == pytest.approx(loss, abs=2e-4)
    moved = np.mean([float((alone[n] - together[n]).abs().float().mean()) for n in alone if "weight" in n])
    assert moved < 0.05 * 4e-4  # of the way that Adam goes in four steps: gradients near 0 may change sign


def test_the_parts_of_a_batch_add_up():
    batch = batch_of(4, ENCODER)
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(ENCODER), 4, 16).eval()  # BatchNorm's statistics are those of each part
    grads = []
    for parts in (1, 2, 4):
        network.zero_grad()
        settings = SegmenterTraining(grad_accum_steps=parts)
        loss = accumulate_gradients(network, network, batch["photos"], batch["labels"], settings, Worker())
        grads.append(torch.cat([loss.view(1), *(p.grad.flatten() for p in network.parameters())]))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], atol=1e-5, rtol=1e-4)


def test_bfloat16_is_near_float32_and_ids_go_above_255():
    batch = batch_of(2, ENCODER)
    labels = torch.where(batch["labels"] > 0, batch["labels"] + 396, batch["labels"])
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(ENCODER), 400, 16)
    loss = {}
    for precision in ("float32", "bfloat16"):
        settings = SegmenterTraining(precision=precision)
        loss[precision] = float(accumulate_gradients(network, network, batch["photos"], labels, settings, Worker()))
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in network.parameters())
    assert network.classifier.classifier[3].bias.grad[[397, 398, 399]].abs().min() > 0
    assert loss["bfloat16"] == pytest.approx(loss["float32"], rel=0.02)


def test_a_batch_without_a_labeled_pixel_changes_nothing():
    batch = batch_of(1, ENCODER)
    network = DeepLab(untrained_encoder(ENCODER), 4, 16).eval()
    loss = accumulate_gradients(
        network, network, batch["photos"], batch["labels"], SegmenterTraining(), Worker()
    )  # all of them are IGNORE
    assert float(loss) == 0 and all(float(p.grad.abs().max()) == 0 for p in network.parameters())


def test_what_cannot_be_trained_on_is_refused(run_of_discs, small):
    samples, source = samples_of(run_of_discs)
    settings = SegmenterTraining(**small)
    with Progress("train", Worker()) as progress:
        with pytest.raises(UserError, match="batch of 4 cannot be split evenly among 3"):
            train(source, samples, 3, run_of_discs, settings, Worker(0, 3), "cpu", progress)
        with pytest.raises(UserError, match="two photos at a time"):
            train(
                source,
                samples,
                3,
                run_of_discs,
                settings.model_copy(update={"batch_size": 1}),
                Worker(),
                "cpu",
                progress,
            )
    write_archive(run_of_discs / "archive.json", Archive(["dog"], {"dog": []}))
    with pytest.raises(UserError, match="has masks of cat, of which"):
        train_run(run_of_discs, small)
    Image.new("RGB", (9, 9)).save(run_of_discs.parent / "photos" / "cat" / "0.png")
    (run_of_discs.parent / "photos" / "cat" / "1.png").unlink()
    for sample, message in ((samples[0], "has changed since its mask"), (samples[1], "cannot be used any more.*cat/1")):
        with pytest.raises(UserError, match=message):
            next(batches(source, [sample], settings, Worker(), range(1)))
    (run_of_discs / "masks" / "00000.jsonl").write_text("")
    with pytest.raises(UserError, match="there are no masks"):
        train_run(run_of_discs, small)


def test_experts_masks_are_preferred(run_of_discs, small, monkeypatch):
    taken = []
    monkeypatch.setattr(segmenter_training, "train", lambda source, samples, *rest: taken.extend(samples) or stop())
    write_refined = [sample.record for sample in samples_of(run_of_discs)[0][:3]]
    (run_of_discs / "refined").mkdir()
    write_shard(run_of_discs / "refined" / "00000.jsonl", write_refined)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(run_of_discs, small)
    assert [sample.record for sample in taken] == write_refined and {sample.label for sample in taken} == {1}
