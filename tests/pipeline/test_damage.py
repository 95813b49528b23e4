# SPDX-License-Identifier: MIT
"""Damaged files of a finished run, full disks, and links: one line with the file and what to do; nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from namedmask import files
from namedmask.errors import UserError, WriteError
from namedmask.files import atomic_write
from namedmask.training import _tensorboard
from small_world import command, files_of, small_run

RECORDS = ("out/stages.json", "out/run.toml", "segmented/segment.json")


def errors(result) -> list[str]:
    """The lines on stderr of a command that are not warnings."""
    return [line for line in result.stderr.splitlines() if not line.startswith("namedmask: warning: ")]


@pytest.fixture(scope="module")
def world(tmp_path_factory, detector_options, backbone_weights, one_thread_in_module):
    """A finished run with all stages, and what segment has made with its segmenter: run folder, words of `run`."""
    root = tmp_path_factory.mktemp("world")
    out = root / "out"
    words, training = small_run(root, 6, detector_options)
    small = ["--crop-size", 32, "--batch-size", 2, "--steps", 1]
    backbone = ["--backbone", "vit_tiny_patch16_224", "--backbone-weights", backbone_weights]
    decoder = ["--num-queries", 2, "--decoder-layers", 1]
    for line in (
        [*words, "--out", out],
        ["train-saliency", out, *small, *backbone, *decoder],
        ["experts", out, *training],
        ["train", out, *training, "--allow-empty"],
        ["segment", out / "segmenter", root / "photos", "--out", root / "segmented"],
    ):
        result = command(*line)
        assert result.exit_code == 0, result.output
    return out, words


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world[0].parent / "segmented", tmp_path / "segmented")
    return shutil.copytree(world[0], tmp_path / "out")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_key(data: bytes) -> bytes:
    """A JSON file or line without its last key."""
    first, *rest = data.splitlines(keepends=True) if data.startswith(b'{"') else [data]
    fields = json.loads(first)
    fields.popitem()
    return json.dumps(fields).encode() + b"\n" + b"".join(rest)


def with_nan(data: bytes) -> bytes:
    first, *rest = data.splitlines(keepends=True) if data.startswith(b'{"') else [data]
    fields = json.loads(first)
    fields[list(fields)[-1]] = float("nan")
    return json.dumps(fields).encode() + b"\n" + b"".join(rest)


DAMAGES = {
    "empty": lambda data: b"",
    "cut off": half,
    "binary": lambda data: bytes(range(256)) * 3,
    "list": lambda data: b"[1, 2]\n",
    "number": lambda data: b"7\n",
    "deep": lambda data: b"[" * 100_000 + b"\n",
    "without a key": without_key,
    "NaN": with_nan,
}
JSON_DAMAGES = list(DAMAGES)
BINARY_DAMAGES = ["empty", "cut off", "binary", "list"]
READERS = {  # file in the copy: damages, and the commands that read it
    "out/masks/00000.jsonl": (
        JSON_DAMAGES,
        ["rm -r out/refined; report out", "experts out --overwrite", "train-saliency out --overwrite"],
    ),
    "out/refined/00000.jsonl": (JSON_DAMAGES[1:], ["report out", "train out --overwrite"]),
    "out/index/photos.jsonl": (JSON_DAMAGES, ["index --out out", "rm out/archive.json; archive out"]),
    "out/index/00000.safetensors": (BINARY_DAMAGES, ["rm out/archive.json; archive out"]),
    "out/archive.json": (
        [*JSON_DAMAGES],
        ["report out", "rm out/masks/00000.jsonl; pseudolabel out", "train out --overwrite"],
    ),
    "out/segmenter/categories.json": (
        [d for d in JSON_DAMAGES if d not in ("without a key", "NaN")],
        ["train out", "segment out/segmenter PHOTOS --out other"],
    ),
    "out/segmenter/model.safetensors": (BINARY_DAMAGES, ["segment out/segmenter PHOTOS --out other"]),
    "out/experts/cat.safetensors": (BINARY_DAMAGES, ["rm out/refined/00000.jsonl; experts out"]),
    "out/stages.json": (JSON_DAMAGES[:-1], ["report out", "pseudolabel out", "train out --overwrite"]),
    "out/errors.jsonl": ([d for d in JSON_DAMAGES if d != "empty"], ["report out"]),
    "out/saliency/metrics.jsonl": (["empty", "cut off", "binary", "list", "deep"], ["train-saliency out"]),
    "segmented/segment.json": (JSON_DAMAGES[:-1], ["segment out/segmenter PHOTOS --out segmented"]),
    "segmented/photos.jsonl": (JSON_DAMAGES[1:], ["segment out/segmenter PHOTOS --out segmented"]),
    "segmented/categories.json": (
        [d for d in JSON_DAMAGES if d != "NaN"],
        ["evaluate segmented segmented/masks"],
    ),
}


@pytest.mark.parametrize("file", READERS)
def test_damaged_file_is_named_with_the_remedy(world, copy, file, monkeypatch):
    monkeypatch.chdir(copy.parent)
    path, photos = Path(file), str(world[0].parent / "photos")
    damages, commands = READERS[file]
    if file == "out/errors.jsonl":
        path.write_text('{"photo": "a", "stage": "index", "reason": "b"}\n')
    intact = path.read_bytes()
    for words in commands:
        *preparation, words = words.split("; ")
        for damage in damages:
            path.write_bytes(DAMAGES[damage](intact))
            for line in preparation:
                _, *options, name = line.split()
                (shutil.rmtree if options else os.remove)(name)
            before = files_of(copy.parent)
            result = command(*(photos if word == "PHOTOS" else word for word in words.split()))
            at = f"{file}, {damage}, {words}: {result.stderr}"
            assert result.exit_code == 2, at
            assert path.name in result.stderr and len(errors(result)) == 1, at
            remedies = ("delete", "again", "--overwrite", "choose", "pass", "cannot be read")
            assert any(remedy in result.stderr for remedy in remedies), at
            left = files_of(copy.parent)
            assert set(before.values()) <= set(left.values()), at  # nothing is lost
            for folder in ("out", "segmented"):
                shutil.rmtree(folder)
                shutil.copytree(world[0].parent / folder, folder)


@pytest.mark.parametrize(("folder", "stage"), [("masks", "experts"), ("refined", "train")])
def test_masks_of_categories_that_the_archive_does_not_list_are_named(copy, folder, stage):
    path = copy / folder / "00000.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"category": "cat"', b'"category": "bird"', 1))
    before = files_of(copy)
    result = command(stage, copy, "--overwrite")
    assert result.exit_code == 2 and errors(result) == [
        f"namedmask: {copy / folder} has masks of bird, which {copy / 'archive.json'} does not list; make the masks "
        f"again with `namedmask pseudolabel {copy} --overwrite`"
    ]
    assert files_of(copy) == before


# What replaces a file: a folder, a pipe that nobody writes, a link to nowhere, a link to itself, nothing.
REPLACEMENTS = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "dangling": lambda path: path.symlink_to("/none/none"),
    "loop": lambda path: path.symlink_to(path.name),
    "missing": lambda path: None,
}


@pytest.mark.parametrize(
    ("file", "words", "replacements"),
    [
        ("out/stages.json", "report out", ["folder", "pipe", "loop"]),
        ("out/archive.json", "report out", list(REPLACEMENTS)),
        ("out/index/00000.safetensors", "archive out --overwrite", ["folder", "pipe"]),
        ("out/masks/00000.jsonl", "train-saliency out --overwrite", ["folder", "pipe"]),
        ("out/masks/00000.errors.jsonl", "experts out --overwrite", ["folder", "pipe", "loop"]),
        ("out/refined/00000.jsonl", "train out --overwrite", list(REPLACEMENTS)),
        ("out/refined/00001.jsonl", "report out", ["missing"]),
        ("out/experts/cat/tensorboard", "experts out --overwrite", ["dangling", "loop"]),
        ("out/segmenter/categories.json", "segment out/segmenter PHOTOS --out other", ["folder", "pipe", "loop"]),
        ("out/segmenter/model.safetensors", "segment out/segmenter PHOTOS --out other", list(REPLACEMENTS)),
        ("segmented/masks/cat0000.png", "evaluate segmented segmented/masks", list(REPLACEMENTS)[:-1]),
        ("segmented", "segment out/segmenter PHOTOS --out segmented", ["dangling", "loop"]),
    ],
)
def test_something_else_in_place_of_a_file_is_named(world, copy, file, words, replacements, monkeypatch):
    monkeypatch.chdir(copy.parent)
    path, photos = Path(file), str(world[0].parent / "photos")
    for replacement in replacements:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        REPLACEMENTS[replacement](path)
        result = command(*(photos if word == "PHOTOS" else word for word in words.split()))
        assert result.exit_code == 2 and len(errors(result)) == 1, (replacement, result.output)
        assert path.name in result.stderr and "--debug" not in result.stderr, (replacement, result.stderr)


def test_tensorboard_is_left_out_of_a_folder_whose_name_is_not_utf8(tmp_path, printing, capsys):
    pytest.importorskip("tensorboard")
    assert _tensorboard(f"{tmp_path}/{os.fsdecode(bytes([0xFF]))}", 1) is None
    assert "\\udcff, which is not UTF-8: metrics are in metrics.jsonl alone" in capsys.readouterr().err


def test_following_the_remedy_gives_the_same_bytes(world, copy):
    expected = files_of(world[0])
    for file, again in (
        ("masks/00000.jsonl", ["pseudolabel"]),
        ("refined/00001.jsonl", ["experts"]),
        ("archive.json", ["archive"]),
        ("index/00000.safetensors", ["index", "--out"]),
    ):
        (copy / file).unlink()
        assert command(*again, copy).exit_code == 0
        assert (copy / file).read_bytes() == expected[file], file


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rle", ""),
        ("rle", "é"),
        ("rle", "P" * 30),
        ("rle", "0"),
        ("rle", "~~~"),
        ("rle", None),
        ("size", [1, 1]),
        ("size", [10**9, 10**9]),
        ("size", [-3, 4]),
        ("area", 0),
        ("score", "high"),
        ("bbox", [1]),
        ("photo", 3),
    ],
)
def test_damaged_mask_is_found_when_it_is_read(copy, field, value):
    path = copy / "masks" / "00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[2])
    assert record["area"]
    lines[2] = json.dumps({**record, field: value}) + "\n"
    path.write_text("".join(lines))
    for words in (["train-saliency", copy, "--overwrite"], ["experts", copy, "--overwrite"], ["pseudolabel", copy]):
        result = command(*words)
        assert result.exit_code == 2 and f"{path}:3: " in result.stderr, result.output
        assert f"delete it and run `namedmask pseudolabel {copy}`" in result.stderr
    assert (copy / "saliency" / "model.safetensors").exists() and (copy / "experts" / "cat.safetensors").exists()


def train_without_end(copy: Path, monkeypatch) -> None:
    """Trains a segmenter again, up to its last checkpoint."""
    (copy / "segmenter" / "model.safetensors").unlink()

    def fail(*_):
        raise UserError("stop")

    with monkeypatch.context() as patched:
        patched.setattr("namedmask.segmenter.training.save_segmenter", fail)
        assert command("train", copy).stderr.splitlines()[-1] == "namedmask: stop"


def test_damaged_checkpoint_is_named(copy, monkeypatch):
    train_without_end(copy, monkeypatch)
    path = copy / "segmenter" / "checkpoint.pt"
    intact, state = path.read_bytes(), torch.load(path, weights_only=True)
    network, weight = state["network"], state["network"]["classifier.classifier.3.weight"]

    def with_weight(value):
        return {**state, "network": {**network, "classifier.classifier.3.weight": value}}

    damaged = [DAMAGES[damage](intact) for damage in BINARY_DAMAGES]
    damaged += [{**state, "about": path}, {**state, "step": 99}, {**state, "step": "1"}, {**state, "sums": 3}, [state]]
    damaged += [{key: state[key] for key in state if key != missing} for missing in state]
    damaged += [with_weight(weight[:1]), with_weight(weight * torch.nan), {**state, "optimizer": {}}]
    for content in damaged:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        result = command("train", copy)
        assert result.exit_code == 2 and str(path) in result.stderr and len(errors(result)) == 1, result.output
        assert "delete it and run the same command again" in result.stderr


def test_line_that_a_kill_cut_off_is_dropped_from_metrics(copy, monkeypatch):
    train_without_end(copy, monkeypatch)
    with (copy / "segmenter" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    assert command("train", copy).exit_code == 0
    assert [json.loads(x).get("step") for x in (copy / "segmenter" / "metrics.jsonl").read_text().splitlines()] == [
        None,
        8,
    ]


def test_weights_that_are_not_finite_are_an_error_of_the_file(copy):
    path = copy / "experts" / "dog.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path)
    (copy / "refined" / "00001.jsonl").unlink()
    result = command("experts", copy)
    assert result.exit_code == 2 and "values that are NaN or infinite" in errors(result)[-1]


# -- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_failed_write_names_the_file_and_leaves_nothing(tmp_path, code, monkeypatch):
    def fail(self, data):
        self.error = OSError(code, os.strerror(code))
        raise self.error

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(files._File, "write", fail)
    message = f"{path} cannot be written: {os.strerror(code)}"
    with pytest.raises(WriteError, match=message) as raised, atomic_write(path) as file:
        torch.save({"a": torch.zeros(100_000)}, file)
    assert raised.value.errno == code and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert ("disk mounted at" in str(raised.value)) == (code in (errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize("path", ["pipe", "/dev/stdout", "/", ""])
def test_what_is_no_file_is_not_replaced(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    before = os.lstat(path or ".").st_mode
    with pytest.raises(WriteError), atomic_write(path) as file:
        file.write(b"new")
    assert os.lstat(path or ".").st_mode == before and os.listdir() == ["pipe"]  # noqa: PTH208


def test_errors_of_the_block_are_not_write_errors(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file"):
        (tmp_path / "none").read_bytes()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("index --out OUT --overwrite", "photos.jsonl"),
        ("archive OUT --overwrite", "archive.json"),
        ("pseudolabel OUT --overwrite", "00000.jsonl"),
        ("experts OUT --overwrite", "checkpoint.pt"),
        ("train OUT --overwrite", "checkpoint.pt"),
        ("train OUT --overwrite", "model.safetensors"),
        ("train-saliency OUT --overwrite", "checkpoint.pt"),
        ("report OUT", "report.html"),
        ("segment OUT/segmenter PHOTOS --out OUT/../segmented --overwrite", "cat0000.jpg"),
        ("segment OUT/segmenter PHOTOS --out OUT/../segmented --overwrite", "dog0001.png"),
        ("evaluate OUT/../segmented OUT/../segmented/masks --json OUT/figures.json", "figures.json"),
    ],
)
def test_full_disk_in_any_stage_is_one_line_with_the_file(world, copy, words, name, monkeypatch):
    """After it, the earlier results are there again, or in .replaced if there are new ones."""

    def fail(self, data):
        if Path(self.name).name == name:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return files.io.FileIO.write(self, data)

    monkeypatch.setattr(files._File, "write", fail)
    before = files_of(copy.parent)
    photos = str(world[0].parent / "photos")
    result = command(*(photos if w == "PHOTOS" else w.replace("OUT", str(copy)) for w in words.split()))
    assert result.exit_code == 2 and len(errors(result)) == 1, result.output
    assert f"{name} cannot be written: No space left on device" in result.stderr
    left = files_of(copy.parent)
    assert not [path for path in left if ".tmp-" in path]
    assert set(before.values()) <= {*left.values()} | {before.get(name) for name in RECORDS}
