# SPDX-License-Identifier: MIT
"""namedmask-pseudolabel from photos to masks: results, reproducibility, resuming, and errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from namedmask import cli, run
from namedmask.archive import read_archive
from namedmask.masks import read_errors, read_masks
from namedmask.record import read_config, read_record
from small_world import COLORS, command, draw_photo, draw_photos, write_embeddings

PHOTOS = 70  # more than one shard of masks


def invoke(*arguments):
    return CliRunner().invoke(cli.pseudolabel_app, [str(a) for a in arguments], catch_exceptions=False)


def process(*arguments) -> list[str]:
    return [sys.executable, "-c", "from namedmask.__main__ import main_pseudolabel as m; m()", *map(str, arguments)]


def masks_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "masks").iterdir())}


@pytest.fixture(scope="module")
def world(tmp_path_factory, detector_options):
    """A folder of photos, embeddings of them, and a finished run: (options, run folder)."""
    root = tmp_path_factory.mktemp("world")
    names = draw_photos(root / "photos", PHOTOS)
    embeddings = write_embeddings(root / "embeddings.safetensors", names)
    options = [root / "photos", "--categories", "cat,dog", "--embeddings", embeddings, *detector_options]
    result = invoke(*options, "--out", root / "out")
    assert result.exit_code == 0, result.output
    return options, root / "out"


def test_every_retrieved_photo_has_a_mask(world):
    _, out = world
    archive = read_archive(out / "archive.json")
    assert archive.categories == ["cat", "dog"]
    expected = {(entry.photo, name) for name in archive.categories for entry in archive.photos[name]}
    records = list(read_masks(out / "masks"))
    assert {(r.photo, r.category) for r in records} == expected and len(records) == len(expected)
    assert sum(r.photo == "cat0000.jpg" for r in records) == 2  # retrieved for both names, computed once
    for record in records:
        mask = record.mask()
        assert mask.shape == Image.open(world[0][0] / record.photo).size[::-1]
        assert mask.sum() == record.area and 0 <= record.score <= 1
    assert any(record.area for record in records)
    assert (out / "report.html").stat().st_size > 10_000 and list(read_errors(out / "errors.jsonl")) == []


def test_archive_is_sorted_by_score(world):
    archive = read_archive(world[1] / "archive.json")
    for name in COLORS:
        entries = archive.photos[name]
        assert [e.score for e in entries] == sorted((e.score for e in entries), reverse=True)
        assert all(entry.photo.startswith(name) for entry in entries[: PHOTOS // 2])


def test_runs_are_bit_identical_with_any_number_of_workers(world, tmp_path):
    options, out = world
    assert invoke(*options, "--out", tmp_path / "again").exit_code == 0
    assert masks_of(tmp_path / "again") == masks_of(out)
    done = subprocess.run(process(*options, "--out", tmp_path / "two", "--workers", 2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert masks_of(tmp_path / "two") == masks_of(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_resumes_bit_identically(world, tmp_path, workers):
    """By one worker, however many there were."""
    options, out = world
    command = process(*options, "--out", tmp_path / "out", "--workers", workers)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("masks/0*.jsonl")) and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)  # only the parent: its workers must end by themselves
    assert run.returncode == -signal.SIGKILL
    assert invoke(*options, "--out", tmp_path / "out").exit_code == 0
    assert masks_of(tmp_path / "out") == masks_of(out)
    assert not list((tmp_path / "out").rglob(".tmp-*"))


def test_shard_of_a_dead_worker_is_recomputed(world, tmp_path):
    options, out = world
    command = process(*options, "--out", tmp_path / "out", "--workers", 2)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        while not (tmp_path / "out" / "masks").exists() and run.poll() is None:
            time.sleep(0.01)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert masks_of(tmp_path / "out") == masks_of(out)


def test_runs_under_torchrun(world, tmp_path):
    options, out = world
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*torchrun, *process(*options, "--out", tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert masks_of(tmp_path / "out") == masks_of(out)


def test_finished_run_is_not_recomputed(world):
    options, out = world
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} | {
        path: path.stat().st_mtime_ns for path in (out / "masks").iterdir()
    }
    assert invoke(*options, "--out", out).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_changed_settings_raise_with_the_difference_unless_overwritten(world, tmp_path):
    options, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    result = invoke(*options, "--out", copy, "--tau", 0.3)
    assert result.exit_code == 2 and "detector.tau: 0.2 -> 0.3" in result.stderr and "--overwrite" in result.stderr
    assert masks_of(copy) == masks_of(out)
    assert invoke(*options, "--out", copy, "--tau", 0.3, "--overwrite").exit_code == 0
    assert masks_of(copy) != masks_of(out)


def test_omitted_options_are_those_of_the_run(world, tmp_path):
    """In commands of one and of several stages, with and without PHOTOS, with and without --overwrite."""
    options, _ = world
    out = tmp_path / "out"
    assert invoke(*options, "--out", out, "--tau", 0.3, "--set", "refine.sigma_spatial=7").exit_code == 0
    expected = masks_of(out)
    for again in (invoke(*options, "--out", out), invoke("--out", out), command("pseudolabel", out)):
        assert again.exit_code == 0, again.output
    assert command("pseudolabel", out, "--overwrite").exit_code == 0
    assert masks_of(out) == expected and read_config(out).detector.tau == 0.3
    assert read_config(out).refine.sigma_spatial == 7


def test_overwrite_removes_dependent_results(world, tmp_path):
    _, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    result = command("archive", copy, "--categories", "dog")
    assert result.exit_code == 2 and "categories: ['cat', 'dog'] -> ['dog']" in result.stderr
    assert command("archive", copy, "--categories", "dog", "--overwrite").exit_code == 0
    assert not (copy / "masks").exists() and not (copy / "report.html").exists()
    assert read_archive(copy / "archive.json").categories == ["dog"]


def test_incomplete_index_raises_user_error(world, tmp_path):
    _, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    (copy / "archive.json").unlink()
    (copy / "index" / "00000.safetensors").unlink()
    result = command("archive", copy)
    assert result.exit_code == 2 and "is not finished; run `namedmask index" in result.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_exits_with_code_130(world, tmp_path, workers):
    command = process(*world[0], "--out", tmp_path / "out", "--workers", workers)
    # Shells make background processes ignore SIGINT; the tests may run in the background.
    restore_sigint = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=restore_sigint
    ) as run:
        while not (tmp_path / "out" / "index").exists() and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate()
    endings = ("namedmask: interrupted\n", "; run the same command again to continue\n")  # the first in an import
    assert run.returncode == 130 and errors.endswith(endings) and "Traceback" not in errors, errors


def test_invalid_run_folder_is_reported_in_one_line(world, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = invoke(*world[0], "--out", out)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("namedmask: ")
    result = command("pseudolabel", tmp_path / "typo")
    assert result.exit_code == 2 and "is not a run folder" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_run_after_an_empty_photo_folder_was_filled(world, tmp_path):
    options = world[0]
    (tmp_path / "photos").mkdir()
    run = lambda: invoke(tmp_path / "photos", *options[1:], "--out", tmp_path / "out")  # noqa: E731
    assert "there are no photos" in run().stderr
    (tmp_path / "photos" / "cat0000.jpg").write_bytes((options[0] / "cat0000.jpg").read_bytes())
    assert run().exit_code == 0


def test_concurrent_run_in_the_same_folder_raises(world):
    import fcntl

    options, out = world
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = invoke(*options, "--out", out)
    assert result.exit_code == 2 and "in use by another run" in result.stderr


def test_invalid_files_are_listed_in_errors(tmp_path, detector_options):
    """Class folders, without CLIP or embeddings: 20 valid photos and 20 invalid files."""
    valid = draw_photos(tmp_path / "photos" / "things", 17)
    for name in ("a 'quoted' \"name\".jpg", "new\nline.jpg", os.fsdecode(b"\xff\xfe.jpg")):
        draw_photo(1, "cat").save(tmp_path / "photos" / "things" / name)
        valid.append(name)
    bad = tmp_path / "photos" / "bad"
    bad.mkdir()
    data = (tmp_path / "photos" / "things" / valid[0]).read_bytes()
    for i in range(4):
        (bad / f"empty{i}.jpg").touch()
        (bad / f"cut{i}.jpg").write_bytes(data[: len(data) // 2 + i])
        (bad / f"text{i}.jpg").write_text("<html>not found</html>" * (i + 1))
        (bad / f"noise{i}.png").write_bytes(np.random.default_rng(i).bytes(500))
        (bad / f"gone{i}.webp").symlink_to("nowhere")
    result = invoke(tmp_path / "photos", "--out", tmp_path / "out", *detector_options)
    assert result.exit_code == 0, result.output
    assert {r.photo for r in read_masks(tmp_path / "out" / "masks")} == {f"things/{name}" for name in valid}
    errors = list(read_errors(tmp_path / "out" / "errors.jsonl"))
    assert {e.photo for e in errors} == {f"bad/{p.name}" for p in bad.iterdir()} and len(errors) == 20
    assert "20 masks in" in result.output and "photos and folders that could not be used: 20, see" in result.output


def test_no_valid_photo_exits_with_code_3(tmp_path, detector_options):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "empty.jpg").touch()
    assert invoke(tmp_path / "photos", "--out", tmp_path / "out", *detector_options).exit_code == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tau", "7"], "detector.tau (--tau): expected at most 1, got 7.0"),
        (["--set", "refine.name=pramr"], "'pamr' or 'none', got 'pramr'; did you mean 'pamr'?"),
        (["--categories", "cat,yak"], "has no text embedding of yak"),
        (["--categories", "cat,cat"], "the name 'cat' is listed twice"),
        (["--categories", ","], "no category name was given"),
        (["--embeddings", "none.safetensors"], "none.safetensors"),
        (["--backbone", "vit_huge"], "'vit_huge' is no timm model"),
        (["--gpus", "64"], "--gpus 64: this machine has"),
    ],
)
def test_user_errors_are_reported_in_one_line(world, tmp_path, change, message):
    result = invoke(*world[0], "--out", tmp_path / "out", *change)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.startswith("namedmask: ") and result.stderr.count("\n") == 1


def test_worker_error_is_reported_once(world, tmp_path):
    options = [*world[0], "--out", tmp_path / "out", "--workers", 2, "--backbone", "resnet18"]
    done = subprocess.run(process(*options), capture_output=True, text=True)
    assert done.returncode == 2 and "is not a ViT" in done.stderr


def test_photos_without_embeddings_and_empty_folders(world, tmp_path):
    options, _ = world
    draw_photo(99, "cat").save(tmp_path / "stranger.jpg")
    result = invoke(tmp_path, *options[1:], "--out", tmp_path / "out")
    assert result.exit_code == 3 and "no photo in" in result.stderr
    assert [e.photo for e in read_errors(tmp_path / "out" / "errors.jsonl")] == ["stranger.jpg"]
    (tmp_path / "none").mkdir()
    result = invoke(tmp_path / "none", *options[1:], "--out", tmp_path / "out2")
    assert result.exit_code == 2 and "there are no photos in" in result.stderr


def test_single_stages_equal_the_whole_command(world, tmp_path, detector_options):
    options, out = world
    staged = tmp_path / "out"
    assert command("index", options[0], "--out", staged, "--embeddings", options[4]).exit_code == 0
    assert command("archive", staged, "--categories", "cat,dog").exit_code == 0
    assert command("pseudolabel", staged, *detector_options).exit_code == 0
    assert command("report", staged).exit_code == 0
    assert masks_of(staged) == masks_of(out)
    assert json.loads((staged / "archive.json").read_bytes()) == json.loads((out / "archive.json").read_bytes())


def peak_memory(*arguments) -> int:
    """Peak resident memory of the command in KiB, reported by itself: wait4 would include the parent's memory."""
    code = (
        "import atexit, re, namedmask.cli as c, namedmask.estimate as e\n"
        "e.LONG['cpu'] = 10**9\n"  # no estimate, whose memory is its own
        "atexit.register(lambda: print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]))\n"
        "c.pseudolabel_app()"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_number_of_photos(tmp_path, detector_options):
    photo = tmp_path / "photo.jpg"
    draw_photo(0, "cat", (160, 120)).save(photo)  # its pixels take 58 kB: 1,800 more of them would be noticed
    peaks = []
    for count in (200, 2000):
        folder = tmp_path / f"photos{count}" / "cat"
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i:05}.jpg").hardlink_to(photo)
        options = [folder.parent, "--out", tmp_path / f"out{count}", *detector_options, "--image-size", 32]
        peaks.append(peak_memory(*options))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_cluster_vote_with_two_backbones(tmp_path, detector_options, backbone_weights):
    names = draw_photos(tmp_path / "photos" / "things", 3)
    voting = ["--detector", "cluster-vote", "--more-backbones", f"vit_tiny_patch16_224={backbone_weights}"]
    result = invoke(tmp_path / "photos", "--out", tmp_path / "out", *detector_options, *voting)
    assert result.exit_code == 0, result.output
    records = list(read_masks(tmp_path / "out" / "masks"))
    assert {r.photo for r in records} == {f"things/{name}" for name in names}
    assert all(0 <= r.score <= 1 for r in records)
    settings = (tmp_path / "out" / "run.toml").read_text()
    assert 'name = "cluster-vote"' in settings and str(backbone_weights) in settings


def test_edited_run_toml_is_ignored(world, tmp_path):
    """run.toml is only for reading. The settings that masks were made with are in the record and the report."""
    _, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    toml = (copy / "run.toml").read_text()
    assert "tau = 0.2" in toml and "[refine.crf]" in toml
    (copy / "run.toml").write_text(
        toml.replace("tau = 0.2", "tau = 0.7").replace("confidence = 0.999", "confidence = 0.6")
    )
    assert command("report", copy).exit_code == 0
    assert "tau = 0.2" in (copy / "report.html").read_text() and "0.6" not in read_config(copy).model_dump_json()
    assert command("pseudolabel", copy).exit_code == 0
    assert (copy / "run.toml").read_text() == toml and masks_of(copy) == masks_of(out)


def test_set_and_config_reach_settings_without_an_option(world, tmp_path):
    options, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    changed = command("pseudolabel", copy, "--set", "refine.smoothness=64")
    assert changed.exit_code == 2 and "refine.smoothness: 256.0 -> 64.0" in changed.stderr
    assert command("pseudolabel", copy, "--set", "refine.smoothness=64", "--overwrite").exit_code == 0
    assert masks_of(copy) != masks_of(out)
    # The run.toml of one run configures another; --set overrides --config, an option overrides --set.
    result = invoke(
        *options, "--out", tmp_path / "other", "--config", copy / "run.toml", "--set", "detector.tau=0.5", "--tau", 0.2
    )
    assert result.exit_code == 0 and masks_of(tmp_path / "other") == masks_of(copy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "refine.crf.confidance=0.9"], "did you mean 'refine.crf.confidence'?"),
        (["--set", "tau=0.3"], "did you mean 'detector.tau'?"),
        (["--set", "refine.crf.confidence=2"], "refine.crf.confidence: expected below 1, got 2.0"),
        (["--set", "segmenter.steps=9"], "this command does not read it"),
        (["--set", "detector.tau"], "expected NAME=VALUE"),
        (["--refine", "bilatral"], "bilatral"),
        (["--tau", "x"], "detector.tau (--tau): expected a valid number"),
    ],
)
def test_invalid_settings_suggest_the_nearest(world, tmp_path, words, message):
    result = command("pseudolabel", world[1], *words)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_invalid_config_file_is_reported_in_one_line(world, tmp_path):
    file = tmp_path / "settings.toml"
    for text, message in (("tau = 0.3", "no setting 'tau'; did you mean 'detector.tau'?"), ("x = ", "settings.toml")):
        file.write_text(text)
        result = command("pseudolabel", world[1], "--config", file)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_photos_and_weights_may_be_moved(world, tmp_path):
    options, out = world
    moved = tmp_path / "moved"
    moved.mkdir()
    subprocess.run(["cp", "-r", out, moved / "out"], check=True)
    subprocess.run(["cp", "-r", options[0], moved / "photos"], check=True)
    weights = moved / "vit.safetensors"
    weights.write_bytes(Path(options[options.index("--backbone-weights") + 1]).read_bytes())
    (moved / "out" / "masks" / "00001.jsonl").unlink()
    result = command("pseudolabel", moved / "out", "--photos", moved / "photos", "--backbone-weights", weights)
    assert result.exit_code == 0, result.stderr
    assert masks_of(moved / "out") == masks_of(out)
    good = weights.read_bytes()
    weights.write_bytes(good + b" ")
    result = command("pseudolabel", moved / "out", "--backbone-weights", weights)
    weights.write_bytes(good)
    assert result.exit_code == 2 and "(different content)" in result.stderr
    (tmp_path / "others").mkdir()
    draw_photo(0, "cat").save(tmp_path / "others" / "other.jpg")
    result = command("pseudolabel", moved / "out", "--photos", tmp_path / "others")
    assert result.exit_code == 2 and "lacks most of them" in result.stderr
    result = command("pseudolabel", moved / "out", "--photos", tmp_path / "others", "--overwrite")
    assert result.exit_code == 2 and "lacks most of them" in result.stderr  # the archive stays, so the photos must


def test_photos_may_change_while_there_are_no_results(world, tmp_path):
    options, out = world
    (tmp_path / "others").mkdir()
    draw_photo(0, "cat").save(tmp_path / "others" / "other.jpg")
    result = invoke(tmp_path / "others", *options[1:], "--out", tmp_path / "out")  # they have no embeddings
    assert result.exit_code == 3 and (tmp_path / "out" / "index" / "photos.jsonl").exists()
    assert invoke(*options, "--out", tmp_path / "out").exit_code == 0
    assert masks_of(tmp_path / "out") == masks_of(out)


def test_settings_may_change_while_there_are_no_results(world, tmp_path):
    options, out = world
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"not weights")
    index = options.index("--backbone-weights") + 1
    for file in (tmp_path / "missing.safetensors", wrong):
        changed = [*options[:index], file, *options[index + 1 :]]
        assert invoke(*changed, "--out", tmp_path / "out").exit_code == 2
    assert invoke(*options, "--out", tmp_path / "out").exit_code == 0
    assert masks_of(tmp_path / "out") == masks_of(out)


def test_files_of_the_user_are_neither_continued_nor_removed(world, tmp_path):
    """Ground truth in a folder `masks`, with and without --overwrite."""
    truth = tmp_path / "out" / "masks" / "truth.png"
    truth.parent.mkdir(parents=True)
    truth.write_bytes(b"precious")
    for words in ([], ["--overwrite"]):
        result = invoke(*world[0], "--out", tmp_path / "out", *words)
        assert result.exit_code == 2 and "was not made by a run" in result.stderr
        assert truth.read_bytes() == b"precious" and not (tmp_path / "out" / "index").exists()


def test_each_stage_keeps_the_record_of_what_it_was_made_with(world, tmp_path):
    """Versions and device too: another machine that continues a run does not claim to have made its masks."""
    options, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    record = read_record(copy)
    for stage in record.stages.values():
        stage.made_with["device"] = "another machine"
    record.write(copy)
    assert invoke(*options, "--out", copy).exit_code == 0
    assert {s.made_with["device"] for s in read_record(copy).stages.values()} == {"another machine"}
    assert (
        "another machine" in (copy / "report.html").read_text() and "another machine" in (copy / "run.toml").read_text()
    )
    assert command("pseudolabel", copy, "--overwrite").exit_code == 0
    stages = read_record(copy).stages
    assert stages["index"].made_with["device"] == "another machine" != stages["pseudolabel"].made_with["device"]


def test_results_of_removed_results_raise(world, tmp_path):
    """Experts' masks, whose own masks were removed by hand and made again with other settings."""
    _, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    run.settle(copy, {}, ["experts"])
    (copy / "refined").mkdir()
    (copy / "refined" / "00000.jsonl").touch()
    assert "detector.tau" in read_record(copy).stages["experts"].upstream
    shutil.rmtree(copy / "masks")
    run.settle(copy, {}, ["train"])
    assert "detector.tau" not in read_record(copy).stages["train"].upstream
    assert command("pseudolabel", copy, "--tau", 0.5).exit_code == 0
    result = command("experts", copy)
    assert result.exit_code == 2 and "refined was made with other settings: detector.tau: 0.2 -> 0.5" in result.stderr


def test_weights_of_a_finished_stage_may_be_gone(world, tmp_path):
    """A stage does not read the files of earlier stages, so they may have changed or be gone."""
    options, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    embeddings = Path(options[options.index("--embeddings") + 1])
    content = embeddings.read_bytes()
    try:
        embeddings.write_bytes(content + b" ")
        assert command("pseudolabel", copy).exit_code == 0
        embeddings.unlink()
        assert command("pseudolabel", copy, "--overwrite").exit_code == 0
    finally:
        embeddings.write_bytes(content)
    assert masks_of(copy) == masks_of(out)


def test_nothing_is_removed_before_everything_is_checked(world, tmp_path):
    _, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    missing = tmp_path / "missing.safetensors"
    (tmp_path / "others").mkdir()
    draw_photo(0, "cat").save(tmp_path / "others" / "other.jpg")
    for words in (["--backbone-weights", missing], ["--photos", tmp_path / "others"]):
        assert command("pseudolabel", copy, *words, "--overwrite").exit_code == 2
    result = command("archive", copy, "--photos", tmp_path / "others", "--overwrite")  # its index is of the old photos
    assert result.exit_code == 2 and "lacks most of them" in result.stderr
    assert masks_of(copy) == masks_of(out)


def test_errors_alone_are_no_results(world, tmp_path):
    """As a kill between the two files of the first shard leaves them."""
    _, out = world
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", out, copy], check=True)
    for shard in (copy / "masks").glob("*[0-9].jsonl"):
        shard.unlink()
    assert command("pseudolabel", copy, "--tau", 0.3).exit_code == 0
