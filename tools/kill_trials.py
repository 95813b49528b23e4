# SPDX-License-Identifier: MIT
"""Kills commands at random times, runs them again, and compares every byte with those of an uninterrupted run.

    python tools/kill_trials.py --trials 20 --seed 0

The commands are `run`, `experts` and `train`, `run --update` and `experts` after it, and `segment`, each with one and
with two workers, on 24 small synthetic photos. A trial sends SIGKILL, SIGTERM or SIGINT (Ctrl-C) to the command or,
if it has workers, to one of them, at a random time between its start and the usual end. It then counts

- survivors: processes of the command that still run 5 seconds after it has ended
- messages: commands that answered SIGTERM or SIGINT by something else than one line and exit code 143 or 130
- losses: files that are missing or differ after the command was run again
- litter: temporary files after the command was run again

Requires Linux. Exits with 1 if any of the four is not 0.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "pipeline"))
from small_world import draw_photos, write_embeddings

PHOTOS = 24
# The order of settings, times and running means differ between runs with the same results.
IGNORED = {"run.toml", "stages.json", "metrics.jsonl", "checkpoint.pt", ".lock"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Case(NamedTuple):
    """A command.

    Attributes:
        name: Of its output folders.
        workers: Number of workers.
        words: The command with its arguments, but --out or OUT.
        before: The folder of the run that it continues.
    """

    name: str
    workers: int
    words: tuple[str, ...]
    before: str | None


class World:
    """Photos, weights and embeddings in a folder, and the finished output of every command."""

    def __init__(self, folder: Path):
        self.folder = folder
        names = draw_photos(folder / "photos", PHOTOS)
        embeddings = write_embeddings(folder / "embeddings.safetensors", names)
        backbone, encoder = folder / "vit.safetensors", folder / "encoder.safetensors"
        _write_weights(backbone, encoder)
        photos, fewer = str(folder / "photos"), folder / "fewer photos"
        fewer.mkdir()
        for name in names[: PHOTOS // 4] + names[PHOTOS // 2 :]:
            (fewer / name).hardlink_to(folder / "photos" / name)
        detector = ("--backbone", "vit_tiny_patch16_224", "--backbone-weights", str(backbone), "--image-size", "96")
        label = ("--embeddings", str(embeddings), *detector, "--set", "pseudolabel.shard_size=2")
        label += ("--set", "index.shard_size=4", "--photos-per-category", "16")
        everything = ("run", photos, "--categories", "cat,dog", *label)
        training = ("--encoder", "test_resnet", "--encoder-weights", str(encoder), "--head-channels", "16")
        training += ("--crop-size", "48", "--batch-size", "4", "--steps", "60")
        self.seconds: dict[Case, float] = {}
        self.make(Case("small", 1, ("run", str(fewer), "--categories", "cat", *label), None))
        self.make(Case("small-experts", 1, ("experts", *training), "small-1"))
        self.make(Case("grown", 1, (*everything, "--update"), "small-experts-1"))
        self.cases = [
            self.make(Case(name, workers, words, before))
            for workers in (1, 2)
            for name, words, before in (
                ("run", everything, None),
                ("experts", ("experts", *training), "run-1"),
                ("train", ("train", *training), "run-1"),
                ("update", (*everything, "--update"), "small-1"),
                ("update-experts", ("experts", *training), "grown-1"),
                ("segment", ("segment", str(folder / "train-1" / "segmenter"), photos), None),
            )
        ]
        for name, other in (("update", "run"), ("update-experts", "experts")):
            found, expected = (digests(folder / f"{one}-1") for one in (name, other))
            if found | {"report.html": ""} != expected | {"report.html": ""}:  # it shows that there was an update
                raise SystemExit(f"the results of {name} differ from those of {other}")

    def make(self, case: Case) -> Case:
        """Runs a case to its end."""
        start = time.monotonic()
        done = subprocess.run(self.command(case, self.finished(case)), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case.name} failed: {done.stderr}")
        self.seconds[case] = time.monotonic() - start
        return case

    def finished(self, case: Case) -> Path:
        return self.folder / f"{case.name}-{case.workers}"

    def command(self, case: Case, out: Path) -> list[str]:
        """The command line of a case; puts into `out` what the command starts from."""
        if case.before and not out.exists():
            shutil.copytree(self.folder / case.before, out)
        command, *arguments = case.words
        where = [str(out)] if command in ("experts", "train") else ["--out", str(out)]
        words = [sys.executable, "-m", "namedmask", command, *where, *arguments]
        return [*words, "--workers", str(case.workers)]


def _write_weights(backbone: Path, encoder: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    from namedmask.backbones import untrained_encoder

    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), backbone)
    save_file(untrained_encoder("test_resnet").network.state_dict(), encoder)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of the files of an output folder that depend on photos and settings alone."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in IGNORED]
    names = {str(path.relative_to(out)): path for path in files if "tensorboard" not in path.parts}
    replaced = {name: path.read_bytes().replace(out.name.encode(), b"OUT") for name, path in names.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in replaced.items()}


def processes_of(out: Path) -> list[int]:
    """The processes whose command line holds the path of the folder, except this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(out) in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def trial(world: World, case: Case, signum: int, to_worker: bool, after: float) -> collections.Counter:
    """One trial; returns how often each of its four counts occurred, and what was hit."""
    counts: collections.Counter = collections.Counter(trials=1)
    out = world.folder / "trial"
    shutil.rmtree(out, ignore_errors=True)
    command = world.command(case, out)
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # ignored in background jobs
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore,
    ) as run:
        time.sleep(after)
        workers = [pid for pid in processes_of(out) if pid != run.pid]
        target = random.choice(workers) if to_worker and workers else run.pid
        try:
            if run.poll() is None:
                os.kill(target, signum)
                counts["hit a worker" if target != run.pid else "hit the command"] += 1
            else:
                counts["finished before"] += 1
        except ProcessLookupError:
            counts["finished before"] += 1
        _, errors = run.communicate()
    lines = errors.splitlines()
    answered = run.returncode == 128 + signum and len(lines) == 1 and lines[0].startswith("namedmask: ")
    if target == run.pid and signum != signal.SIGKILL and run.returncode and not answered:
        counts["messages"] += 1
        print(f"{case.name}, {signal.Signals(signum).name}, exit code {run.returncode}:\n{errors}")
    deadline = time.monotonic() + 5
    while (left := processes_of(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    counts["survivors"] += len(left)
    done = subprocess.run(world.command(case, out), capture_output=True, text=True)
    expected, found = digests(world.finished(case)), digests(out)
    litter = [name for name in found if "/.tmp-" in f"/{name}"]
    different = [name for name in {*expected, *found} - {*litter} if expected.get(name) != found.get(name)]
    counts["litter"] += len(litter)
    counts["losses"] += len(different) + (done.returncode != 0)
    if different or done.returncode:
        print(f"{case.name}: exit code {done.returncode}, differ: {different[:5]}\n{done.stderr}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # trainings are reproducible for a number of threads
    random.seed(arguments.seed)
    table: dict[str, collections.Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for number in range(arguments.trials):
            case, signum = world.cases[number % len(world.cases)], random.choice(SIGNALS)
            to_worker = case.workers > 1 and random.random() < 0.5
            after = random.random() * world.seconds[case]
            key = f"{case.name}, {case.workers} worker{'s' if case.workers > 1 else ''}"
            counts = trial(world, case, signum, to_worker, after)
            table.setdefault(key, collections.Counter()).update(counts)
            what = ", ".join(name for name, count in counts.items() if count and name != "trials")
            print(f"{number}: {key}, {signal.Signals(signum).name} after {after:.1f} s: {what}", flush=True)
    columns = ("trials", "hit the command", "hit a worker", "finished before")
    columns += (faults := ("survivors", "messages", "losses", "litter"))
    print(f"\n| Command | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for key, counts in table.items():
        print(f"| {key} | {' | '.join(str(counts[column]) for column in columns)} |")
    sys.exit(any(counts[fault] for counts in table.values() for fault in faults))


if __name__ == "__main__":
    main()
