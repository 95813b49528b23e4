# SPDX-License-Identifier: MIT
"""The table of stages, and what each stage checks and reports; models are not loaded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from namedmask import stages
from namedmask.archive import Archive, Retrieved, read_archive, write_archive
from namedmask.config import make_config
from namedmask.distributed import Worker
from namedmask.errors import NothingUsable, UserError
from namedmask.masks import ErrorRecord, errors_path, read_errors, write_errors, write_shard
from namedmask.photos import PhotoSource
from namedmask.progress import Progress
from namedmask.record import RunRecord, StageRecord
from namedmask.stages import STAGES, Context, Plan

TRAINING = ["00000.errors.jsonl", "checkpoint.pt", "metrics.jsonl", "tensorboard/events.out.tfevents.1"]
FILES = {
    "index": ["index/00000.errors.jsonl", "index/00000.safetensors", "index/123456.safetensors", "index/photos.jsonl"],
    "archive": ["archive.dropped.jsonl", "archive.errors.jsonl", "archive.json"],
    "pseudolabel": ["detected/00000.jsonl", "masks/00000.errors.jsonl", "masks/00000.jsonl"],
    "train-saliency": [f"saliency/{name}" for name in [*TRAINING, "model.safetensors"]],
    "experts": [
        *(f"experts/cat/{name}" for name in TRAINING),
        *("experts/cat.safetensors", "refined/00000.errors.jsonl", "refined/00000.jsonl"),
        *("refining/00000.errors.jsonl", "refining/00000.jsonl"),
    ],
    "train": [f"segmenter/{name}" for name in ["categories.json", *TRAINING, "model.safetensors"]],
    "report": ["report.html"],
}
USERS = [
    "masks/0.jsonl",
    "masks/truth.jsonl",
    "masks/00000.png",
    "index/model.safetensors",
    "segmenter/mine.pt",
    "a.html",
]


def touch(out: Path, *names: str) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()


def test_files_of_each_stage(tmp_path):
    touch(tmp_path, *USERS, *(name for names in FILES.values() for name in names))
    (tmp_path / "masks" / "00001.jsonl").mkdir()  # the user's
    for name, stage in STAGES.items():
        own = sorted(str(path.relative_to(tmp_path)) for path in stage.own_files(tmp_path))
        assert own == sorted(FILES[name]) and stage.name == name
        assert set(stage.outputs) == {file.partition("/")[0] for file in own}
    archive = {"categories": ["cat"], "photos": {"cat": []}}  # whose experts are not all of these networks
    (tmp_path / "archive.json").write_text(json.dumps(archive))
    touch(tmp_path, "experts/shared.safetensors", "experts/copy.safetensors")
    networks = [path.name for path in STAGES["experts"].own_files(tmp_path) if path.suffix == ".safetensors"]
    assert networks == ["cat.safetensors", "shared.safetensors"]
    (tmp_path / "masks" / "00002.jsonl").symlink_to("00001.jsonl")
    assert tmp_path / "masks" / "00002.jsonl" in STAGES["pseudolabel"].own_files(tmp_path)


@pytest.mark.parametrize(
    ("stage", "results"),
    [
        ("index", ["index/00000.safetensors", "index/123456.safetensors"]),
        ("archive", ["archive.json"]),
        ("pseudolabel", ["masks/00000.jsonl"]),
        ("train-saliency", ["saliency/model.safetensors", "saliency/checkpoint.pt"]),
        (
            "experts",
            ["experts/cat.safetensors", "experts/cat/checkpoint.pt", "refining/00000.jsonl", "refined/00000.jsonl"],
        ),
        ("train", ["segmenter/model.safetensors", "segmenter/checkpoint.pt"]),
        ("report", []),
    ],
)
def test_results_of_each_stage(tmp_path, stage, results):
    """While there are none, the settings may change."""
    for number, file in enumerate(sorted({*FILES[stage], *results})):
        out = tmp_path / str(number)
        touch(out, file)
        assert STAGES[stage].has_results(out) == (file in results), file


def test_stages_that_are_complete(tmp_path):
    config = make_config({"photos": "p"})
    for name, result in {
        "archive": "archive.json",
        "train-saliency": "saliency/model.safetensors",
        "train": "segmenter/model.safetensors",
        "experts": "refined/00000.jsonl",
    }.items():
        assert not STAGES[name].complete(tmp_path, config)
        touch(tmp_path, result)
        assert STAGES[name].complete(tmp_path, config)
    touch(tmp_path, "refining/00000.jsonl")
    assert not STAGES["experts"].complete(tmp_path, config) and not STAGES["report"].complete(tmp_path, config)
    assert [name for name, stage in STAGES.items() if stage.continues_imported] == ["archive", "experts"]
    assert STAGES["report"].check(None) is None


@pytest.fixture
def photos(tmp_path):
    """Two class folders, and a photo that cannot be read."""
    touch(tmp_path / "photos", "cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/4.jxl")
    return PhotoSource(tmp_path / "photos")


@pytest.fixture
def required(monkeypatch):
    """What a check loads, instead of loading it."""
    loaded = []
    embedder = SimpleNamespace(
        about="the model", protocol="", texts=lambda names, prompts: loaded.append(("texts", names))
    )
    for name in ("selfmask_training", "training"):
        module = f"namedmask.{'saliency' if name != 'training' else 'segmenter'}.{name}"
        monkeypatch.setattr(f"{module}.initial_network", lambda settings, **more: loaded.append(("network", more)))
        monkeypatch.setattr(
            f"{module}.expect_even_batch", lambda settings, workers: loaded.append(("workers", workers))
        )
    monkeypatch.setattr("namedmask.hub.require", lambda weights: loaded.append("weights"))
    monkeypatch.setattr("namedmask.index.make_embedder", lambda *_: loaded.append("embedder") or embedder)
    importlib.import_module("namedmask.pseudolabel")  # else it would keep the function below for later tests
    monkeypatch.setattr("namedmask.saliency.make_detector", lambda *_: loaded.append("detector"))
    monkeypatch.setattr("namedmask.experts.expect_imported_networks", lambda out: loaded.append("imported"))
    return loaded


def plan(out, source, *names, workers=3, imported=(), **values):
    config = make_config({"photos": source.path, **values})
    return Plan(out, config, source, names, workers, (), frozenset(imported))


def finish_index(out: Path, count: int = 2) -> None:
    from safetensors.numpy import save_file

    touch(out, "index/photos.jsonl")
    (out / "index" / "photos.jsonl").write_text("".join(f'{{"photo": "{n}.jpg"}}\n' for n in range(count)))
    image = np.eye(count, 4).astype(np.float16)
    save_file({"image": image, "photo": np.arange(count)}, out / "index" / "00000.safetensors")


def test_check_of_index_and_archive(tmp_path, photos, required):
    check, names = STAGES["index"].check, {"categories": ["cat"]}
    check(plan(tmp_path, photos, "index", "archive"))  # class folders need no model
    assert required == []
    check(plan(tmp_path, photos, "index"))
    check(plan(tmp_path, photos, "index", "archive", **names))
    assert required == ["weights", "embedder"] * 2
    required.clear()
    embeddings = {"index": {"embeddings": "/e"}}
    check(plan(tmp_path, photos, "index", "archive", **names, **embeddings))
    assert required == ["weights", "embedder", ("texts", ["cat"])]
    check(plan(tmp_path, photos, "index", **names, **embeddings))
    assert required[3:] == ["weights", "embedder"]
    with pytest.raises(UserError, match="index is not finished; run `namedmask index "):
        check(plan(tmp_path, photos, "archive", **names))
    finish_index(tmp_path)
    check(plan(tmp_path, photos, "archive", **names))
    (tmp_path / "none").mkdir()
    empty = PhotoSource(tmp_path / "none")
    for words, message in ((["index"], "there are no photos in "), (["archive"], "no photos in the folders of")):
        with pytest.raises(UserError, match=message):
            check(plan(tmp_path, empty, *words))


def test_check_of_pseudolabel(tmp_path, photos, required):
    check = STAGES["pseudolabel"].check
    check(plan(tmp_path, photos, "archive", "pseudolabel"))
    assert required == ["weights", "detector"]
    with pytest.raises(UserError, match=r"archive.json is missing"):
        check(plan(tmp_path, photos, "pseudolabel"))


def finish_masks(out: Path) -> None:
    write_archive(out / "archive.json", Archive(["cat"], {"cat": [Retrieved("cat/1.jpg", None)]}))
    (out / "masks").mkdir()
    write_errors(out / "masks" / "00000.errors.jsonl", [])
    write_shard(out / "masks" / "00000.jsonl", [])


def test_checks_of_trainings(tmp_path, photos, required):
    trainings = ("train-saliency", "experts", "train")
    for name in trainings:
        with pytest.raises(UserError, match=r"archive.json is missing"):
            STAGES[name].check(plan(tmp_path, photos, name))
    finish_masks(tmp_path)
    for name, workers in zip(trainings, (3, 1, 3), strict=True):
        required.clear()
        STAGES[name].check(plan(tmp_path, photos, name))
        more = {} if name == "train-saliency" else {"classes": 2}
        assert required == [("workers", workers), "weights", ("network", more)]
    required.clear()
    STAGES["experts"].check(plan(tmp_path, photos, "experts", experts={"mode": "shared"}))
    assert required[0] == ("workers", 3)
    required.clear()
    STAGES["experts"].check(plan(tmp_path, photos, "experts", imported=["experts"]))
    assert required == ["imported"]
    touch(tmp_path, "refined/00000.jsonl")
    (tmp_path / "masks" / "00000.jsonl").unlink()
    STAGES["train"].check(plan(tmp_path, photos, "train"))  # the experts' masks serve
    for name in ("train-saliency", "experts"):
        with pytest.raises(UserError, match="masks is not finished; run `namedmask pseudolabel"):
            STAGES[name].check(plan(tmp_path, photos, name))


def context(out, source, stage, worker=None, **values) -> Context:
    worker = worker or Worker()
    return Context(
        out, make_config({"photos": source.path, **values}), source, worker, "cpu", Progress(stage, worker).__enter__()
    )


def test_index_is_built_from_the_list_of_photos(tmp_path, photos, monkeypatch):
    built = []

    def build(source, folder, config, worker, device, advance, known):
        built.append(device)
        finish_index(tmp_path, 3)
        return SimpleNamespace(about="the model")

    monkeypatch.setattr("namedmask.index.build_index", build)
    other = context(tmp_path, photos, "index", Worker(1, 2))
    (tmp_path / "index").mkdir()
    with pytest.raises(UserError, match=r"photos.jsonl"):
        STAGES["index"].run(other)  # only the main worker lists them
    ctx = context(tmp_path, photos, "index")
    STAGES["index"].run(ctx)
    assert (ctx.progress.total, ctx.progress.note, built) == (3, "the model", ["cpu"])
    assert [error.photo for error in read_errors(tmp_path / "index" / "photos.errors.jsonl")] == ["dog/4.jxl"]
    monkeypatch.setattr("namedmask.index.build_index", lambda *_: None)
    monkeypatch.setattr("namedmask.index.list_photos", lambda *_: pytest.fail("listed again"))
    ctx = context(tmp_path, photos, "index")
    STAGES["index"].run(ctx)
    assert ctx.progress.note == ""


def test_index_without_an_embedding_is_removed(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("namedmask.index.build_index", lambda *_: None)
    finish_index(tmp_path, 0)
    (tmp_path / "index" / "photos.jsonl").write_text('{"photo": "a"}\n')
    STAGES["index"].run(context(tmp_path, photos, "index", Worker(1, 2)))
    assert (tmp_path / "index" / "00000.safetensors").exists()
    with pytest.raises(NothingUsable, match=r"no photo in .* could be embedded; see .*errors.jsonl"):
        STAGES["index"].run(context(tmp_path, photos, "index"))
    assert not list((tmp_path / "index").glob("*.safetensors")) and (tmp_path / "errors.jsonl").exists()


def test_archive_of_class_folders(tmp_path, photos):
    STAGES["archive"].run(context(tmp_path, photos, "archive", Worker(1, 2)))
    assert not (tmp_path / "archive.json").exists()
    STAGES["archive"].run(context(tmp_path, photos, "archive"))
    archive = read_archive(tmp_path / "archive.json")
    assert archive.photos == {
        "cat": [Retrieved("cat/1.jpg", None), Retrieved("cat/2.jpg", None)],
        "dog": [Retrieved("dog/3.jpg", None)],
    }
    (error,) = read_errors(tmp_path / "index" / "photos.errors.jsonl")
    assert (error.photo, error.stage) == ("dog/4.jxl", "list")
    (tmp_path / "archive.json").write_text("kept")
    STAGES["archive"].run(context(tmp_path, photos, "archive"))
    assert (tmp_path / "archive.json").read_text() == "kept"


@pytest.mark.parametrize(
    ("names", "per_category", "noted"), [(["a"], 2, False), (["a", "b"], 2, True), (["a", "b"], 1, False)]
)
def test_archive_notes_if_every_photo_is_in_every_category(tmp_path, photos, monkeypatch, names, per_category, noted):
    embedder = SimpleNamespace(protocol="", texts=lambda names, prompts: np.eye(len(names), 4, dtype=np.float32))
    monkeypatch.setattr("namedmask.index.make_embedder", lambda *_: embedder)
    values = {"categories": names, "archive": {"photos_per_category": per_category}}
    with pytest.raises(UserError, match="index is not finished"):
        STAGES["archive"].run(context(tmp_path, photos, "archive", **values))
    finish_index(tmp_path)
    ctx = context(tmp_path, photos, "archive", **values)
    STAGES["archive"].run(ctx)
    assert ctx.progress.note.startswith("every photo was retrieved for every category") == noted
    assert len(read_archive(tmp_path / "archive.json").photos["a"]) == per_category


@pytest.mark.parametrize(
    ("worker", "calls", "done", "whose"),
    [(Worker(), 1, 5, ""), (Worker(0, 2), 2, 8, "worker 0: "), (Worker(1, 2), 1, 5, "worker 1: ")],
    ids=["one", "main", "other"],
)
def test_main_worker_computes_what_lost_workers_have_claimed(tmp_path, photos, monkeypatch, worker, calls, done, whose):
    write_archive(tmp_path / "archive.json", Archive(["cat"], {"cat": [Retrieved(f"{n}", None) for n in range(3)]}))
    called = []

    def pseudolabel(source, archive, folder, config, own, device, advance, trace=None, known=None):
        called.append(own)
        advance(2 if len(called) == 1 else 3)
        advance(3 if len(called) == 1 else 9, existing=True)
        return SimpleNamespace(times=SimpleNamespace(summary=lambda: "decode 1.2 s")) if len(called) == 1 else None

    monkeypatch.setattr("namedmask.pseudolabel.pseudolabel", pseudolabel)
    ctx = context(tmp_path, photos, "pseudolabel", worker)
    STAGES["pseudolabel"].run(ctx)
    assert called[0] is worker and called[1:] == [Worker()] * (calls - 1)
    assert (ctx.progress.total, ctx.progress.done) == (3, done)
    assert ctx.progress.note == f"{whose}decode 1.2 s"  # the times of this worker alone
    assert (tmp_path / "errors.jsonl").exists() == worker.is_main


@pytest.mark.parametrize(
    ("failed", "note"), [(0, "before"), (1, "before; 1 photo could"), (2, "before; 2 photos could")]
)
def test_photos_that_failed_in_a_stage_are_noted(tmp_path, photos, failed, note):
    for shard in (0, 1):  # in both shards
        write_folder = tmp_path / "masks" / f"{shard:05}.jsonl"
        write_folder.parent.mkdir(exist_ok=True)
        errors = [ErrorRecord(f"{n}.jpg", "pseudolabel", f"reason {shard}") for n in range(failed)]
        write_errors(errors_path(write_folder), [*errors, ErrorRecord("x", "index", "")])
    for worker in (Worker(1, 2), Worker()):
        ctx = context(tmp_path, photos, "pseudolabel", worker)
        ctx.progress.note = "before"
        stages._finish(ctx)
        assert ctx.progress.note.startswith(note if worker.is_main else "before")
        assert (tmp_path / "errors.jsonl").exists() == worker.is_main
    assert len(list(read_errors(tmp_path / "errors.jsonl"))) == 2 * failed + 1


@pytest.mark.parametrize("imported", [False, True])
def test_trainings_run_when_all_masks_are_there(tmp_path, photos, monkeypatch, imported):
    trained = []
    for name in (
        "experts.train_experts",
        "segmenter.training.train_segmenter",
        "saliency.selfmask_training.train_saliency",
    ):
        monkeypatch.setattr(
            f"namedmask.{name}", lambda out, source, settings, *more: trained.append((settings, more[3:]))
        )
    made_with = {"imported": "there"} if imported else {}
    RunRecord("p", {"experts": StageRecord(made_with=made_with)}).write(tmp_path)
    for name in ("experts", "train", "train-saliency"):
        with pytest.raises(UserError, match=r"archive.json is missing"):
            STAGES[name].run(context(tmp_path, photos, name))
    finish_masks(tmp_path)
    for name, section in (("experts", "experts"), ("train", "segmenter"), ("train-saliency", "saliency")):
        ctx = context(tmp_path, photos, name)
        STAGES[name].run(ctx)
        assert trained.pop() == (getattr(ctx.config, section), (imported, None) if name == "experts" else ())
    touch(tmp_path, "index/00000.safetensors")
    STAGES["experts"].run(context(tmp_path, photos, "experts"))
    ((_, (_, scorer)),) = trained
    assert scorer.args[1:] == (read_archive(tmp_path / "archive.json").categories, "cpu")
    trained.clear()
    touch(tmp_path, "refined/00000.jsonl")
    (tmp_path / "masks" / "00000.jsonl").unlink()
    STAGES["train"].run(context(tmp_path, photos, "train"))
    with pytest.raises(UserError, match="masks is not finished"):
        STAGES["train-saliency"].run(context(tmp_path, photos, "train-saliency"))


def test_only_the_main_worker_writes_the_report(tmp_path, photos, monkeypatch):
    written = []
    monkeypatch.setattr("namedmask.report.write_report", written.append)
    for worker in (Worker(1, 2), Worker(0, 2)):
        STAGES["report"].run(context(tmp_path, photos, "report", worker))
        assert written == [tmp_path] * worker.is_main
