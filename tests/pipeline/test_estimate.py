# SPDX-License-Identifier: MIT
"""What a run will take: the counts of a job, files and memory, models without weights, the line before a long run."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from namedmask import estimate as estimating
from namedmask.config import make_config
from namedmask.errors import UserError
from namedmask.estimate import Estimate, Row, estimate
from namedmask.estimate.figures import duration
from namedmask.index import read_shard
from namedmask.photos import PhotoSource
from namedmask.pipeline import Pipeline
from small_world import command, draw_photos, write_embeddings

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

TRAINING = {"encoder": "resnet_namedmask_demo", "head_channels": 16, "crop_size": 32, "batch_size": 4}
MODELS = {
    "index": {"clip_model": "namedmask-demo"},
    "detector": {"backbone": "vit_namedmask_demo", "image_size": 64},
    "experts": {**TRAINING, "steps": 30},
    "segmenter": {**TRAINING, "steps": 50},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    draw_photos(folder, 5)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8")
    return folder


def rows_of(found: Estimate) -> dict[str, Row]:
    return {f"{row.stage} {row.part}".strip(): row for row in found.rows}


@pytest.fixture(scope="module")
def found(photos, tmp_path_factory):
    """The estimate of a job of 1200 photos, in a folder of its own."""
    config = make_config({"photos": str(photos), "categories": ["cat", "dog", "bird"], **MODELS})
    before = {path: path.stat().st_mtime_ns for path in photos.iterdir()}
    folder = tmp_path_factory.mktemp("current")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = estimate(config, seconds=0.1, photos_total=1200)
    assert list(folder.iterdir()) == []
    assert before == {path: path.stat().st_mtime_ns for path in photos.iterdir()}
    return found


def test_the_counts_of_a_job(found):
    rows = rows_of(found)
    assert {name: (row.count, row.unit) for name, row in rows.items()} == {
        "index": (1200, "photos"),
        "archive": (3 * 85, "prompts"),
        "pseudolabel": (1200, "photos"),  # 3 * 500 retrieved, of 1200
        "experts training": (3 * 30 * 4, "views"),
        "experts relabeling": (1500, "photos"),
        "train": (50 * 4, "views"),
    }
    assert all(row.measured > 0 and row.rate > 0 and 10**7 < row.memory < 10**10 for row in rows.values())
    assert rows["experts training"].disk > 6 * 4 * 10_000 > rows["archive"].disk > 0  # 3 networks and a checkpoint
    assert rows["experts relabeling"].disk == rows["pseudolabel"].disk
    assert found.decoding > 0 and found.megapixels == pytest.approx(0.0115, rel=0.1)


def test_names_select_a_mask_for_each_category_of_a_photo(photos):
    detector = {**MODELS["detector"], "select": "name"}
    config = make_config({"photos": str(photos), "categories": ["cat", "dog", "bird"], **MODELS, "detector": detector})
    rows = rows_of(estimate(config, seconds=0.1, photos_total=1200, trainings=False))
    assert rows["pseudolabel"].count == 1500


def test_the_bytes_of_the_index_are_those_of_a_run(found, photos, tmp_path):
    assert command("index", photos, "--clip-model", "namedmask-demo", "--out", tmp_path / "run").exit_code == 0
    folder = tmp_path / "run" / "index"
    image, numbers = read_shard(folder / "00000.safetensors")  # of 5 photos: one is broken
    written = 6 / 5 * (image.nbytes + numbers.nbytes) + (folder / "photos.jsonl").stat().st_size
    assert rows_of(found)["index"].disk == pytest.approx(1200 / 6 * written, abs=1200)


def test_given_embeddings_are_read(photos):
    names = sorted(path.name for path in photos.iterdir() if path.name != "broken.jpg")
    index = {"embeddings": str(write_embeddings(photos.parent / "embeddings.safetensors", names))}
    config = make_config({"photos": str(photos), "categories": ["cat", "dog"], **MODELS, "index": index})
    rows = rows_of(estimate(config, seconds=0.1, trainings=False))
    assert rows["index"].count == 6 and rows["index"].measured > 0


def test_models_without_weights(photos, tmp_path):
    """Missing weights are an error that offers random ones, which are used for these models alone."""
    words = ["estimate", photos, "--categories", "cat", "--seconds", "0.1", "--gpus", "0"]
    words += ["--clip-model", "namedmask-demo", "--backbone", "vit_tiny_patch16_224", "--image-size", "64"]
    for section in ("experts", "segmenter"):
        for name, value in {**TRAINING, "steps": 10}.items():
            words += ["--set", f"{section}.{name}={value}"]
    result = command(*words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "no weights of backbone vit_tiny_patch16_224 in the caches" in result.stderr
    assert "--random-weights" in result.stderr
    result = command(*words, "--random-weights", "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.stderr
    assert "random weights: backbone vit_tiny_patch16_224\n6 photos, 1 category" in result.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    stages = [row["stage"] for row in figures["rows"]]
    assert stages == ["index", "archive", "pseudolabel", "experts", "experts", "train"]
    train = figures["rows"][-1]
    assert train["count"] == 40 and train["seconds"] == pytest.approx(40 / train["rate"])


def count_calls(monkeypatch, owner, name: str) -> list:
    """The list to which calls of a function are added from now on."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: (calls.append(args), original(*args, **options))[1])
    return calls


def test_a_long_run_says_how_long_it_takes(photos, tmp_path, monkeypatch):
    words = ["run", photos, "--categories", "cat", "--out", tmp_path / "run", "--gpus", "0", "--image-size", "64"]
    words += ["--clip-model", "namedmask-demo", "--backbone", "vit_namedmask_demo"]
    monkeypatch.setattr(estimating, "ANNOUNCE_WITHIN", 0.2)
    monkeypatch.setattr(estimating, "LONG", {"cpu": 6, "cuda": 6})
    listings = count_calls(monkeypatch, PhotoSource, "names")
    estimates = count_calls(monkeypatch, estimating, "_estimate")
    lines = command(*words).stdout.splitlines()
    assert len(estimates) == 1 and len(listings) <= 3  # of the check, the line and the index
    estimates.clear()
    assert lines[0].startswith("about ") and ": index " in lines[0] and ", pseudolabel " in lines[0]
    assert not any(line.startswith("about") for line in command(*words).stdout.splitlines())  # it continues
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)  # libraries of other tests may have set it
    Pipeline(
        photos, ["cat"], out=tmp_path / "silent", gpus=0, **{name: MODELS[name] for name in ("index", "detector")}
    ).run()
    root.setLevel(level)
    assert not estimates  # nobody listens
    monkeypatch.setattr(estimating, "LONG", {"cpu": 7, "cuda": 7})
    assert estimating.announce(make_config({"photos": str(photos), "categories": ["cat"], **MODELS}), "cpu") is None


def test_errors(tmp_path):
    config = make_config({"photos": str(tmp_path), "categories": ["cat"], **MODELS})
    with pytest.raises(UserError, match="there are no photos"):
        estimate(config)
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=r"none of the sampled photos .* can be read"):
        estimate(config, seconds=0.1)
    with pytest.raises(UserError, match="outside class folders"):
        estimate(config.model_copy(update={"categories": []}), seconds=0.1)
    result = command("estimate")
    assert result.exit_code == 2 and "pass PHOTOS, or a run's run.toml as --config" in result.stderr


def test_the_table():
    rows = (
        Row("index", "", "photos", 9, 2.5, 90_000, 2 * 10**9, 3 * 10**9, 0),
        Row("pseudolabel", "", "photos", 9, 250.0, 90_000, 10**9, 10**9, 0),
        Row("experts", "training", "views", 9, 0.5, 9_000, 10**9, 12 * 10**9, 0),
        Row("experts", "relabeling", "photos", 9, 5.0, 9_000, 0, 10**9, 0),
    )
    found = Estimate(90_000, 3, 0.3, "a CPU", rows, 100.0, (), 100 * 10**9, 10 * 10**9, 0)
    assert " 1 photo  " in replace(found, rows=(replace(rows[0], count=1), *rows[1:])).table()
    assert found.seconds() == 36_000 + 360 + 18_000 + 1_800
    assert found.line() == "about 15 h 36 min: index 10 h, pseudolabel 6 min, experts 5 h 30 min"
    lines = found.table().splitlines()
    assert lines[0].split() == ["stage", "rate", "here", "of", "this", "job", "hours", "disk,", "GB", "memory,", "GB"]
    assert lines[3].split() == ["experts:", "training", "0.5", "views/s", "9,000", "views", "5.00", "1.00", "12"]
    assert lines[5].split() == ["namedmask", "run", "10", "3.00", "3.00"]
    assert lines[6].split() == ["everything", "16", "4.00", "12"]
    assert lines[8] == "needed: disk 4.00 of 100 GB, memory 12 of 10 GB (not enough)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (91, "2 min"),
        (5_369, "89 min"),
        (5_400, "1 h 30 min"),
        (7_200, "2 h"),
        (11_399, "3 h 10 min"),
        (172_799, "2 days"),
        (180_000, "2 days 2 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_sample_is_uniform_and_in_order():
    names = [f"{i:04}" for i in range(1000)]
    chosen, total = estimating._sample(iter(names), 100)
    assert total == 1000 and chosen == sorted(set(chosen)) and len(chosen) == 100
    assert chosen == estimating._sample(iter(names), 100)[0]
    assert 400 < np.mean([int(name) for name in chosen]) < 600
    assert estimating._sample(iter(names[:3]), 100) == (names[:3], 3)
