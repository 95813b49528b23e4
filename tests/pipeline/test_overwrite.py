# SPDX-License-Identifier: MIT
"""--overwrite, mended mistakes, and links: nothing that a command has not made is used, changed or removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from namedmask import run
from namedmask.backbones import untrained_encoder
from namedmask.errors import UserError
from namedmask.files import OLD
from namedmask.formats import write_label_map
from namedmask.record import read_record
from namedmask.segmenter.deeplab import DeepLab, save_segmenter
from namedmask.stages import STAGES
from small_world import ENCODER, command, draw_photo, draw_photos, files_of, small_run, write_embeddings


@pytest.fixture(scope="module")
def world(tmp_path_factory, detector_options, backbone_weights, one_thread_in_module):
    """A run with masks, experts and a segmenter: run folder, words of `run`, words of the trainings."""
    root = tmp_path_factory.mktemp("world")
    words, training = small_run(root, 4, detector_options)
    out = root / "out"
    for line in ([*words, "--out", out], ["experts", out, *training], ["train", out, *training]):
        result = command(*line)
        assert result.exit_code == 0, result.output
    return out, words, training


@pytest.fixture
def copy(world, tmp_path):
    return shutil.copytree(world[0], tmp_path / "out")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    torch.manual_seed(1)
    save_segmenter(folder, DeepLab(untrained_encoder(ENCODER), 3, 16), ["cat", "dog"])
    return folder


def swapped(words: list, option: str, value: object) -> list:
    """The words with another value of an option, or with the option added."""
    if option not in words:
        return [*words, option, value]
    index = words.index(option) + 1
    return [*words[:index], value, *words[index + 1 :]]


# -- what a run has not made -----------------------------------------------------------------------------------------


STAGE_OF = {"masks": "pseudolabel", "detected": "pseudolabel", "refined": "experts", "experts": "experts"}
STAGE_OF |= {"segmenter": "train", "saliency": "train-saliency"}


@pytest.mark.parametrize("name", ["masks", "refined", "segmenter"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_folders_of_the_user_survive_in_every_stage(world, copy, tmp_path, name, overwrite):
    """In a new run folder, and in a run that has not got as far."""
    data = tmp_path / "data"
    precious = {f"{name}/00000.png", f"{name}/00000.jsonl", f"{name}/model.safetensors"}
    record = read_record(copy)
    record.stages.pop(STAGE_OF[name], None)
    record.write(copy)
    shutil.rmtree(copy / name, ignore_errors=True)
    for folder in (data, copy):
        (folder / name).mkdir(parents=True)
        for file in precious:
            (folder / file).write_bytes(b"precious")
    for line in ([*world[1], "--out", data], [*world[1], "--out", copy], ["archive", copy], [STAGE_OF[name], copy]):
        command(*line, *overwrite)
        for folder in (data, copy):
            assert all((folder / file).read_bytes() == b"precious" for file in precious), line


@pytest.mark.parametrize("name", ["report.html", "errors.jsonl", "run.toml", "archive.json", "sheets.json"])
def test_files_of_the_user_survive_in_a_new_run_folder(world, tmp_path, name):
    (tmp_path / name).write_text("precious")
    for overwrite in ([], ["--overwrite"]):
        result = command(*world[1], "--out", tmp_path, *overwrite)
        assert result.exit_code == 2 and f"{tmp_path / name} exists and was not made by a run" in result.stderr
        assert {p.name for p in tmp_path.iterdir()} == {name, ".lock"} and (tmp_path / name).read_text() == "precious"


def test_files_of_the_user_in_folders_of_a_run_survive(copy):
    names = [
        "masks/notes.txt",
        "segmenter/notes.txt",
        "experts/mine/data.txt",
        "experts/copy.safetensors",
        "index/my.txt",
    ]
    for name in names:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("precious")
    assert command("run", "--out", copy, "--overwrite").exit_code == 0
    assert all((copy / name).read_text() == "precious" for name in names)
    for ours in ("segmenter/model.safetensors", "experts/cat.safetensors", OLD):
        assert not (copy / ours).exists(), ours
    assert not STAGES["experts"].has_results(copy)  # although there is a network in its folder


def test_demo_takes_no_photos_of_the_user_for_its_own(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "00000.png")
    (tmp_path / "demo.json").write_text("{}")
    before = files_of(tmp_path)
    for overwrite in ([], ["--overwrite"]):
        result = command("demo", "--out", tmp_path, *overwrite)
        assert result.exit_code == 2 and "was not made by a run" in result.stderr and files_of(tmp_path) == before


# -- everything is checked first -------------------------------------------------------------------------------------


MISTAKES = [
    ("index", "--embeddings", "missing.safetensors"),
    ("index", "--embeddings", "wrong.safetensors"),
    ("index", "--clip-model", "ViT-X:nobody"),
    ("pseudolabel", "--backbone", "vit_huge"),
    ("pseudolabel", "--backbone", "resnet18"),
    ("pseudolabel", "--backbone-weights", "missing.safetensors"),
    ("pseudolabel", "--backbone-weights", "wrong.safetensors"),
    ("pseudolabel", "--backbone-weights", "misfit.safetensors"),
    ("pseudolabel", "--detector", "selfmask"),
    ("pseudolabel", "--photos", "empty"),
    ("experts", "--encoder", "resnet5"),
    ("experts", "--encoder-weights", "misfit.safetensors"),
    ("experts", "--batch-size", "1"),
    ("experts", "--grad-accum-steps", "3"),
    ("train", "--encoder", "resnet5"),
    ("train", "--encoder", "mobilevit_s"),
    ("train", "--encoder-weights", "missing.safetensors"),
    ("train", "--encoder-weights", "wrong.safetensors"),
    ("train", "--encoder-weights", "misfit.safetensors"),
    ("train", "--batch-size", "1"),
    ("train", "--workers", "3"),
]


@pytest.fixture
def mistakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.safetensors").write_bytes(b"not weights")
    (tmp_path / "wrong.json").write_text("{}")
    save_file({"some.weight": torch.zeros(3)}, tmp_path / "misfit.safetensors")
    (tmp_path / "empty").mkdir()


@pytest.mark.parametrize(("stage", "option", "value"), MISTAKES)
def test_mistake_with_overwrite_costs_nothing(world, copy, mistakes, stage, option, value):
    before = files_of(copy)
    out = ["--out", copy] if stage == "index" else [copy]
    embeddings = ["--embeddings", ""] if option == "--clip-model" else []
    result = command(stage, *out, *embeddings, option, value, "--overwrite")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert files_of(copy) == before


@pytest.mark.parametrize(("stage", "option", "value"), [m for m in MISTAKES if m[0] in ("index", "pseudolabel")])
def test_mistake_in_a_new_run_is_found_before_anything_is_made(world, tmp_path, mistakes, stage, option, value):
    words = world[1] if option != "--clip-model" else swapped(world[1], "--embeddings", "")
    if option == "--photos":
        words, option = ["run", value, *words[2:]], None
    result = command(*(swapped(words, option, value) if option else words), "--out", "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [".lock"]


def test_corrected_commands_work_without_overwrite(world, tmp_path, mistakes):
    """In every stage, one mistake after another."""
    expected = files_of(world[0])
    _, words, training = world
    lines = {"run": [*words, "--out", "out"]}
    lines |= {stage: [stage, "out", *training] for stage in ("experts", "train")}
    for stage, line in lines.items():
        for of, option, value in MISTAKES:
            if (of == stage or (stage == "run" and of in ("index", "pseudolabel"))) and option != "--photos":
                wrong = swapped(line, "--embeddings", "") if option == "--clip-model" else line
                assert command(*swapped(wrong, option, value)).exit_code == 2, (stage, option, value)
        assert command(*line).exit_code == 0, stage
    made = files_of(tmp_path / "out")
    for name in expected:
        if name.endswith(("jsonl", "safetensors", "archive.json")) and "metrics" not in name:
            assert made[name] == expected[name], name


@pytest.mark.parametrize(
    ("stage", "broken"),
    [
        ("pseudolabel", "namedmask.pseudolabel.write_shard"),
        ("experts", "namedmask.experts.train"),
        ("train", "namedmask.segmenter.training.fit"),
    ],
)
def test_failure_before_the_first_result_restores_the_old_ones(copy, stage, broken, monkeypatch):
    before, record = files_of(copy), read_record(copy)

    def fail(*_, **__):
        raise UserError("the disk is gone")

    monkeypatch.setattr(broken, fail)
    result = command(stage, copy, "--overwrite")
    assert result.exit_code == 2 and result.stderr.splitlines()[-1] == "namedmask: the disk is gone"
    left = files_of(copy)
    assert {name: left.get(name) for name in before if name not in ("stages.json", "run.toml")} == {
        name: data for name, data in before.items() if name not in ("stages.json", "run.toml")
    }
    assert read_record(copy).stages == record.stages and not (copy / OLD).exists()
    monkeypatch.undo()
    assert command(stage, copy).exit_code == 0
    assert files_of(copy)["masks/00000.jsonl"] == before["masks/00000.jsonl"]


def test_failure_after_the_first_result_keeps_both(copy, monkeypatch):
    before = files_of(copy)

    def fail(*_, **__):
        raise UserError("stop")

    with monkeypatch.context() as patched:
        patched.setattr("namedmask.segmenter.training.save_segmenter", fail)
        result = command("train", copy, "--seed", 1, "--overwrite")
    assert f"the earlier results are kept in {copy / OLD}" in result.stderr.splitlines()[-1]
    name = "segmenter/model.safetensors"
    assert (copy / OLD / name).read_bytes() == before[name] and (copy / "segmenter" / "checkpoint.pt").exists()
    assert command("train", copy, "--seed", 1).exit_code == 0  # continues
    assert (copy / name).read_bytes() != before[name] and not (copy / OLD).exists()
    assert read_record(copy).replaced is None


def test_kill_while_results_are_set_aside_loses_nothing(copy, monkeypatch):
    before = files_of(copy)
    for after in (1, 4):
        replace, calls = Path.replace, []

        def kill(path, target, replace=replace, calls=calls, after=after):
            if OLD in str(target):
                calls.append(path)
                if len(calls) > after:
                    raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", kill)
            assert command("pseudolabel", copy, "--tau", 0.3, "--overwrite").exit_code == 130
        assert (copy / OLD).exists()
        assert command("report", copy).exit_code in (0, 2)
        assert command("train", copy).exit_code == 0
        left = files_of(copy)
        names = [name for name in before if name not in ("stages.json", "run.toml", "report.html")]
        assert {name: left.get(name) for name in names} == {name: before[name] for name in names}


def test_index_without_an_embedding_is_no_result(world, tmp_path):
    _, words, _ = world
    other = write_embeddings(tmp_path / "other.safetensors", ["cat_of_another_folder.jpg"])
    for line in (["index", words[1], "--embeddings", other], swapped(words, "--embeddings", other)):
        result = command(*line, "--out", tmp_path / "out")
        assert result.exit_code == 3 and "no photo in" in result.stderr and result.stderr.count("\n") == 1
        assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 4
    assert command(*words, "--out", tmp_path / "out").exit_code == 0
    assert files_of(tmp_path / "out")["masks/00000.jsonl"] == files_of(world[0])["masks/00000.jsonl"]


def test_all_photos_failing_restores_the_old_masks(world, copy, tmp_path):
    before = files_of(copy)
    shutil.copytree(world[0].parent / "photos", tmp_path / "photos")
    for photo in (tmp_path / "photos").iterdir():
        photo.write_bytes(b"no photo")
    result = command("pseudolabel", copy, "--photos", tmp_path / "photos", "--overwrite")
    assert result.exit_code == 3, result.output
    left = files_of(copy)
    assert all(left[name] == before[name] for name in before if name.startswith(("masks", "refined", "segmenter")))


# -- segment ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """The commonest layout of a data set: images and ground truth in one folder."""
    draw_photos(tmp_path / "data" / "images", 3)
    (tmp_path / "data" / "masks").mkdir()
    for photo in (tmp_path / "data" / "images").iterdir():
        Image.fromarray(np.ones((9, 9), np.uint8)).save(tmp_path / "data" / "masks" / f"{photo.stem}.png")
    return tmp_path / "data"


def test_segment_neither_uses_nor_removes_ground_truth(weights, dataset):
    before = files_of(dataset)
    for extra in ([], [json.dumps({"categories": ["cat", "dog"]})]):
        for text in extra:
            (dataset / "categories.json").write_text(text)
            before = files_of(dataset)
        for overwrite in ([], ["--overwrite"]):
            result = command("segment", weights, dataset / "images", "--out", dataset, *overwrite)
            assert result.exit_code == 2 and "exists and was not made by a run" in result.stderr
            assert files_of(dataset) == before


def test_segment_keeps_masks_of_the_user_beside_its_own(weights, dataset, tmp_path):
    out = tmp_path / "out"
    words = ["segment", weights, dataset / "images", "--out", out]
    assert command(*words).exit_code == 0
    expected = files_of(out)
    Image.fromarray(np.ones((9, 9), np.uint8)).save(out / "masks" / "new.png")
    (out / "notes.txt").write_text("precious")
    assert command(*words, "--overwrite").exit_code == 0
    made = files_of(out)
    assert {name: made[name] for name in expected if "segment.json" not in name} == {
        name: data for name, data in expected.items() if "segment.json" not in name
    }
    assert "masks/new.png" in made and "notes.txt" in made and not (out / OLD).exists()
    draw_photo(5, "cat").save(dataset / "images" / "new.jpg")
    result = command(*words)
    assert result.exit_code == 2 and f"{out / 'masks' / 'new.png'} exists" in result.stderr
    result = command("evaluate", out, out / "masks")
    assert result.exit_code == 2 and "there is no mask of that name" in result.stderr  # it is not a prediction
    (out / "masks" / "new.png").unlink()
    assert command(*words).exit_code == 0 and command("evaluate", out, out / "masks").exit_code == 0


def test_segment_restores_or_continues_after_a_failure(weights, dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["segment", weights, dataset / "images", "--out", out]
    assert command(*words).exit_code == 0
    expected = files_of(out)

    def failing_after(count):
        write, calls = write_label_map, []

        def fail(*arguments):
            calls.append(arguments)
            if len(calls) > count:
                raise UserError("stop")
            write(*arguments)

        return fail

    for count in (0, 1):
        with monkeypatch.context() as patched:
            patched.setattr("namedmask.segmenter.segment.write_label_map", failing_after(count))
            assert command(*words, "--overwrite").stderr == "namedmask: stop\n"
        left = files_of(out)
        assert all(data in left.values() for name, data in expected.items() if name != "segment.json")
        assert (out / OLD).exists() == (count > 0)
    assert command(*words).exit_code == 0 and files_of(out) == expected


@pytest.mark.parametrize("change", ["missing", "misfit", "names", "photos"])
def test_segment_with_a_mistake_costs_nothing(weights, dataset, tmp_path, mistakes, change):
    out = tmp_path / "out"
    assert command("segment", weights, dataset / "images", "--out", out).exit_code == 0
    before = files_of(out)
    words = {
        "missing": ["missing.pth", dataset / "images"],
        "misfit": ["misfit.safetensors", dataset / "images"],
        "names": [weights / "model.safetensors", dataset / "images", "--categories", "cat"],
        "photos": [weights, "empty"],
    }[change]
    if change == "names":
        shutil.copy(weights / "model.safetensors", tmp_path)
        words[0] = tmp_path / "model.safetensors"
    result = command("segment", *words, "--out", out, "--overwrite")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert files_of(out) == before


def test_segment_and_run_do_not_share_a_folder(world, weights, copy, dataset, tmp_path):
    before = files_of(copy)
    for overwrite in ([], ["--overwrite"]):
        result = command("segment", weights, dataset / "images", "--out", copy, *overwrite)
        assert result.exit_code == 2 and "was not made by a run" in result.stderr and files_of(copy) == before
    assert command("segment", weights, dataset / "images", "--out", tmp_path / "segmented").exit_code == 0
    before = files_of(tmp_path / "segmented")
    result = command(*world[1], "--out", tmp_path / "segmented", "--overwrite")
    assert result.exit_code == 2 and files_of(tmp_path / "segmented") == before


# -- links -----------------------------------------------------------------------------------------------------------


def test_lock_behind_a_link_is_not_opened(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    result = command(*world[1], "--out", tmp_path / "out")
    assert result.exit_code == 2 and ".lock is a symbolic link" in result.stderr
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / "out" / ".lock").unlink()
    (tmp_path / "out" / ".lock").write_text("precious")
    with run.locked(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").read_text() == "precious"


def test_folders_behind_links_work_and_stay_links(world, tmp_path):
    """All output folders on another disk, and the run folder itself behind a link."""
    _, words, training = world
    expected = files_of(world[0])
    out, disk = tmp_path / "out", tmp_path / "disk"
    folders = ("index", "masks", "experts", "refining", "refined", "segmenter")
    (disk / "out").mkdir(parents=True)
    out.symlink_to(disk / "out")
    for name in folders:
        (disk / name).mkdir()
        (out / name).symlink_to(disk / name)
    for overwrite in ([], ["--overwrite"]):
        for line in ([*words, "--out", out], ["experts", out, *training], ["train", out, *training]):
            result = command(*line, *overwrite)
            assert result.exit_code == 0, result.output
        assert all((out / name).is_symlink() for name in folders)
        for name, data in expected.items():
            if name.endswith(("jsonl", "safetensors")) and "metrics" not in name:
                assert (out / name).read_bytes() == data, name
    assert command(*words, "--out", out).exit_code == 0
    shutil.rmtree(disk / "masks")
    result = command("pseudolabel", out, "--overwrite")
    assert result.exit_code == 2 and "is a link to" in result.stderr and "does not exist" in result.stderr


def test_segment_with_folders_behind_links(weights, dataset, tmp_path):
    out, disk = tmp_path / "out", tmp_path / "disk"
    out.mkdir()
    for name in ("masks", "overlays"):
        (disk / name).mkdir(parents=True)
        (out / name).symlink_to(disk / name)
    for overwrite in ([], ["--overwrite"], []):
        result = command("segment", weights, dataset / "images", "--out", out, *overwrite)
        assert result.exit_code == 0, result.output
        assert len(list((disk / "masks").iterdir())) == 3 and (out / "masks").is_symlink()


def test_targets_of_linked_files_are_not_written(world, copy, tmp_path):
    for name in ("report.html", "errors.jsonl", "run.toml"):
        (tmp_path / name).write_text("precious")
        (copy / name).unlink()
        (copy / name).symlink_to(tmp_path / name)
    assert command("run", "--out", copy).exit_code == 0
    assert command("run", "--out", copy, "--overwrite").exit_code == 0
    assert all((tmp_path / name).read_text() == "precious" for name in ("report.html", "errors.jsonl", "run.toml"))


def test_a_folder_with_the_name_of_a_result_is_not_moved(copy):
    path = copy / "masks" / "00000.errors.jsonl"
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("the user's")
    before = files_of(copy)
    result = command("pseudolabel", copy, "--overwrite")
    assert result.exit_code == 2 and f"{path} cannot be written: Is a directory" in result.stderr
    after = files_of(copy)
    assert {name: after.get(name) for name in before if name != "run.toml"} == {
        name: data for name, data in before.items() if name != "run.toml"
    }
