# SPDX-License-Identifier: MIT
"""A run and its folder: the lock, the check of settings, the stages in their order, one process or many.

run.toml  index/  archive.json  masks/  errors.jsonl  experts/  refined/  segmenter/  report.html
(each described where it is made)
"""

from __future__ import annotations

import fcntl
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import __version__, distributed
from .archive import Archive, Retrieved, prompts, read_archive, search_index, write_archive
from .config import RunConfig, differences, make_config, read_config, write_config
from .distributed import Worker
from .errors import UserError
from .files import TEMPORARY_PREFIX, remove_stale
from .masks import ErrorRecord, assemble_errors, errors_path, read_errors, read_masks, write_errors
from .photos import PhotoSource

STAGES = ("index", "archive", "pseudolabel", "experts", "report", "train")

# The settings that each stage reads, and where what it makes lies. What a stage makes depends on its own settings and
# on those of the stages before it; they may change until it is there.
SETTINGS = {
    "index": ("photos", "index"),
    "archive": ("categories", "archive"),
    "pseudolabel": ("shard_size", "keep_detected", "detector", "refine"),
    "experts": ("experts",),
    "report": (),
    "train": ("segmenter",),
}
MADE = {
    "index": ["index"],
    "archive": ["archive.json"],
    "pseudolabel": ["masks", "detected"],
    "experts": ["experts", "refining", "refined"],
    "report": ["report.html"],
    "train": ["segmenter"],
}
TIDIED = ("index", "masks", "detected", "experts", "refining", "segmenter")  # where a killed run may leave half a file


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the run folder for this process; a second run in it is refused. The lock goes with the process."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by another run; wait for it or choose another --out") from None
        yield


def prepare(out: Path, given: dict, stages: Sequence[str], overwrite: bool) -> RunConfig:
    """Settles the settings of a run folder and writes run.toml.

    A stage that is to run takes the settings `given` (nested) over the defaults where the photos are given too, as a
    whole command does, else over those of run.toml; other stages keep those of run.toml. With `overwrite` what the
    stages have made, and what was made from it, is removed first.
    Raises UserError, with each difference, where something there was made with other settings.
    """
    old = read_config(out / "run.toml") if (out / "run.toml").exists() else None
    kept = old.model_dump(exclude_none=True) if old else {}
    if "photos" in given:
        kept = {key: kept[key] for key in kept if not any(key in SETTINGS[stage] for stage in stages)}
    config = make_config(_merged(kept, given))
    open_source(config)
    if "archive" in stages and not config.categories and not Path(config.photos).is_dir():
        raise UserError(f"{config.photos} is no folder of class folders: give --categories or --categories-file")
    if duplicates := sorted({c for c in config.categories if config.categories.count(c) > 1}):
        raise UserError(f"--categories: {', '.join(duplicates)} stands there more than once")
    if config.index.embeddings and config.index.clip_weights:
        raise UserError("give --embeddings or --clip-weights, not both")
    if overwrite:
        for stage in STAGES[min(map(STAGES.index, stages)) :]:
            for name in MADE[stage]:
                remove(out / name)
    changed = differences(old, config) if old else []
    for number, stage in enumerate(STAGES):
        if stage == "report":  # of whatever is there, and made anew each time
            continue
        read = [key for before in STAGES[: number + 1] for key in SETTINGS[before]]
        clashes = [line for line in changed if line.split(":")[0].split(".")[0] in read]
        made = [out / name for name in MADE[stage] if (out / name).exists()]
        if clashes and made:
            raise UserError(
                f"{made[0]} was made with other settings: {'; '.join(clashes)} (give the old ones, choose "
                "another --out, or start anew with --overwrite)"
            )
    write_config(out / "run.toml", config, made_with())
    return config


def made_with() -> dict[str, str]:
    """Versions and device, for run.toml."""
    import numpy
    import PIL
    import timm
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {
        "namedmask": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "device": device,
    }


def open_source(config: RunConfig) -> PhotoSource:
    try:
        return PhotoSource(config.photos)
    except ValueError as error:
        raise UserError(str(error)) from None


def start(out: Path, given: dict, stages: Sequence[str], workers: int, gpus: int | None, overwrite: bool) -> bool:
    """Runs stages of the run folder `out` with the settings `given` over those it has; progress goes to the terminal.

    workers: processes on the CPU; gpus: processes with a GPU each instead (None: one if there is one).
    Under torchrun or SLURM this process is one of many already and takes its place among them.
    Returns False when masks were to be made and there is not one.
    """
    if "photos" not in given and not (out / "run.toml").exists():
        read_config(out / "run.toml")  # says that this is no run's folder, before one is made
    gpus = distributed.count_gpus(gpus, workers)
    device = "cuda" if gpus else "cpu"
    worker = distributed.current()
    if not worker.is_main:
        worker.barrier("prepared")
        work(out, stages, worker, device)
        return True
    with locked(out):
        try:
            prepare(out, given, stages, overwrite and worker.attempt == 0)
        except UserError as error:
            worker.fail(str(error))
            raise
        worker.barrier("prepared")
        if worker.count > 1 or max(workers, gpus) == 1:
            work(out, stages, worker, device)
        else:
            _start_workers(out, stages, gpus or workers, device)
    if "train" in stages:
        print(f"the segmenter is in {out / 'segmenter'}")
    if "experts" in stages:
        print(f"the experts' masks are in {out / 'refined'}")
    return "pseudolabel" not in stages or _summarize(out, "report" in stages)


def _summarize(out: Path, report: bool) -> bool:
    """Says what a finished run has made; returns whether there are masks."""
    masks = sum(1 for _ in read_masks(out / "masks"))
    errors = sum(1 for _ in read_errors(out / "errors.jsonl"))
    failed = f"; {errors} that could not be used are in {out / 'errors.jsonl'}" if errors else ""
    print(f"{masks} masks in {out / 'masks'}{failed}")
    if report:
        print(f"look at {out / 'report.html'}")
    return masks > 0


def _start_workers(out: Path, stages: Sequence[str], count: int, device: str) -> None:
    failure = out / ".failed"
    failure.unlink(missing_ok=True)
    try:
        distributed.launch([str(out), device, *stages], count)
    except UserError:
        if failure.exists():  # a worker has said what is wrong, and it will not mend by itself
            raise UserError(failure.read_text()) from None
        raise


def work(out: Path, stages: Sequence[str], worker: Worker, device: str) -> None:
    """This worker's part of the stages. device: "cpu" or "cuda"."""
    from .progress import Progress

    try:
        device = worker.device(device)
        config = read_config(out / "run.toml")
        source = open_source(config)
        if "archive" in stages and (not config.categories or (out / "archive.json").exists()):
            stages = [stage for stage in stages if stage != "index"]  # class folders, or searched already
        for folder in (out, *(out / name for name in TIDIED)):
            if worker.is_main and folder.is_dir():
                remove_stale(folder)
        for stage in stages:
            worker.barrier(f"before {stage}")
            with Progress(stage, worker) as progress:
                RUN[stage](out, config, source, worker, device, progress)
        worker.barrier("end")
    except Exception as error:
        worker.fail(str(error))
        raise


def _index(out: Path, config: RunConfig, source: PhotoSource, worker: Worker, device: str, progress) -> None:
    from .index import build_index, list_photos, read_photos

    folder = out / "index"
    folder.mkdir(exist_ok=True)
    if worker.is_main and not (folder / "photos.jsonl").exists():
        list_photos(source, folder)
        if next(read_photos(folder), None) is None:
            (folder / "photos.jsonl").unlink()
            raise UserError(f"there are no photos in {config.photos}")
    worker.barrier("photos are listed")
    progress.total = sum(1 for _ in read_photos(folder))
    build_index(source, folder, config.index, worker, device, progress.advance)
    worker.barrier("photos are indexed")


def _archive(out: Path, config: RunConfig, source: PhotoSource, worker: Worker, device: str, progress) -> None:
    from .index import make_embedder, missing_shards, read_photos

    if not worker.is_main or (out / "archive.json").exists():
        return
    if not config.categories:
        write_archive(out / "archive.json", _archive_of_folders(out, config, source))
        return
    folder = out / "index"
    if not (folder / "photos.jsonl").exists() or missing_shards(folder, config.index):
        raise UserError(f"{folder} is not finished; make it with `namedmask index {config.photos} --out {out}`")
    text = make_embedder(config.index, device).texts(config.categories, prompts())
    count = config.archive.photos_per_category
    archive = search_index(folder, config.categories, text, count, read_photos(folder))
    if not any(archive.photos.values()):
        raise UserError(f"no photo in {config.photos} could be embedded; see {out / 'index'}/*.errors.jsonl")
    write_archive(out / "archive.json", archive)


def _archive_of_folders(out: Path, config: RunConfig, source: PhotoSource) -> Archive:
    errors: list[ErrorRecord] = []
    try:
        folders = source.categories(lambda e: errors.append(ErrorRecord(e.photo, "list", e.reason)))
    except ValueError as error:
        raise UserError(str(error)) from None
    if not folders:
        raise UserError(f"there are no photos in the folders of {config.photos}")
    (out / "index").mkdir(exist_ok=True)
    write_errors(errors_path(out / "index" / "photos.jsonl"), errors)
    return Archive(list(folders), {name: [Retrieved(p, None) for p in photos] for name, photos in folders.items()})


def _pseudolabel(out: Path, config: RunConfig, source: PhotoSource, worker: Worker, device: str, progress) -> None:
    from .pseudolabel import pseudolabel, work_of

    archive = read_archive(out / "archive.json")
    (out / "masks").mkdir(exist_ok=True)
    progress.total = len(work_of(archive))
    labeler = pseudolabel(source, archive, out / "masks", config, worker, device, progress.advance)
    if labeler is not None:
        progress.note = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in labeler.seconds.items())
    worker.barrier("masks are made")
    if worker.is_main:
        if worker.count > 1:  # what a worker had claimed when it was lost, if the others did not start anew with it
            lost = lambda photos, found=False: None if found else progress.advance(photos)  # noqa: E731
            pseudolabel(source, archive, out / "masks", config, Worker(), device, lost)
        parts = [p for name in ("index", "masks") for p in sorted((out / name).glob("*.errors.jsonl"))]
        assemble_errors(out / "errors.jsonl", parts)


def _expect_masks(out: Path, config: RunConfig) -> None:
    """What learns from masks waits for all of them: made of some, it would be taken for finished ever after."""
    from .pseudolabel import missing_shards

    finished = (out / "refined").exists()  # made of all of them
    if not finished and missing_shards(read_archive(out / "archive.json"), out / "masks", config.shard_size):
        raise UserError(f"{out / 'masks'} is not finished; go on with `namedmask pseudolabel {out}`")


def _experts(out: Path, config: RunConfig, source: PhotoSource, worker: Worker, device: str, progress) -> None:
    from .experts import train_experts

    _expect_masks(out, config)
    train_experts(out, source, config.experts, worker, device, progress)
    if worker.is_main:
        parts = [p for name in ("index", "masks", "refined") for p in sorted((out / name).glob("*.errors.jsonl"))]
        assemble_errors(out / "errors.jsonl", parts)


def _report(out: Path, config: RunConfig, source: PhotoSource, worker: Worker, device: str, progress) -> None:
    from .report import write_report

    if worker.is_main:
        write_report(out)


def _train(out: Path, config: RunConfig, source: PhotoSource, worker: Worker, device: str, progress) -> None:
    from .segmenter.training import train_segmenter

    _expect_masks(out, config)
    train_segmenter(out, source, config.segmenter, worker, device, progress)


RUN: dict[str, Callable] = {
    "index": _index,
    "archive": _archive,
    "pseudolabel": _pseudolabel,
    "experts": _experts,
    "report": _report,
    "train": _train,
}


def _merged(settings: dict, given: dict) -> dict:
    result = dict(settings)
    for key, value in given.items():
        result[key] = _merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def remove(path: Path) -> None:
    """Removes a file or a folder; killed in the middle it leaves nothing that looks whole."""
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
        path.rename(doomed)
        if doomed.is_dir():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()


def _main() -> None:
    """A worker that `distributed.launch` has started: python -m namedmask.run OUT DEVICE STAGE..."""
    distributed.die_with_parent()
    out, device, *stages = sys.argv[1:]
    failure = Path(out) / ".failed"
    if failure.exists():  # what stopped one worker would stop this one too
        sys.exit(2)
    try:
        work(Path(out), stages, distributed.current(), device)
    except UserError as error:
        failure.write_text(str(error))
        sys.exit(2)
    except KeyboardInterrupt:  # the parent says it
        sys.exit(130)


if __name__ == "__main__":
    _main()
