# SPDX-License-Identifier: MIT
"""The labeler: batches, photos that cannot be labeled, times and traces."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from namedmask import pseudolabel, timing
from namedmask.archive import Archive, Retrieved
from namedmask.batches import sizes_of
from namedmask.config import make_config
from namedmask.distributed import Worker
from namedmask.photos import PhotoError, PhotoSource
from namedmask.pseudolabel import Labeler
from namedmask.timing import StepTimes


def label(labeler, source, names):
    """The labels of each batch, by the names of their photos."""
    for batch in labeler.label(source, [(name, None) for name in names]):
        yield {name: label for (name, _), label in batch}


def labels_of(labeler, source, names):
    """The labels of photos, by their names."""
    return {name: own for batch in label(labeler, source, names) for name, own in batch.items()}


@pytest.fixture
def labeler(tmp_path, backbone_weights):
    detector = {"backbone": "vit_tiny_patch16_224", "backbone_weights": str(backbone_weights), "image_size": 32}
    return Labeler(make_config({"photos": str(tmp_path), "detector": detector, "refine": {"name": "crf"}}), "cpu")


def test_photo_that_a_kernel_rejects_is_one_error(labeler, tmp_path):
    sizes = {"a.png": (40, 30), "b.png": (65535, 35), "c.png": (50, 60)}
    rng = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / name, compress_level=0)
    labels = labels_of(labeler, PhotoSource(tmp_path), sizes)
    assert sorted(labels) == list(sizes)
    assert isinstance(labels["b.png"], PhotoError) and "sigmas of bilateral are too small" in labels["b.png"].reason
    assert [labels[name].mask.size[::-1] for name in ("a.png", "c.png")] == [sizes["a.png"], sizes["c.png"]]


def test_batches_are_limited_in_pixels(labeler, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudolabel, "BATCH_PIXELS", 2500)
    sizes = [1000, 1000, 1000, 9000, 100, 100]
    names = [f"{number}.png" for number in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        Image.new("RGB", (size // 10, 10)).save(tmp_path / name)
    batches = [list(batch) for batch in label(labeler, PhotoSource(tmp_path), names)]
    assert batches == [names[:2], names[2:3], names[3:4], names[4:]]


def draw_photos(folder: Path, sizes: list[tuple[int, int]]) -> list[str]:
    names = [f"{number}.png" for number in range(len(sizes))]
    for name, (h, w) in zip(names, sizes, strict=True):
        Image.fromarray(np.random.default_rng(h).integers(0, 255, (h, w, 3), np.uint8)).save(folder / name)
    return names


SIZES = [(40, 30), (32, 50), (40, 30), (20, 64), (32, 50), (40, 30)]


def test_photos_of_a_window_are_sorted_by_size(labeler, tmp_path, monkeypatch):
    """Their labels are those of photos in order, and so are the lines of a shard."""
    names, source = draw_photos(tmp_path, SIZES), PhotoSource(tmp_path)
    in_order = labels_of(labeler, source, names)
    monkeypatch.setattr(pseudolabel, "BATCH_PIXELS", 2500)
    monkeypatch.setitem(pseudolabel.WINDOW, "cpu", 4)
    batches = list(label(labeler, source, [*names, "missing.png"]))
    assert [list(batch) for batch in batches] == [
        ["missing.png", "3.png"],
        ["1.png"],
        ["4.png"],
        ["0.png", "2.png"],
        ["5.png"],
    ]
    labels = {name: own for batch in batches for name, own in batch.items()}
    assert isinstance(labels.pop("missing.png"), PhotoError) and labels == in_order

    archive = Archive(["thing"], {"thing": [Retrieved(name, None) for name in names]})
    config = make_config({"photos": str(tmp_path), "pseudolabel": {"shard_size": 4}})
    (tmp_path / "masks").mkdir()
    monkeypatch.setattr(pseudolabel, "Labeler", lambda *arguments: labeler)
    pseudolabel.pseudolabel(source, archive, tmp_path / "masks", config, Worker(), "cpu", lambda photos: None)
    shards = [(tmp_path / f"masks/0000{shard}.jsonl").read_text().splitlines() for shard in (0, 1)]
    assert [[json.loads(line)["photo"] for line in lines] for lines in shards] == [names[:4], names[4:]]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20 GiB"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),  # on a CPU
        (MemoryError, "Unable to allocate 20 GiB"),  # numpy
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_halved(
    labeler, tmp_path, monkeypatch, printing, capsys, kind, message
):
    names, source = draw_photos(tmp_path, SIZES), PhotoSource(tmp_path)
    expected = labels_of(labeler, source, names)
    candidates, calls = labeler.detector.candidates, []

    def small_memory(images):
        sizes = sizes_of(images)
        calls.append(len(sizes))
        if len(sizes) > 2 or (20, 64) in sizes:
            raise kind(message)
        return candidates(images)

    monkeypatch.setattr(labeler.detector, "candidates", small_memory)
    labels = labels_of(labeler, source, names)
    assert calls == [6, 3, 1, 2, 3, 1, 2]
    reason = labels.pop("3.png").reason
    assert reason == f"there is not enough memory to label it: {message}"
    assert labels == {name: own for name, own in expected.items() if name != "3.png"}
    assert capsys.readouterr().err.count("a batch of 6 photos does not fit into memory and is halved") == 1


def test_other_errors_end_the_run(labeler, tmp_path, monkeypatch):
    def fail(images):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(labeler.detector, "candidates", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        labels_of(labeler, PhotoSource(tmp_path), draw_photos(tmp_path, SIZES[:1]))


def test_trace_and_times(labeler, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudolabel, "BATCH_PIXELS", 1300)
    monkeypatch.setattr(timing, "UNTRACED", 0)  # other threads run ahead of the batch from which on it traces
    names, trace = draw_photos(tmp_path, SIZES), tmp_path / "trace.json"
    units = [(name, None) for name in names]
    assert sum(map(len, labeler.label(PhotoSource(tmp_path), units, trace=trace))) == len(names)
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"network", "candidates", "refine", "encode"} <= events
    assert list(labeler.times.seconds) == ["decode", "upload", "network", "candidates", "refine", "encode", "score"]
    assert min(labeler.times.seconds.values()) > 0 and 0 < labeler.times.busy() <= 1


def test_times_of_a_gpu_are_read_after_its_last_event(monkeypatch):
    """Events of a simulated stream, which end when something waits for them; torch raises RuntimeError before."""

    class Event:
        recorded = 0
        reached = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.recorded += 1
            self.number = Event.recorded

        def synchronize(self):
            Event.reached = max(Event.reached, self.number)

        def elapsed_time(self, end):
            assert max(self.number, end.number) <= Event.reached, "both events must be completed"
            return 1e3 * (end.number - self.number)

    def reach_all():
        Event.reached = Event.recorded

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", reach_all)
    times = StepTimes("cuda:0")
    for _ in range(2):
        with times.step("detect"), times.step("network"):
            pass
        with times.step("score"):
            reach_all()  # the results come, and then the end of the step is recorded
        times.collect()
    assert times.seconds == {"detect": 6, "network": 2, "score": 2}
    times.collect()


def test_busy_time_needs_no_memory_per_batch(monkeypatch):
    """Intervals of several threads are collected in any order."""
    monkeypatch.setattr(timing, "MOST_INTERVALS", 100)
    now = iter([0.0, 0.0, *(t for n in range(1000) for t in (n + 0.5 * (n % 2 == 0), n + 1.0)), 1000.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    times = StepTimes("cpu")
    for _ in range(1000):
        with times.step("network"):
            pass
        times.collect()
        assert len(times._intervals) <= 100
    assert times.busy() == 0.75


def test_busy_time_is_the_union_of_all_steps(monkeypatch):
    now = iter([0, 0, 1, 3, 5, 6, 10, 10])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(now)))
    times = StepTimes("cpu")
    with times.step("detect"):
        pass
    with times.step("refine"):
        pass
    times.collect()
    assert times.seconds == {"detect": 2, "refine": 1}
    times._intervals += [(2.0, 4.0), (2.5, 3.5)]
    assert times.busy() == 0.4
    assert times.summary() == "summed over threads: detect 2.0 s, refine 1.0 s; 60% of the time no batch was ready"
