# SPDX-License-Identifier: MIT
"""--update: a run that has grown has the results of one that was made at once. Runs that move to other folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from namedmask.archive import read_archive
from namedmask.files import OUTDATED
from namedmask.masks import read_masks
from namedmask.record import read_record
from small_world import command, draw_photos, files_of, small_run, write_embeddings

PHOTOS = 12


def results(out: Path, *folders: str) -> dict[str, bytes]:
    """The files of index, archive and masks."""
    kept = ("index/", "masks/", "detected/", "archive.json", "errors.jsonl")
    return {name: data for name, data in files_of(out).items() if name.startswith(kept + folders)}


def succeed(*words) -> str:
    result = command(*words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def world(tmp_path_factory, detector_options):
    """Photos in two folders of a run, the second half and one name still missing; and the run made at once."""
    root = tmp_path_factory.mktemp("world")
    words, training = small_run(root, PHOTOS, detector_options)
    succeed(*words, "--out", root / "all", "--set", "pseudolabel.shard_size=3", "--set", "index.shard_size=5")
    return root, words, training


def test_x(world, tmp_path):
    root, words, training = world
    photos = tmp_path / "photos"
    shutil.copytree(root / "photos", photos)
    late = sorted(photos.iterdir())[1::3]
    for path in late:
        path.rename(tmp_path / path.name)
    w = ["run", photos, "--categories", "cat", *words[4:], "--out", tmp_path / "run", "--set", "pseudolabel.shard_size=3", "--set", "index.shard_size=5"]
    print(succeed(*w))
    for path in late:
        (tmp_path / path.name).rename(path)
    w[3] = "cat,dog"
    r = command(*w)
    print(r.exit_code, r.output)
    print(succeed(*w, "--update"))
    a, b = results(tmp_path / "run"), results(root / "all")
    assert a == b
    assert not (tmp_path / "run" / OUTDATED).exists()
    print((tmp_path / "run/run.toml").read_text()[-900:])
