# SPDX-License-Identifier: MIT
"""A run folder without models: who works, what is checked, replaced and put back, and photos that have moved."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from namedmask import run
from namedmask.archive import Archive, Retrieved, write_archive
from namedmask.config import make_config
from namedmask.distributed import Worker
from namedmask.errors import UserError
from namedmask.files import OLD
from namedmask.masks import ErrorRecord, MaskRecord, write_errors, write_shard
from namedmask.photos import PhotoSource
from namedmask.record import RunRecord, StageRecord, read_record
from namedmask.stages import STAGES


def touch(out: Path, *names: str) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()


@pytest.fixture
def photos(tmp_path):
    touch(tmp_path / "photos", *(f"cat/{n}.jpg" for n in range(4)))
    return tmp_path / "photos"


# -- who works -------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """Calls of the parts of `start`, in order; `worker` and `gpus` are what the environment gives."""
    seen = SimpleNamespace(calls=[], worker=Worker(), gpus=0, masks=True)

    def note(name, result=None):
        return lambda *arguments, **_: seen.calls.append((name, *arguments)) or (result() if result else None)

    monkeypatch.setattr(run.distributed, "current", lambda: seen.worker)
    monkeypatch.setattr(run.distributed, "count_gpus", lambda gpus, workers: seen.gpus if gpus is None else gpus)
    monkeypatch.setattr(run, "settle", note("settle"))
    monkeypatch.setattr(run.distributed, "warm_up", note("warm up"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen.gpus)
    monkeypatch.setattr(run, "work", lambda out, stages, *more: seen.calls.append(("work", *more)))
    monkeypatch.setattr(run.launcher, "launch", lambda module, out, *more: seen.calls.append(("launch", module, *more)))
    monkeypatch.setattr(run, "_log_counts", note("count", lambda: seen.masks))
    monkeypatch.setattr(run, "finish", note("finish"))
    monkeypatch.setattr(run, "put_back", note("put back", lambda: True))
    return seen


@pytest.mark.parametrize(
    ("workers", "gpus", "available", "processes", "how"),
    [
        (1, None, 0, 1, ("work", Worker(), "cpu", None)),
        (1, None, 1, 1, ("work", Worker(), "cuda", None)),
        (1, 0, 1, 1, ("work", Worker(), "cpu", None)),
        (1, 1, 1, 1, ("work", Worker(), "cuda", None)),
        (1, 3, 4, 3, ("launch", "namedmask.run", "cuda", 3, "", "train")),
        (2, None, 0, 2, ("launch", "namedmask.run", "cpu", 2, "", "train")),
        (2, 0, 1, 2, ("launch", "namedmask.run", "cpu", 2, "", "train")),
    ],
)
def test_processes_of_a_command(started, tmp_path, workers, gpus, available, processes, how):
    started.gpus = available
    out = tmp_path / "out"
    assert run.start(out, {"photos": "p"}, ["train"], workers, gpus, True) is True
    warm = [("warm up", "cuda:0")] if how == ("work", Worker(), "cuda", None) else []
    assert started.calls == [
        *warm,
        ("settle", out, {"photos": "p"}, ["train"], True, processes),
        how,
        ("finish", out, ["train"]),
    ]


@pytest.mark.parametrize("attempt", [0, 1])
def test_workers_of_a_launcher_take_their_place(started, tmp_path, printing, capsys, attempt):
    out, given = tmp_path / "out", {"photos": "p"}
    started.worker = Worker(0, 3, attempt=attempt)
    run.start(out, given, ["train"], overwrite=True)
    overwrite = attempt == 0  # a restart continues
    assert started.calls[:2] == [("settle", out, given, ["train"], overwrite, 3), ("work", started.worker, "cpu", None)]
    assert capsys.readouterr().out == f"worker 0 of 3; waiting for the others\nthe segmenter is in {out}/segmenter\n"
    started.calls.clear()
    started.worker = Worker(1, 3)
    assert run.start(out, given, ["train"]) is True
    assert started.calls == [("work", started.worker, "cpu", None)]


def test_masks_are_counted_after_pseudolabel(started, tmp_path):
    out = tmp_path / "out"
    assert run.start(out, {"photos": "p"}, ["pseudolabel"]) is True
    assert started.calls[2:] == [("count", out), ("finish", out, ["pseudolabel"])]
    started.calls.clear()
    started.masks = False
    assert run.start(out, {"photos": "p"}, ["pseudolabel"]) is False
    assert started.calls[2:] == [("count", out), ("put back", out)]
    with pytest.raises(UserError, match="is not a run folder"):
        run.start(tmp_path / "typo", {}, ["pseudolabel"])
    assert not (tmp_path / "typo").exists()


def test_error_of_a_worker_keeps_what_was_replaced(started, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(run, "_keep_replaced", lambda out, error: kept.append(error))

    def fail(*_):
        raise UserError("stop")

    monkeypatch.setattr(run, "work", fail)
    for worker, keeps in ((Worker(), 1), (Worker(0, 2), 0)):  # other workers may still write
        kept.clear()
        started.worker = worker
        with pytest.raises(UserError, match="stop"):
            run.start(tmp_path / "out", {"photos": "p"}, ["train"])
        assert len(kept) == keeps and ("finish", tmp_path / "out", ["train"]) not in started.calls


def test_earlier_trace_stays_if_nothing_is_traced(started, tmp_path):
    trace = tmp_path / "trace.json"
    run.start(tmp_path / "out", {"photos": "p"}, ["train"], trace=trace)
    assert not trace.exists()
    trace.write_text("earlier")
    run.start(tmp_path / "out", {"photos": "p"}, ["train"], trace=trace)
    assert trace.read_text() == "earlier" and not list(tmp_path.glob(".tmp-*"))
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "none" / "t", tmp_path / "pipe"):
        with pytest.raises(UserError, match=f"^{bad} cannot be written: "):
            run.start(tmp_path / "new", {"photos": "p"}, ["train"], trace=bad)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("masks", "failed"), [(0, 0), (1, 0), (2, 3)])
def test_masks_and_errors_are_counted(tmp_path, printing, capsys, masks, failed):
    (tmp_path / "masks").mkdir()
    record = MaskRecord.from_mask("a", np.ones((2, 2), bool), "cat", None, 1.0)
    write_errors(tmp_path / "errors.jsonl", [ErrorRecord(f"{n}", "index", "") for n in range(failed)])
    write_errors(tmp_path / "masks" / "00000.errors.jsonl", [ErrorRecord("x", "pseudolabel", "")])
    write_shard(tmp_path / "masks" / "00000.jsonl", [record] * masks)
    assert run._log_counts(tmp_path) == (masks > 0)
    more = f"; photos and folders that could not be used: {failed}, see {tmp_path / 'errors.jsonl'}" if failed else ""
    assert capsys.readouterr().out == f"{masks} mask{'s' * (masks != 1)} in {tmp_path / 'masks'}{more}\n"


@pytest.mark.parametrize(
    ("categories", "archived", "ran"),
    [([], False, ["archive"]), (["cat"], False, ["index", "archive"]), (["cat"], True, ["archive"])],
)
def test_index_is_left_out_where_nobody_needs_it(tmp_path, photos, monkeypatch, categories, archived, ran):
    seen = []
    for name in ("index", "archive"):
        stage = SimpleNamespace(
            run=lambda ctx, name=name: seen.append((name, ctx.device)),
            outputs=STAGES[name].outputs,
            outdated_files=STAGES[name].outdated_files,
        )
        monkeypatch.setitem(run.STAGES, name, stage)
    RunRecord(str(photos), {"archive": StageRecord({"categories": categories})}).write(tmp_path)
    touch(tmp_path, "index/.tmp-1", ".tmp-2", *(["archive.json"] if archived else []))
    run.work(tmp_path, ["index", "archive"], Worker(1, 2), "cpu")
    assert (tmp_path / ".tmp-2").exists()  # the main worker's task
    assert [name for name, _ in seen] == ran and seen[0][1] == "cpu"
    run.work(tmp_path, ["index"], Worker(), "cpu")
    assert seen[-1] == ("index", "cpu") and not list(tmp_path.rglob(".tmp-*"))


# -- settings and checks ---------------------------------------------------------------------------------------------


def test_second_process_gets_an_error(tmp_path):
    with (
        run.locked(tmp_path / "out"),
        pytest.raises(UserError, match="out is in use by another run"),
        run.locked(tmp_path / "out"),
    ):
        pass
    with pytest.raises(RuntimeError), run.locked(tmp_path / "out"):
        raise RuntimeError
    with (tmp_path / "out" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_claimed_folder_is_a_run(tmp_path):
    run.claim(tmp_path, "/p")
    run.claim(tmp_path, "/q")
    assert read_record(tmp_path).photos == "/p"
    for name in ("report.html", "masks/a", "segmenter/a"):
        touch(tmp_path / name.replace("/", "_"), name)
        with pytest.raises(UserError, match="was not made by a run"):
            run.claim(tmp_path / name.replace("/", "_"), "/p")


@pytest.mark.parametrize(
    ("stages", "ahead", "categories", "imported", "loading", "checked"),
    [
        (["index", "archive"], ["index", "archive"], ["cat"], [], {"index", "archive"}, ["index"]),
        (["index", "archive"], ["index", "archive"], [], [], set(), ["index"]),
        (["index", "archive"], ["index"], ["cat"], [], set(), []),
        (["index"], ["index"], [], [], {"index"}, ["index"]),
        (["experts", "train"], ["experts", "train"], [], [], {"experts", "train"}, ["experts", "train"]),
        (["experts", "train"], ["experts", "train"], [], ["experts"], {"train"}, ["experts", "train"]),
        (["train"], [], [], [], set(), []),
    ],
)
def test_only_work_that_is_ahead_is_checked(
    tmp_path, photos, monkeypatch, stages, ahead, categories, imported, loading, checked
):
    made, needed = [], []
    monkeypatch.setattr(run.hub, "needed", lambda config, names, select: needed.append(set(names)) or ["w"])
    checks = {name: lambda plan, name=name: made.append((name, plan)) for name in STAGES}
    checks["archive"] = checks["index"]  # as in the table of stages
    table = [SimpleNamespace(name=name, check=checks[name]) for name in ahead]
    monkeypatch.setitem(run.STAGES, "archive", next((one for one in table if one.name == "archive"), STAGES["archive"]))
    config = make_config({"photos": str(photos), "categories": categories})
    source = PhotoSource(photos)
    run._check(tmp_path, config, source, stages, 3, table, frozenset(imported))
    assert needed == [loading] and [name for name, _ in made] == checked
    for _, plan in made:
        assert (plan.workers, plan.stages, plan.weights, plan.imported) == (
            3,
            tuple(stages),
            ("w",),
            frozenset(imported),
        )


def test_categories_and_embeddings_are_checked(tmp_path, photos):
    (tmp_path / "list.txt").write_text("photos/cat/0.jpg")
    for source, stages, values, message in (
        (tmp_path / "list.txt", ["archive"], {}, "is not a folder of class folders: pass --categories"),
        (photos, ["index"], {"categories": ["cat", "CAT"]}, "--categories: the names 'CAT' and 'cat'"),
        (photos, ["index"], {"index": {"embeddings": "e", "clip_weights": "w"}}, "pass --embeddings or --clip-weights"),
    ):
        config = make_config({"photos": str(source), **values})
        with pytest.raises(UserError, match=message):
            run._expect_categories(config, PhotoSource(source), stages)
    run._expect_categories(make_config({"photos": "p"}), PhotoSource(tmp_path / "list.txt"), ["index"])
    run._expect_categories(
        make_config({"photos": "p", "categories": ["a"]}), PhotoSource(tmp_path / "list.txt"), ["archive"]
    )
    for name in ("embeddings", "clip_weights"):
        run._expect_categories(make_config({"photos": "p", "index": {name: "e"}}), PhotoSource(photos), ["archive"])


@pytest.mark.parametrize(("missing", "fits"), [(2, True), (3, False)])
@pytest.mark.parametrize("file", ["archive.json", "index/photos.jsonl", None])
def test_half_of_the_photos_must_be_where_they_have_moved(tmp_path, photos, file, missing, fits):
    names = [f"gone{n}.jpg" for n in range(missing)] + [f"cat/{n}.jpg" for n in range(4 - missing)]
    if file == "archive.json":
        write_archive(tmp_path / file, Archive(["a"], {"a": [Retrieved(name, None) for name in names]}))
    elif file:
        touch(tmp_path, file)
        (tmp_path / file).write_text("".join(json.dumps({"photo": name}) + "\n" for name in names))
    record = RunRecord("/old")
    if fits or file is None:
        run._expect_same_photos(tmp_path, PhotoSource(photos), record)
        return
    with pytest.raises(
        UserError, match=r"was made from the photos in /old, and .*photos lacks most of them, such as 'gone0"
    ):
        run._expect_same_photos(tmp_path, PhotoSource(photos), record)


def test_of_many_photos_1000_are_looked_for(tmp_path, photos, monkeypatch):
    asked = []
    monkeypatch.setattr(PhotoSource, "exists", lambda self, name: asked.append(name) or True)
    write_archive(tmp_path / "archive.json", Archive(["a"], {"a": [Retrieved(f"{n}", None) for n in range(1200)]}))
    run._expect_same_photos(tmp_path, PhotoSource(photos), RunRecord("/old"))
    assert asked == [str(n) for n in range(1000)]


# -- results that are replaced ---------------------------------------------------------------------------------------


def recorded(*names: str) -> RunRecord:
    return RunRecord("/p", {name: StageRecord({"seed": 1}) for name in names})


@pytest.mark.parametrize(
    ("stages", "made"),
    [
        (["index"], ["report", "train", "pseudolabel", "archive", "index"]),
        (["archive"], ["report", "train", "pseudolabel", "archive"]),
        (["train"], ["train"]),
        (["train-saliency"], []),
        (["report"], ["report"]),
    ],
)
def test_what_is_made_from_a_stage_is_replaced_with_it(stages, made):
    """As far as it is recorded; last ones first."""
    record = recorded("index", "archive", "pseudolabel", "train")
    assert [stage.name for stage in run._made_from([STAGES[name] for name in stages], record)] == made


def test_replaced_results_are_removed_when_their_stage_has_finished(tmp_path):
    record = recorded("archive")
    record.replaced = recorded("pseudolabel", "train")
    record.write(tmp_path)
    touch(tmp_path / OLD, "masks/00000.jsonl", "segmenter/model.safetensors")
    touch(tmp_path, "masks/00000.jsonl")
    run.finish(tmp_path, ["train"])
    assert list(read_record(tmp_path).replaced.stages) == ["pseudolabel"]
    assert (tmp_path / OLD / "masks" / "00000.jsonl").exists() and not (tmp_path / OLD / "segmenter").exists()
    run.finish(tmp_path, ["pseudolabel"])
    assert read_record(tmp_path).replaced is None and not (tmp_path / OLD).exists()
    assert (tmp_path / "masks" / "00000.jsonl").exists()
    run.finish(tmp_path, ["train"])
    assert run.put_back(tmp_path) is False


def test_replaced_results_are_put_back(tmp_path):
    record = recorded("archive", "pseudolabel")
    record.replaced = RunRecord("/old", {"pseudolabel": StageRecord({"seed": 2}), "train": StageRecord()})
    record.write(tmp_path)
    touch(tmp_path, "masks/00001.jsonl")
    touch(tmp_path / OLD, "masks/00000.jsonl", "segmenter/model.safetensors")
    assert run.put_back(tmp_path) is True
    left = read_record(tmp_path)
    assert left.photos == "/old" and left.replaced is None and list(left.stages) == ["archive", "pseudolabel"]
    assert left.stages["pseudolabel"].settings == {"seed": 2}
    assert not (tmp_path / "masks" / "00001.jsonl").exists() and not (tmp_path / OLD).exists()
    assert (tmp_path / "masks" / "00000.jsonl").exists() and (tmp_path / "segmenter" / "model.safetensors").exists()


def test_error_says_where_replaced_results_are(tmp_path):
    error = UserError("stop")
    run._keep_replaced(tmp_path, error)
    record = recorded()
    record.replaced = recorded("pseudolabel")
    record.write(tmp_path)
    touch(tmp_path / OLD, "masks/00000.jsonl")
    touch(tmp_path, "masks/00001.jsonl")
    run._keep_replaced(tmp_path, RuntimeError())
    assert str(error) == "stop" and (tmp_path / OLD).exists()
    run._keep_replaced(tmp_path, error)
    assert str(error) == f"stop; until the command has finished, the earlier results are kept in {tmp_path / OLD}"
    (tmp_path / "masks" / "00001.jsonl").unlink()
    run._keep_replaced(tmp_path, error)
    assert (tmp_path / "masks" / "00000.jsonl").exists() and read_record(tmp_path).replaced is None


def test_commands_are_named_with_their_folder():
    assert run._command(STAGES["index"], Path("o")) == "index --out o"
    assert run._command(STAGES["train"], Path("o")) == "train o"
