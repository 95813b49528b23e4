# SPDX-License-Identifier: MIT
"""A run and its folder: the lock, its settings, its stages one after another, in one process or many.

run.toml  stages.json  index/  archive.json  masks/  errors.jsonl  saliency/  experts/  refined/  segmenter/
report.html  (each described where it is made)
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from . import __version__, distributed, hub, process
from .archive import expect_distinct, read_archive
from .config import RunConfig, make_config, merge, nest, to_toml
from .distributed import Worker
from .errors import UserError, explained
from .files import TEMPORARY_PREFIX, atomic_write, remove_stale
from .masks import read_errors, read_masks
from .photos import PhotoSource
from .record import FILE, RunRecord, read_config, read_record, stage_record
from .stages import STAGES, Context, Stage

CHECKED_PHOTOS = 1000  # of a run whose photos have moved


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the lock of a folder; a second process that asks for it gets a UserError. It ends with the process."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by another run; wait for it or choose another --out") from None
        yield


def settle(out: Path, given: dict, stages: Sequence[str], overwrite: bool = False) -> RunConfig:
    """Determines the settings of a run folder, records those of `stages` and writes run.toml.

    A setting is, in this order: the given one, if one of `stages` reads it; the one that the run has recorded; its
    default. While a stage has no results, its settings may change.

    Args:
        given: nested settings. Those that none of `stages` reads are ignored.
        stages: names of the stages that are to run.
        overwrite: remove the results of `stages`, and those made from them, first.

    Raises:
        UserError: existing results were made with other settings or other photos, or not by a run at all.
    """
    record, todo = read_record(out), [STAGES[name] for name in stages]
    sections = {section for stage in todo for section in stage.sections}
    recorded = nest({**record.settings(), "photos": record.photos})
    config = make_config(merge(recorded, {key: given[key] for key in given if key in sections | {"photos"}}))
    try:
        source = open_source(config.photos)
    except UserError as error:
        if "photos" in given:
            raise
        raise UserError(f"{error}; if the photos have moved, say where they are now (--photos)") from None
    _expect_categories(config, source, stages)
    hub.require(hub.needed(config, _without_results(out, config, todo, overwrite)))
    removed = _made_from(todo) if overwrite else []
    for stage in (one for one in todo if one.sections):
        _expect_ours(out, stage, record)
        old, has_results = record.stages.get(stage.name), stage.has_results(out)
        new = stage_record(config, stage.sections, record.digests)
        for earlier in stage.made_from:
            if earlier in record.stages and (STAGES[earlier] in todo or STAGES[earlier].has_results(out)):
                new.upstream |= record.stages[earlier].settings
                new.files |= record.stages[earlier].files
        differences = old.differences(new) if old else []
        if differences and has_results and not overwrite:
            raise UserError(
                f"{out / stage.outputs[0]} was made with other settings: {'; '.join(differences)} (leave these "
                "options out to continue with the old ones, use another run folder, or start over with --overwrite)"
            )
        if differences and not has_results:
            removed.append(stage)  # what an attempt with other settings has left behind
        new.made_with = old.made_with if old and has_results and not overwrite else made_with()
        record.stages[stage.name] = new
    if record.photos not in (None, config.photos):
        if not any(stage.has_results(out) for stage in STAGES.values()):
            removed.append(STAGES["index"])  # the list of the other photos
        elif not (overwrite and ("index" if config.categories else "archive") in stages):
            _expect_same_photos(out, source, record)
    for stage in removed:
        for name in stage.outputs:
            remove(out / name)
    record.photos = config.photos
    record.write(out)
    with atomic_write(out / "run.toml") as file:
        text = to_toml(config, {name: stage.made_with for name, stage in record.stages.items()})
        file.write(text.encode(errors="backslashreplace"))  # names that are not UTF-8
    return config


def _without_results(out: Path, config: RunConfig, todo: Sequence[Stage], overwrite: bool) -> set[str]:
    """Names of the stages that have all their work before them."""
    names = {stage.name for stage in todo if overwrite or not stage.has_results(out)}
    class_folders = not config.categories
    if class_folders or "archive" in {stage.name for stage in todo} - names:
        names.discard("index")  # the archive needs no embeddings, or exists
    return names - {"archive"} if class_folders else names


def _made_from(stages: Sequence[Stage]) -> list[Stage]:
    """The stages and those made from their results, last ones first: if their removal is interrupted, what is left was
    made from what is left."""
    names = {stage.name for stage in stages}
    return [stage for stage in reversed(STAGES.values()) if stage in stages or not names.isdisjoint(stage.made_from)]


def _expect_categories(config: RunConfig, source: PhotoSource, stages: Sequence[str]) -> None:
    if "archive" in stages and not config.categories and not Path(source.path).is_dir():
        raise UserError(f"{config.photos} is not a folder of class folders: pass --categories or --categories-file")
    expect_distinct(config.categories, "--categories")
    if config.index.embeddings and config.index.clip_weights:
        raise UserError("pass --embeddings or --clip-weights, not both")


def _expect_ours(out: Path, stage: Stage, record: RunRecord) -> None:
    """Files that no run has recorded may be the user's: neither continued nor removed."""
    if stage.name not in record.stages:
        for path in (out / name for name in stage.outputs):
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                raise UserError(
                    f"{path} exists and was not made by a run ({out / FILE} does not list it); move it away or use "
                    "another run folder"
                )


def _expect_same_photos(out: Path, source: PhotoSource, record: RunRecord) -> None:
    """A run can be continued where its photos have moved: they are known by their names below the photo folder."""
    from .index import read_photos

    names: Iterator[str] = iter(())
    if (out / "archive.json").exists():
        archive = read_archive(out / "archive.json")
        names = (entry.photo for entries in archive.photos.values() for entry in entries)
    elif (out / "index" / "photos.jsonl").exists():
        names = read_photos(out / "index")
    checked = list(islice(names, CHECKED_PHOTOS))
    missing = [name for name in checked if not source.exists(name)]
    if len(missing) > len(checked) / 2:
        raise UserError(
            f"{out} was made from the photos in {record.photos}, and {source.path} lacks most of them, such as "
            f"{missing[0]!r}: use another run folder, or start over with --overwrite"
        )


def made_with() -> dict[str, str]:
    """Versions and device, for the record."""
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


def open_source(photos: str | os.PathLike) -> PhotoSource:
    """The photos of a folder, list or tar; UserError if there are none."""
    try:
        return PhotoSource(photos)
    except ValueError as error:
        raise UserError(str(error)) from None


def start(
    out: Path, given: dict, stages: Sequence[str], workers: int = 1, gpus: int | None = None, overwrite: bool = False
) -> bool:
    """Runs stages of the run folder `out`; prints progress.

    Under torchrun or SLURM this process is one of many already and takes its place among them.

    Args:
        given: nested settings, as for `settle`.
        workers: number of processes on the CPU.
        gpus: number of processes with a GPU each, instead; None: one if there is a GPU.

    Returns:
        False if masks were to be made and there is none, else True.
    """
    if "photos" not in given:
        read_config(out)  # an error for what is not a run folder, before one is made
    gpus = distributed.count_gpus(gpus, workers)
    device = "cuda" if gpus else "cpu"
    worker = distributed.current()
    if not worker.is_main:
        worker.barrier("settled")
        work(out, stages, worker, device)
        return True
    if worker.count > 1:
        print(f"worker 0 of {worker.count}; waiting for the others", flush=True)
    with locked(out):
        try:
            settle(out, given, stages, overwrite and worker.attempt == 0)
        except UserError as error:
            worker.fail(str(error))
            raise
        worker.barrier("settled")
        if worker.count > 1 or max(workers, gpus) == 1:
            work(out, stages, worker, device)
        else:
            _start_workers(out, stages, gpus or workers, device)
    has_masks = "pseudolabel" not in stages or _print_counts(out)
    for stage in stages:
        if STAGES[stage].done:
            print(STAGES[stage].done.format(out=out))
    return has_masks


def _print_counts(out: Path) -> bool:
    """Prints how many masks a finished run has; returns whether there are any."""
    masks = sum(1 for _ in read_masks(out / "masks"))
    errors = sum(1 for _ in read_errors(out / "errors.jsonl"))
    failed = f"; photos that could not be used: {errors}, see {out / 'errors.jsonl'}" if errors else ""
    print(f"{masks} masks in {out / 'masks'}{failed}")
    return masks > 0


def _start_workers(out: Path, stages: Sequence[str], count: int, device: str) -> None:
    failure = out / ".failed"
    failure.unlink(missing_ok=True)
    try:
        distributed.launch([str(out), device, *stages], count)
    except UserError:
        if failure.exists():  # a worker has said what is wrong, and a restart would not help
            raise UserError(failure.read_text(encoding="utf-8", errors="surrogateescape")) from None
        raise


def work(out: Path, stages: Sequence[str], worker: Worker, device: str) -> None:
    """This worker's part of the stages. device: "cpu" or "cuda"."""
    from .progress import Progress
    from .threads import limit_torch_threads

    try:
        limit_torch_threads()
        device = worker.device(device)
        config = read_config(out)
        source = open_source(config.photos)
        if "archive" in stages and (not config.categories or (out / "archive.json").exists()):
            stages = [stage for stage in stages if stage != "index"]  # class folders, or retrieved already
        for folder in (out, *(out / name for stage in STAGES.values() for name in stage.outputs)):
            if worker.is_main and folder.is_dir():
                remove_stale(folder)  # files that a killed run has left unfinished
        for stage in stages:
            worker.barrier(f"before {stage}")
            with Progress(stage, worker) as progress:
                STAGES[stage].run(Context(out, config, source, worker, device, progress))
        worker.barrier("end")
    except Exception as error:
        worker.fail(str(error))
        raise


def remove(path: Path) -> None:
    """Removes a file or a folder. If it is killed half-way, nothing is left that looks complete."""
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
        path.rename(doomed)
        if doomed.is_dir():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()


def _main() -> None:
    """A worker that `distributed.launch` has started: python -m namedmask.run LAUNCHER OUT DEVICE STAGE..."""
    launcher, out, device, *stages = sys.argv[1:]
    distributed.die_with(int(launcher))
    process.prepare()
    failure = Path(out) / ".failed"
    if failure.exists():  # what stopped one worker would stop this one too
        sys.exit(2)
    try:
        work(Path(out), stages, distributed.current(), device)
    except Exception as error:
        if not isinstance(why := explained(error), UserError):
            raise
        failure.write_text(str(why), encoding="utf-8", errors="surrogateescape")
        sys.exit(2)


if __name__ == "__main__":
    _main()
