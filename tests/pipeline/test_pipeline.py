# SPDX-License-Identifier: MIT
"""The pipeline from Python: what `Pipeline` makes is what the commands make, and `Run` reads it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import namedmask
import usage
from namedmask import NothingUsable, Pipeline, ProgressEvent, Run, Selection, UserError
from namedmask.backbones import untrained_encoder
from namedmask.masks import read_masks
from namedmask.review import write_review
from namedmask.run import locked
from namedmask.segmenter.deeplab import DeepLab
from small_world import ENCODER, command, draw_photo, draw_photos, files_of, write_embeddings

BACKBONE = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def world(tmp_path_factory, backbone_weights):
    """A folder with 8 photos, and sections of settings with which each stage takes a second."""
    root = tmp_path_factory.mktemp("world")
    embeddings = write_embeddings(root / "embeddings.safetensors", draw_photos(root / "photos", 8))
    torch.manual_seed(0)
    save_file(DeepLab(untrained_encoder(ENCODER), 2, 16).backbone.state_dict(), root / "encoder.safetensors")
    training = {"crop_size": 32, "batch_size": 2, "steps": 4, "head_channels": 16, "encoder": ENCODER}
    training["encoder_weights"] = root / "encoder.safetensors"
    return root, {
        "index": {"embeddings": embeddings},
        "archive": {"photos_per_category": 4},
        "detector": {"backbone": BACKBONE, "backbone_weights": backbone_weights, "image_size": 96},
        "experts": training,
        "segmenter": training,
    }


@pytest.fixture(scope="module")
def made(world, one_thread_in_module):
    """A finished run with experts and a segmenter, what was printed and logged while it was made, and its events."""
    root, settings = world
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("namedmask")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    state = torch.random.get_rng_state(), signal.getsignal(signal.SIGTERM), os.environ.get("OMP_NUM_THREADS")
    run, events = usage.label(root / "photos", root / "run", settings)
    Pipeline(out=root / "run", **settings).experts()
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (signal.getsignal(signal.SIGTERM), os.environ.get("OMP_NUM_THREADS")) == state[1:]
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    return run, events, [record.getMessage() for record in records]


def test_a_run_is_that_of_the_commands(world, made, tmp_path, backbone_weights):
    root, _ = world
    words = ["run", root / "photos", "--categories", "cat,dog", "--embeddings", root / "embeddings.safetensors"]
    words += ["--photos-per-category", 4, "--backbone", BACKBONE, "--backbone-weights", backbone_weights]
    result = command(*words, "--image-size", 96, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    theirs = files_of(tmp_path / "run")
    ours = files_of(root / "run")
    labels = [name for name in theirs if name.split("/")[0] in ("archive.json", "index", "masks", "errors.jsonl")]
    assert len(labels) > 5 and all(theirs[name] == ours[name] for name in labels)
    # The run of the command is continued: nothing is made again.
    assert len(Pipeline(out=tmp_path / "run").run()) == 8
    now = files_of(tmp_path / "run")
    assert all(now[name] == theirs[name] for name in theirs if name not in ("run.toml", "stages.json"))


def test_nothing_is_printed_and_progress_is_reported(world, made, capfd):
    run, events, messages = made
    stages = ["index", "archive", "pseudolabel", "report", "train"]
    assert [event.stage for event in events if event.finished] == stages
    assert all(isinstance(event, ProgressEvent) and event.done <= max(event.total, event.done) for event in events)
    pseudolabel = [event for event in events if event.stage == "pseudolabel"]
    assert [pseudolabel[-1].done, pseudolabel[-1].total, pseudolabel[-1].skipped] == [8, 8, 0]
    assert pseudolabel[-1].rate > 0 and pseudolabel[-1].seconds > 0
    assert f"8 masks in {run.path / 'masks'}" in messages and f"the segmenter is in {run.path}/segmenter" in messages
    again: list[ProgressEvent] = []
    Pipeline(world[0] / "photos", out=run.path, progress=again.append).pseudolabel()
    assert (again[-1].done, again[-1].skipped) == (8, 8)
    assert capfd.readouterr() == ("", "")


def test_a_listener_can_end_a_run_which_continues(world, tmp_path):
    root, settings = world

    def stop(event):
        if event.stage == "pseudolabel":
            raise ZeroDivisionError

    pipeline = Pipeline(root / "photos", ["cat", "dog"], out=tmp_path / "run", progress=stop, **settings)
    with pytest.raises(ZeroDivisionError):
        pipeline.run()
    assert Run(tmp_path / "run").stages == ["index", "archive"] or Run(tmp_path / "run").stages[-1] == "pseudolabel"
    pipeline.progress = None
    assert len(pipeline.run()) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detectr": {}}, r"there is no setting 'detectr'; did you mean 'detector\."),
        ({"detector": {"nme": "selfmask"}}, r"there is no setting 'detector.nme'; did you mean 'detector.name'\?"),
        ({"detector": {"name": "selfmsk"}}, r"detector.name .*got 'selfmsk'; did you mean 'selfmask'\?"),
        ({"detector": {"tau": 3}}, r"detector.tau \(--tau\): expected at most 1, got 3"),
        ({"detector": "selfmask"}, r"detector: expected a valid dictionary.*, got 'selfmask'"),
        ({"refine": {"crf": {"iterations": 0}}}, r"refine.crf.iterations: expected at least 1, got 0"),
        ({"categories": "cat,dog"}, r"categories .*: expected a valid list, got 'cat,dog'"),
        ({"categories": []}, r"categories: no category name was given"),
        ({"preset": "namedmask-voc2"}, r"there is no such preset; did you mean 'namedmask-voc2012'\?"),
        ({"workers": 0}, r"workers: expected at least 1, got 0"),
        ({"gpus": -1}, r"gpus: expected at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        Pipeline("photos", out=tmp_path / "run", **arguments)
    with pytest.raises(UserError, match="the path is empty"):
        Pipeline("", out=tmp_path / "run")
    for wrong in ({"workers": 1.5}, {"progress": 5}, {"gpus": 1.5}, {"gpus": "all"}):
        with pytest.raises(TypeError):
            Pipeline("photos", out=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_are_numbers(tmp_path):
    settings = {"archive": {"photos_per_category": np.int64(4)}, "detector": {"tau": np.float32(0.25)}}
    pipeline = Pipeline("photos", out=tmp_path / "run", workers=np.int64(2), **settings)
    assert pipeline._given["archive"] == {"photos_per_category": 4} and pipeline.workers == 2


def test_settings_of_a_preset(tmp_path):
    pipeline = Pipeline("photos", out=tmp_path, preset="namedmask-imagenet-s50", detector={"tau": 0.3})
    with pytest.raises(UserError, match="pass its category names"):
        pipeline.run()
    with pytest.raises(UserError, match="photos' does not exist"):  # names of its own
        Pipeline(tmp_path / "photos", out=tmp_path / "run", preset="namedmask-voc2012").run()


def test_changed_settings_need_overwrite(world, tmp_path):
    root, settings = world
    pipeline = Pipeline(root / "photos", ["cat", "dog"], out=tmp_path / "run", **settings)
    first = [record.rle for record in pipeline.run().masks()]
    changed = Pipeline(out=tmp_path / "run", refine={"name": "none"})
    with pytest.raises(UserError, match=r"refine\.name: 'bilateral' -> 'none'"):
        changed.pseudolabel()
    assert [record.rle for record in Run(tmp_path / "run").masks()] == first
    assert [record.rle for record in changed.pseudolabel(overwrite=True).masks()] != first


def test_photos_that_have_moved_are_said_to_the_report(world, tmp_path):
    root, settings = world
    photos = Path(shutil.copytree(root / "photos", tmp_path / "before"))
    Pipeline(photos, ["cat", "dog"], out=tmp_path / "run", **settings).run()
    moved = photos.rename(tmp_path / "after")
    Pipeline(moved, out=tmp_path / "run").report()
    assert "does not exist" not in (tmp_path / "run" / "report.html").read_text()


def test_a_run_is_updated(world, tmp_path):
    root, settings = world
    first = Pipeline(root / "photos", ["cat"], out=tmp_path / "run", **settings).run()
    grown = Pipeline(root / "photos", ["cat", "dog"], out=tmp_path / "run")
    with pytest.raises(UserError, match="not both"):
        grown.run(update=True, overwrite=True)
    assert first.categories == ["cat"]
    assert grown.archive(update=True).categories == ["cat", "dog"]
    assert {record.category for record in grown.pseudolabel(update=True).masks()} == {"cat", "dog"}
    assert grown.index(update=True).stages == ["index", "archive", "pseudolabel"]
    grown.run(update=True)
    assert {record.category for record in first.masks()} == {"cat", "dog"}


def test_a_run_is_converted(made, tmp_path):
    run = made[0]
    scores = sorted(record.score for record in run.masks() if record.area)
    cut = Selection(min_score=scores[-2])
    done = run.convert("coco", tmp_path / "coco", selection=cut, split=(0.5, 0.5, 0), photos="copy")
    assert (done.masks, done.left_out) == (sum(s >= scores[-2] for s in scores), sum(s < scores[-2] for s in scores))
    assert set(files_of(tmp_path / "coco")) >= {"annotations/instances_train.json", "annotations/instances_val.json"}


@pytest.mark.parametrize(
    ("to", "options", "error", "message"),
    [
        ("cocoo", {}, UserError, "there is no format 'cocoo'; expected one of coco, yolo-seg"),
        ("coco", {"photos": "lnk"}, UserError, "photos: expected 'link', 'copy' or None, got 'lnk'"),
        ("coco", {"split": (0.5, 0.5)}, UserError, "--split 0.5 0.5: expected three shares that sum to 1"),
        ("coco", {"selection": {"min_score": 0.5}}, TypeError, "selection: expected a Selection, got {'min_score'"),
        ("coco", {"splits": (1, 0, 0)}, TypeError, "unexpected keyword argument 'splits'"),
    ],
)
def test_wrong_arguments_of_convert_are_named(to, options, error, message, made, tmp_path):
    with pytest.raises(error, match=message):
        made[0].convert(to, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_a_run_holds(world, made, monkeypatch):
    run = made[0]
    monkeypatch.chdir(run.path.parent)
    assert repr(Run("run")) == (
        "Run('run', categories=2, stages=['index', 'archive', 'pseudolabel', 'experts', 'train'])"
    )
    assert run.categories == run.archive.categories == ["cat", "dog"]
    assert (run.settings.detector.backbone, run.settings.detector.tau) == (BACKBONE, 0.2)
    assert sorted(run.photos) == sorted(path.name for path in (world[0] / "photos").iterdir())
    assert len(run) == 8 and run.report.read_text().startswith("<!")
    for record in run.masks("detector"):
        assert record.mask().shape == run.photos.decode(record.photo).pixels.shape[:2] == record.size
    assert list(run.masks()) == list(run.masks("experts")) == list(read_masks(run.path / "refined"))
    assert list(run.masks("detector")) == list(read_masks(run.path / "masks")) != list(run.masks())
    assert {name: mask.dtype for name, mask in usage.best(run).items()} == {"cat": bool, "dog": bool}
    assert len(usage.segment(run)) == 8
    with pytest.raises(ValueError, match="stage: expected one of best, detector, experts, got 'expert'"):
        run.masks("expert")


def test_a_review_applies_to_the_best_masks(made, monkeypatch):
    run = made[0]
    first, second, *_ = detected = list(run.masks("detector"))
    try:
        write_review(
            run.path,
            {(first.photo, first.category): "reject", (second.photo, second.category): "detector"},
        )
        best = list(run.masks())
        assert len(best) == len(run) == 7 and second in best
        assert second in run.masks(selection=Selection(min_score=1.0))  # a person has chosen it
        assert list(run.masks("detector")) == detected
    finally:
        (run.path / "review.jsonl").unlink()


def test_reading_needs_no_lock_and_changes_nothing(made):
    run = made[0]
    before = files_of(run.path)
    with locked(run.path):
        assert len(Run(run.path)) == 8 and list(run.errors()) == [] and run.stages
    assert files_of(run.path) == before


def test_what_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"is not a run folder.*starts one"):
            Run(path)
        with pytest.raises(UserError, match="is not a run folder"):
            Pipeline(out=path).train()
    assert not (tmp_path / "missing").exists()


def test_photos_that_cannot_be_used(world, tmp_path):
    _, settings = world
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    broken = tmp_path / "photos" / "cat" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 broken")
    pipeline = Pipeline(tmp_path / "photos", out=tmp_path / "run", detector=settings["detector"])
    with pytest.raises(NothingUsable, match=r"could be used; see .*errors\.jsonl"):
        pipeline.run()
    run = Run(tmp_path / "run")
    assert [error.photo for error in run.errors()] == ["cat/broken.jpg"] and len(run) == 0
    assert list(run.masks("experts")) == []
    with pytest.raises(UserError, match="segmenter"):
        run.segmenter()
    draw_photo(0, "cat").save(tmp_path / "photos" / "cat" / "good.png")
    assert len(pipeline.run(overwrite=True)) == 1


def test_the_package_imports_nothing_heavy():
    code = "import sys, namedmask; print({'torch', 'numpy', 'logging', 'PIL'} & set(sys.modules)); namedmask.UserError"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "set()\n", done.stderr


def test_public_names():
    assert set(namedmask.__all__) <= set(dir(namedmask)) and "__version__" not in namedmask.__all__
    for name in namedmask.__all__:
        assert getattr(namedmask, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'pipline'"):
        namedmask.pipline  # noqa: B018
