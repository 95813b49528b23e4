# SPDX-License-Identifier: MIT
"""Messages of errors: one line that says what is wrong and which command makes a file again."""

from __future__ import annotations

import importlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import namedmask
from namedmask.errors import (
    DamagedFile,
    NothingUsable,
    UserError,
    WriteError,
    counted,
    explained,
    first_line,
    listed,
    quoted,
)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("a\nb"), "a"), (ValueError("\n a \n"), "a"), (ValueError(), "ValueError"), (KeyError("k"), "'k'")],
)
def test_first_line_of_an_exception(error, line):
    assert first_line(error) == line


def test_listed_names_are_few_and_short():
    assert [listed(list("abcd")[:n]) for n in range(5)] == ["", "a", "a, b", "a, b, c", "a, b, c and 1 more"]
    assert listed(list("abcde"), 2) == "a, b and 3 more"
    assert listed(["x" * 80, "y" * 81]) == "x" * 80 + ", " + "y" * 77 + "..."
    assert [quoted("abcd"[:n]) for n in (1, 3, 4)] == ["'a'", "'a', 'b', 'c'", "'a', 'b', 'c' and 1 more"]


def test_counts_are_in_the_singular_and_plural():
    assert [counted(n, "photo") for n in (0, 1, 2000)] == ["0 photos", "1 photo", "2,000 photos"]
    assert [counted(n, "category") for n in (1, 2)] == ["1 category", "2 categories"]


SOURCES = sorted(path for suffix in ("py", "j2", "js") for path in Path(namedmask.__path__[0]).rglob(f"*.{suffix}"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_verb_in_the_plural_follows_a_count(path):
    """Such as "1 photos have no mask"."""
    number = r"\{[^{}]*(?:len\(|count|number|:,)[^{}]*\}+"
    assert not re.findall(number + r" (?:of \S+ )?(?:[a-z-]+ ){0,3}[a-z]+s (?:are|were|have)\b", path.read_text())


def test_errors_with_a_remedy_are_explained():
    why = explained(FileNotFoundError(2, "No such file or directory", b"/d/f"))
    assert type(why) is UserError
    assert str(why) == "/d/f: No such file or directory; correct or move it, and run the same command again"
    assert str(explained(OSError(5, None, "/d/f"))).startswith("/d/f: [Errno 5]")
    written = WriteError("full")
    written.filename = "/d/f"
    others = [OSError("no file"), written, RuntimeError("shapes differ"), ValueError("out of memory"), UserError("u")]
    assert all(explained(error) is error for error in others)
    for error in (
        MemoryError(),
        RuntimeError("CUDA out of memory"),
        RuntimeError("[enforce fail] can't allocate memory"),
    ):
        assert str(explained(error)).startswith(f"out of memory ({str(error) or 'MemoryError'}); lower --image-size")


def imported(name: str) -> Exception:
    """What the import of a module raises."""
    sys.modules.pop(name, None)
    with pytest.raises(Exception) as info:
        importlib.import_module(name)
    return explained(info.value)


def test_a_package_that_cannot_be_imported_is_explained(tmp_path, monkeypatch):
    """As torchvision raises beside another build of torch; as a module of the user's own raises."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("from . import ops")
    (tmp_path / "torchvision" / "ops.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "timm.py").write_text("raise ImportError('cannot import name')")
    (tmp_path / "own.py").write_text("1 / 0")
    (tmp_path / "well.py").write_text("def fail():\n    raise RuntimeError('not while it was imported')")
    for name in ("torchvision", "torchvision.ops", "timm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    why = imported("torchvision")
    assert type(why) is UserError
    index = "" if torch.version.cuda else " --index-url https://download.pytorch.org/whl/cpu"
    assert str(why) == (
        f"torchvision {version('torchvision')} cannot be imported beside torch {torch.__version__}: operator "
        "torchvision::nms does not exist; install it again: "
        f"pip install --force-reinstall torchvision torch{index}"
    )
    assert str(imported("timm")) == (
        f"timm {version('timm')} cannot be imported: cannot import name; install it again: "
        "pip install --force-reinstall timm --no-deps"
    )
    assert str(imported("own")) == "own cannot be imported: ZeroDivisionError: division by zero"
    with pytest.raises(RuntimeError) as info:
        importlib.import_module("well").fail()
    assert explained(info.value) is info.value


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("r/index/photos.jsonl", "delete it and run `namedmask index --out r` to make it again"),
        ("r/archive.json", "delete it and run `namedmask archive r` to make it again"),
        ("r/masks/00000.jsonl", "delete it and run `namedmask pseudolabel r` to make it again"),
        (
            "r/masks/00012.errors.jsonl",
            "delete it and r/masks/00012.jsonl, and run `namedmask pseudolabel r` to make it again",
        ),
        (
            "r/index/00012.errors.jsonl",
            "delete it and r/index/00012.safetensors, and run `namedmask index --out r` to make it again",
        ),
        ("r/index/photos.errors.jsonl", "delete it and run `namedmask index --out r` to make it again"),
        (
            "r/detected/00000.jsonl",
            "delete it and r/masks/00000.jsonl, and run `namedmask pseudolabel r` to make it again",
        ),
        ("r/saliency/checkpoint.pt", "delete it and run `namedmask train-saliency r` to make it again"),
        ("r/experts/cat/checkpoint.pt", "delete it and run `namedmask experts r` to make it again"),
        ("r/segmenter/metrics.jsonl", "delete it and run `namedmask train r` to make it again"),
        ("elsewhere/00000.jsonl", "delete it and make it again"),
    ],
)
def test_damaged_file_is_named_with_the_command_that_makes_it_again(file, remedy):
    assert str(DamagedFile(file, "it is empty")) == f"{file}: it is empty; the file is damaged: {remedy}"


def test_reason_of_a_damaged_file():
    def text(reason, **more):
        return str(DamagedFile("f", reason, remedy="restore it", **more)).removesuffix(
            "; the file is damaged: restore it"
        )

    assert text("it is cut off", line=7) == "f:7: it is cut off"
    assert text(ValueError("bad\nmore")) == "f: bad" and text(UserError("f cannot be read")) == "f: cannot be read"
    assert text(KeyError("k")) == "f: KeyError: 'k'" and text(MemoryError()) == "f: MemoryError: "
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert text(caught.value).startswith("f: JSONDecodeError: Expecting")
    assert isinstance(DamagedFile(Path("f"), ""), UserError) and issubclass(NothingUsable, UserError)
