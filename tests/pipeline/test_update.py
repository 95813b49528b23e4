# SPDX-License-Identifier: MIT
"""--update: a run that has grown has the results of one that was made at once. Runs that move to other folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from namedmask import files, index, pseudolabel
from namedmask.archive import read_archive
from namedmask.files import OUTDATED
from namedmask.index import PrecomputedEmbeddings
from namedmask.masks import read_masks
from namedmask.pseudolabel import Labeler
from namedmask.record import UPDATED, read_record
from small_world import command, draw_photo, files_of, small_run

PHOTOS = 10
GONE = "cat0002.jpg"  # in the first run alone
LATE = ["cat0000.jpg", "dog0005.jpg", "dog0009.jpg"]  # added later

pytestmark = pytest.mark.usefixtures("one_thread_in_module")


def results(out: Path) -> dict[str, bytes]:
    """Index, archive, masks and errors of a run."""
    made = ("index/", "archive.", "masks/", "detected/", "errors.jsonl", OUTDATED)
    return {name: data for name, data in files_of(out).items() if name.startswith(made)}


def succeed(*words) -> str:
    result = command(*words)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*words) -> str:
    result = command(*words)
    assert result.exit_code == 2, result.output
    return result.output


class World:
    """Runs of a folder of photos: `first` has one name, `GONE` and not `LATE`; `all` was made at once."""

    def __init__(self, root: Path, detector_options: list[str]):
        words, self.training = small_run(root, PHOTOS, detector_options)
        self.training += ["--steps", 2]
        self.options = [*words[4:], "--set", "pseudolabel.shard_size=3", "--set", "index.shard_size=4"]
        self.root, self.photos = root, root / "photos"
        self.words = ["run", self.photos, *self.options, "--categories"]
        shutil.move(self.photos / GONE, root / GONE)
        succeed(*self.words, "cat,dog", "--keep-detected", "--out", root / "all")
        shutil.copytree(self.photos, root / "fewer")
        shutil.copy(root / GONE, root / "fewer" / GONE)
        for name in LATE:
            (root / "fewer" / name).unlink()
        succeed("run", root / "fewer", *self.words[2:], "cat", "--keep-detected", "--out", root / "first")

    def copy(self, name: str, to: Path) -> Path:
        return Path(shutil.copytree(self.root / name, to))


@pytest.fixture(scope="module")
def world(tmp_path_factory, detector_options):
    return World(tmp_path_factory.mktemp("world"), detector_options)


def test_grown_run_equals_one_made_at_once(world, tmp_path, monkeypatch):
    out = world.copy("first", tmp_path / "out")
    assert "bring it up to date with --update" in fail(*world.words, "cat,dog", "--out", out)
    embedded: list[str] = []
    labeled: list[str] = []

    def images(self, source, shards, original=PrecomputedEmbeddings.images):
        shards = list(shards)
        embedded.extend(name for shard in shards for name in shard)
        return original(self, source, shards)

    def label(self, source, units, *more, original=Labeler.label):
        units = list(units)
        labeled.extend(name for name, _ in units)
        return original(self, source, units, *more)

    monkeypatch.setattr(PrecomputedEmbeddings, "images", images)
    monkeypatch.setattr(Labeler, "label", label)
    before = {entry.photo for entry in read_archive(out / "archive.json").photos["cat"]}
    printed = succeed(*world.words, "cat,dog", "--out", out, "--update")
    archive = read_archive(out / "archive.json")
    after = {entry.photo for entries in archive.photos.values() for entry in entries}
    assert archive.categories == ["cat", "dog"] and GONE in before - after
    assert embedded == LATE and sorted(labeled) == sorted(after - before)
    assert f"3 new photos indexed, {PHOTOS - 4} kept, 1 gone" in printed
    assert f"{len(after - before)} photos labeled, {len(after & before)} kept" in printed
    assert results(out) == results(world.root / "all")
    record = read_record(out)
    assert record.stages["archive"].made_with[UPDATED] == "categories: ['cat'] -> ['cat', 'dog']"
    assert record.stages["pseudolabel"].upstream["categories"] == ["cat", "dog"] and record.outdating == []
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent.name in ("index", "masks")}
    succeed(*world.words, "cat,dog", "--out", out, "--update")  # nothing is new
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert results(out) == results(world.root / "all")


@pytest.mark.parametrize(
    ("module", "function", "calls", "options"),
    [
        (files, "move", 3, ["--update"]),
        (index, "_write_shard", 2, []),
        (pseudolabel, "_write_shard", 1, ["--workers", 2]),
    ],
)
def test_interrupted_update_continues(world, tmp_path, monkeypatch, module, function, calls, options):
    out = world.copy("first", tmp_path / "out")
    original, left = getattr(module, function), iter(range(calls))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupted)
        assert command(*world.words, "cat,dog", "--out", out, "--update").exit_code == 130
    assert (out / OUTDATED).exists() and results(out) != results(world.root / "all")
    assert "was made with other settings: detector.tau" in fail("pseudolabel", out, "--tau", 0.3)  # nothing is lost
    succeed("run", world.photos, "--out", out, *options)
    assert results(out) == results(world.root / "all")


def test_names_can_change_during_an_update(world, tmp_path, monkeypatch):
    """Masks that the first attempt has made are kept as well."""
    out = world.copy("first", tmp_path / "out")
    left = iter(range(1))
    original = pseudolabel._write_shard

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pseudolabel, "_write_shard", interrupted)
        command(*world.words, "cat,dog", "--out", out, "--update")
    printed = succeed(*world.words, "dog,cat", "--out", out, "--update")
    first = {entry.photo for entry in read_archive(world.root / "first/archive.json").photos["cat"]}
    kept = int(printed.split(" photos labeled, ")[1].split()[0])
    assert kept > len(first - {GONE})
    assert read_archive(out / "archive.json").categories == ["dog", "cat"] and not (out / OUTDATED).exists()


def test_embeddings_of_an_update_are_those_of_its_file(world, tmp_path):
    """The names of the new file are swapped, so that each has the other one's photos."""
    out = world.copy("all", tmp_path / "out")
    before, masks = read_archive(out / "archive.json").photos, list(read_masks(out / "masks"))
    file = Path(shutil.copy(world.options[1], tmp_path / "swapped.safetensors"))
    lists = json.loads(world.options[1].with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps(lists | {"names": ["dog", "cat"]}))
    options = ["--embeddings", file, *world.options[2:], "--keep-detected", "--out", out, "--update"]
    assert "0 photos labeled" in succeed("run", world.photos, *options)
    assert read_archive(out / "archive.json").photos == {"cat": before["dog"], "dog": before["cat"]}
    assert sorted(record.rle for record in read_masks(out / "masks")) == sorted(record.rle for record in masks)


def test_experts_of_unchanged_categories_are_kept(world, tmp_path):
    grown, whole = world.copy("first", tmp_path / "grown"), world.copy("all", tmp_path / "all")
    succeed(*world.words, "cat", "--out", grown, "--update")  # the other photos
    succeed("experts", grown, *world.training)
    refined = results_of(grown, "refined")
    network = (grown / "experts/cat.safetensors").read_bytes()
    printed = succeed(*world.words, "cat,dog", "--out", grown, "--update")
    assert f"the results of `experts` are out of date: `namedmask experts {grown}`" in printed
    assert not (grown / "refined").exists()
    assert "are from before the update; `namedmask experts" in fail("train", grown, *world.training)
    assert "1 network kept" in succeed("experts", grown)
    succeed("experts", whole, *world.training)
    assert (grown / "experts/cat.safetensors").read_bytes() == network and not (grown / OUTDATED).exists()
    assert results_of(grown, "refined") == results_of(whole, "refined")
    assert results_of(grown, "refined").items() >= refined.items()
    assert results_of(grown, "experts", ".safetensors") == results_of(whole, "experts", ".safetensors")
    shutil.rmtree(grown / "experts/dog")  # without its record, a network is not known to be of these masks
    assert "1 network kept" in succeed("experts", grown, "--update")
    assert results_of(grown, "experts", ".safetensors") == results_of(whole, "experts", ".safetensors")


def test_an_expert_that_is_half_taken_back_is_taken(world, tmp_path):
    """A kill between the two renames, of the network and of its metrics."""
    out = world.copy("first", tmp_path / "out")
    succeed(*world.words, "cat", "--out", out, "--update")  # the other photos
    succeed("experts", out, *world.training)
    network = (out / "experts/cat.safetensors").read_bytes()
    succeed(*world.words, "cat,dog", "--out", out, "--update")
    (before,) = (out / OUTDATED).glob("*/experts/cat.safetensors")
    (out / "experts").mkdir(exist_ok=True)
    before.rename(out / "experts/cat.safetensors")
    assert "1 network kept" in succeed("experts", out)
    assert (out / "experts/cat.safetensors").read_bytes() == network
    assert (out / "experts/cat/metrics.jsonl").exists() and not (out / OUTDATED).exists()


def results_of(out: Path, folder: str, suffix: str = ".jsonl") -> dict[str, bytes]:
    return {name: data for name, data in files_of(out / folder).items() if name.endswith(suffix)}


def test_segmenter_is_trained_again_when_asked(world, tmp_path):
    out = world.copy("first", tmp_path / "out")
    succeed("train", out, *world.training)
    weights = out / "segmenter/model.safetensors"
    before = weights.read_bytes()
    assert f"`namedmask train {out} --update`" in succeed(*world.words, "cat", "--out", out, "--update")
    assert weights.read_bytes() == before
    assert f"`namedmask train {out} --update`" in fail("train", out)  # other photos
    succeed("train", out, "--update")
    after = weights.read_bytes()
    assert after != before and not (out / OUTDATED).exists()
    assert "done before" in succeed("train", out, "--update") and weights.read_bytes() == after
    assert f"`namedmask train {out}" not in succeed(*world.words, "cat", "--out", out, "--update")


def test_training_after_an_update_of_some_stages_advises_update(world, tmp_path):
    out = world.copy("first", tmp_path / "out")
    succeed("train", out, *world.training)
    advice = f"segmenter is from before the update; `namedmask train {out} --update` trains another one"
    for stage, *options in (("archive", "--categories", "cat,dog"), ("pseudolabel",)):
        assert advice in succeed(stage, out, *options, "--update")
        assert f"{advice}: categories: ['cat'] -> ['cat', 'dog']\n" in fail("train", out)
        assert "; segmenter.steps: 2 -> 3 (leave these options out" in fail("train", out, "--steps", 3)
    succeed("train", out, "--update")


def test_segmenter_follows_the_masks_and_not_the_networks_of_experts(world, tmp_path):
    """The folder refined/ may be deleted: training then uses the detector's masks, before and after an update."""
    out = world.copy("first", tmp_path / "out")
    succeed("train", out, *world.training)
    segmenter = (out / "segmenter/model.safetensors").read_bytes()
    succeed("experts", out, *world.training)
    changed = f"was trained on other masks than {out / 'refined'} has now; `namedmask train {out} --update`"
    assert changed in fail("train", out).replace("\n", " ")
    succeed("experts", out, "--overwrite")  # the segmenter is not made from them
    assert (out / "segmenter/model.safetensors").read_bytes() == segmenter
    shutil.rmtree(out / "refined")
    assert "done before" in succeed("train", out)
    assert "the results of `experts` are out of date" in succeed(*world.words, "cat", "--out", out, "--update")
    succeed("train", out, "--update")
    assert (out / "segmenter/model.safetensors").read_bytes() != segmenter
    succeed("experts", out)
    succeed("train", out, "--update")
    succeed("experts", out, "--overwrite")  # now it is
    assert not (out / "segmenter").exists()
    assert "segmenter is from before" not in succeed(*world.words, "cat,dog", "--out", out, "--update")


def test_what_is_not_growth_is_refused(world, tmp_path):
    out = world.copy("first", tmp_path / "out")
    before = files_of(out)
    assert "detector.tau: 0.2 -> 0.3" in fail(*world.words, "cat,dog", "--out", out, "--update", "--tau", 0.3)
    assert "lists none of" in fail(*world.words, "dog", "--out", out, "--update")
    (tmp_path / "few").mkdir()
    shutil.copy(world.photos / LATE[0], tmp_path / "few" / LATE[0])
    assert "lacks most of them" in fail("run", tmp_path / "few", "--out", out, "--update")
    assert "not both" in fail(*world.words, "cat,dog", "--out", out, "--update", "--overwrite")
    assert files_of(out) == before


def test_class_folders_grow(world, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number, name in enumerate(["cat/1.jpg", "cat/2.jpg"]):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        draw_photo(number, "cat").save(photos / name)
    words = ["run", photos, *world.options[2:-2], "--out"]
    succeed(*words, out)
    (photos / "dog").mkdir()
    draw_photo(5, "dog").save(photos / "dog/1.jpg")
    draw_photo(6, "cat").save(photos / "cat/3.jpg")
    assert "2 photos labeled, 2 kept" in succeed(*words, out, "--update")
    succeed(*words, tmp_path / "all")
    assert results(out) == results(tmp_path / "all")


@pytest.mark.parametrize("class_folders", [False, True])
@pytest.mark.parametrize(("name", "content"), [("new.jxl", b"?"), ("new.zip", b"?"), ("new.tar", b"?"), ("bird/", b"")])
def test_what_cannot_be_listed_is_noticed(class_folders, name, content, world, tmp_path):
    """An update says so, although no photo is new."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    if class_folders:
        (photos / "cat").mkdir(parents=True)
        draw_photo(0, "cat").save(photos / "cat/1.jpg")
        words = ["run", photos, *world.options[2:-2], "--out"]
    else:
        shutil.copytree(world.photos, photos)
        words = ["run", photos, *world.words[2:], "cat", "--out"]
    succeed(*words, out)
    path = photos / "cat" / name if class_folders and not name.endswith("/") else photos / name
    path.mkdir() if name.endswith("/") else path.write_bytes(content)
    printed = succeed(*words, out, "--update")
    assert ("could not be used: 1" in printed) == (class_folders or name != "bird/")
    before = {path: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
    succeed(*words, out, "--update")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    succeed(*words, tmp_path / "all")
    assert results(out) == results(tmp_path / "all")


def test_a_list_with_repeated_lines_moves(world, tmp_path):
    """An update after it changes nothing."""
    first, second, out = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    shutil.copytree(world.photos, first)
    names = [path.name for path in sorted(first.iterdir())]
    (first / "list.txt").write_text("\n".join([*names, names[0]]))
    words = [*world.words[2:], "cat", "--out", out]
    succeed("run", first / "list.txt", *words)
    before = {path: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
    first.rename(second)
    succeed("run", second / "list.txt", *words, "--update")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_run_moves_between_machines(world, tmp_path):
    """Photos, weights and embeddings lie elsewhere then; their old paths do not exist."""
    out = world.copy("all", tmp_path / "out")
    succeed("experts", out, *world.training)
    with_paths = {name for name, data in files_of(out).items() if str(world.root).encode() in data}
    assert with_paths <= {"stages.json", "run.toml", "report.html"}
    record = out / "stages.json"
    record.write_text(record.read_text().replace(str(world.root), "/gone").replace("/weights0/", "/gone/"))
    photos = Path(shutil.copytree(world.photos, tmp_path / "elsewhere"))
    before = results(out)
    for name in ("archive", "pseudolabel", "experts", "train"):
        assert "say where they are now (--photos)" in fail(name, out)
    succeed("report", out)
    assert "does not exist" in (out / "report.html").read_text()
    succeed("archive", out, "--photos", photos)
    succeed("report", out)
    assert "does not exist" not in (out / "report.html").read_text()
    succeed("pseudolabel", out)
    shutil.rmtree(out / "refined")
    assert "--encoder-weights /gone/encoder.safetensors: there is no such file" in fail("experts", out)
    succeed("experts", out, "--encoder-weights", world.root / "encoder.safetensors")  # relabels: the networks are there
    assert results(out) == before and (out / "refined").exists()
    shutil.copy(world.root / GONE, photos)
    assert "1 new photo indexed" in succeed("run", photos, *world.options, "--out", out, "--update")
    shutil.copytree(photos, tmp_path / "third")
    assert f"{out}/report.html" in succeed("report", out, "--photos", tmp_path / "third").replace("\n", "")
    assert read_record(out).photos == str(tmp_path / "third")
