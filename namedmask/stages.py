# SPDX-License-Identifier: MIT
"""The stages of a run: what each reads, what it writes, and how it runs.

`run` settles the settings of a run folder and calls the stages; `cli` makes a command of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:  # --help imports this module: what a stage needs is imported when it runs
    from .archive import Archive
    from .config import RunConfig
    from .distributed import Worker
    from .photos import PhotoSource
    from .progress import Progress


@dataclass
class Context:
    """What a stage is given: the run folder, its settings and photos, and this worker's place in the run.

    device: "cpu", or this worker's GPU as torch names it.
    """

    out: Path
    config: RunConfig
    source: PhotoSource
    worker: Worker
    device: str
    progress: Progress


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    name:      of its command
    summary:   its help text
    run:       every worker calls it; it continues from what is in the run folder
    outputs:   files and folders in the run folder that it makes
    finished:  patterns of files that hold results; while there are none, the settings may change
    sections:  of RunConfig, that it reads
    made_from: stages whose output goes into its own; when they are made again, so is it
    done:      what to print at the end, with {out} for the run folder
    """

    name: str
    summary: str
    run: Callable[[Context], None]
    outputs: tuple[str, ...]
    finished: tuple[str, ...]
    sections: tuple[str, ...] = ()
    made_from: tuple[str, ...] = ()
    done: str = ""

    def has_results(self, out: Path) -> bool:
        return any(next(out.glob(pattern), None) is not None for pattern in self.finished)


def _index(ctx: Context) -> None:
    from .index import build_index, list_photos, read_photos

    folder = ctx.out / "index"
    folder.mkdir(exist_ok=True)
    if ctx.worker.is_main and not (folder / "photos.jsonl").exists():
        list_photos(ctx.source, folder)
        if next(read_photos(folder), None) is None:
            (folder / "photos.jsonl").unlink()
            raise UserError(f"there are no photos in {ctx.config.photos}")
    ctx.worker.barrier("photos are listed")
    ctx.progress.total = sum(1 for _ in read_photos(folder))
    embedder = build_index(ctx.source, folder, ctx.config.index, ctx.worker, ctx.device, ctx.progress.advance)
    if embedder is not None:
        ctx.progress.note = embedder.about
    ctx.worker.barrier("photos are indexed")


def _archive(ctx: Context) -> None:
    from .archive import prompts, search_index, write_archive
    from .index import make_embedder, missing_shards, read_photos

    path, config = ctx.out / "archive.json", ctx.config
    if not ctx.worker.is_main or path.exists():
        return
    if not config.categories:
        write_archive(path, _archive_of_class_folders(ctx))
        return
    folder = ctx.out / "index"
    if not (folder / "photos.jsonl").exists() or missing_shards(folder, config.index):
        raise UserError(f"{folder} is not finished; run `namedmask index {config.photos} --out {ctx.out}` first")
    text = make_embedder(config.index, ctx.device).texts(config.categories, prompts())
    count = config.archive.photos_per_category
    archive = search_index(folder, config.categories, text, count, read_photos(folder))
    if not any(archive.photos.values()):
        raise UserError(f"no photo in {config.photos} could be embedded; see {folder}/*.errors.jsonl")
    if len(config.categories) > 1 and len({frozenset(e.photo for e in one) for one in archive.photos.values()}) == 1:
        ctx.progress.note = (
            "every photo was retrieved for every category: set --photos-per-category to at most the number of photos "
            "that show a category"
        )
    write_archive(path, archive)


def _archive_of_class_folders(ctx: Context) -> Archive:
    from .archive import Archive, Retrieved, expect_distinct
    from .masks import ErrorRecord, errors_path, write_errors

    errors: list[ErrorRecord] = []
    try:
        folders = ctx.source.categories(lambda e: errors.append(ErrorRecord(e.photo, "list", e.reason)))
    except ValueError as error:
        raise UserError(str(error)) from None
    if not folders:
        raise UserError(f"there are no photos in the folders of {ctx.config.photos}")
    expect_distinct(folders, ctx.config.photos)
    (ctx.out / "index").mkdir(exist_ok=True)
    write_errors(errors_path(ctx.out / "index" / "photos.jsonl"), errors)
    return Archive(list(folders), {name: [Retrieved(p, None) for p in photos] for name, photos in folders.items()})


def _pseudolabel(ctx: Context) -> None:
    from .archive import read_archive
    from .distributed import Worker
    from .pseudolabel import pseudolabel, work_of

    archive, folder, progress = read_archive(ctx.out / "archive.json"), ctx.out / "masks", ctx.progress
    folder.mkdir(exist_ok=True)
    progress.total = len(work_of(archive))
    labeler = pseudolabel(ctx.source, archive, folder, ctx.config, ctx.worker, ctx.device, progress.advance)
    if labeler is not None:
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in labeler.seconds.items())
        progress.note = f"summed over threads: {steps}"
    ctx.worker.barrier("masks are made")
    if not ctx.worker.is_main:
        return
    if ctx.worker.count > 1:  # shards that a lost worker had claimed, unless all workers were restarted with it

        def advance(photos: int, existing: bool = False) -> None:
            if not existing:
                progress.advance(photos)

        pseudolabel(ctx.source, archive, folder, ctx.config, Worker(), ctx.device, advance)
    _assemble_errors(ctx)


def _assemble_errors(ctx: Context) -> None:
    """Merges the errors of all stages into errors.jsonl, and notes how many photos this stage could not use."""
    from .masks import assemble_errors, read_errors

    path, folders = ctx.out / "errors.jsonl", ("index", "masks", "saliency", "refined", "experts/*", "segmenter")
    assemble_errors(path, [p for name in folders for p in sorted(ctx.out.glob(f"{name}/*.errors.jsonl"))])
    if failed := len({error.photo for error in read_errors(path) if error.stage == ctx.progress.stage}):
        note = f"{failed} photo{'s' * (failed > 1)} could not be used, see errors.jsonl"
        ctx.progress.note = "; ".join(filter(None, (ctx.progress.note, note)))


def _expect_all_masks(ctx: Context, refined: bool = True) -> None:
    """Raises UserError if masks are missing: a training on a part of them would count as finished forever.

    refined: Whether the experts' masks, which are made of all masks, serve as well.
    """
    from .archive import read_archive
    from .pseudolabel import missing_shards

    if refined and (ctx.out / "refined").exists():
        return
    archive = read_archive(ctx.out / "archive.json")
    if missing_shards(archive, ctx.out / "masks", ctx.config.pseudolabel.shard_size):
        raise UserError(f"{ctx.out / 'masks'} is not finished; run `namedmask pseudolabel {ctx.out}` first")


def _train_saliency(ctx: Context) -> None:
    from .saliency.selfmask_training import train_saliency

    _expect_all_masks(ctx, refined=False)
    train_saliency(ctx.out, ctx.source, ctx.config.saliency, ctx.worker, ctx.device, ctx.progress)
    _finish(ctx)


def _experts(ctx: Context) -> None:
    from .experts import train_experts

    _expect_all_masks(ctx)
    train_experts(ctx.out, ctx.source, ctx.config.experts, ctx.worker, ctx.device, ctx.progress)
    _finish(ctx)


def _finish(ctx: Context) -> None:
    """Reports the photos that a training could not use, when all workers have finished it."""
    ctx.worker.barrier(f"{ctx.progress.stage} is finished")
    if ctx.worker.is_main:
        _assemble_errors(ctx)


def _train(ctx: Context) -> None:
    from .segmenter.training import train_segmenter

    _expect_all_masks(ctx)
    train_segmenter(ctx.out, ctx.source, ctx.config.segmenter, ctx.worker, ctx.device, ctx.progress)
    _finish(ctx)


def _report(ctx: Context) -> None:
    from .report import write_report

    if ctx.worker.is_main:
        write_report(ctx.out)


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "index",
            "Compute CLIP image embeddings of all photos.",
            _index,
            outputs=("index",),
            finished=("index/*.safetensors",),
            sections=("index",),
        ),
        Stage(
            "archive",
            "Retrieve the best photos of each category.",
            _archive,
            outputs=("archive.json",),
            finished=("archive.json",),
            sections=("categories", "archive"),
            made_from=("index",),
        ),
        Stage(
            "pseudolabel",
            "Compute a mask for every photo of an archive.",
            _pseudolabel,
            outputs=("masks", "detected"),
            finished=("masks/*[0-9].jsonl",),
            sections=("detector", "refine", "pseudolabel"),
            made_from=("index", "archive"),
        ),
        Stage(
            "train-saliency",
            "Train a SelfMask network on a run's masks.",
            _train_saliency,
            outputs=("saliency",),
            finished=("saliency/model.safetensors", "saliency/checkpoint.pt"),
            sections=("saliency",),
            # From no stage: the network stays useful when masks are made again, perhaps with its help.
            done="the SelfMask network is in {out}/saliency/model.safetensors",
        ),
        Stage(
            "experts",
            "Train category experts, which relabel photos.",
            _experts,
            outputs=("refined", "refining", "experts"),
            finished=(
                "experts/*.safetensors",
                "experts/*/checkpoint.pt",
                "refining/*[0-9].jsonl",
                "refined/*[0-9].jsonl",
            ),
            sections=("experts",),
            made_from=("index", "archive", "pseudolabel"),
            done="the experts' masks are in {out}/refined",
        ),
        Stage(
            "train",
            "Train a segmenter on the masks of a run.",
            _train,
            outputs=("segmenter",),
            finished=("segmenter/model.safetensors", "segmenter/checkpoint.pt"),
            sections=("segmenter",),
            made_from=("index", "archive", "pseudolabel", "experts"),
            done="the segmenter is in {out}/segmenter",
        ),
        Stage(
            "report",
            "Write the gallery of a run, report.html.",
            _report,
            outputs=("report.html",),
            finished=(),  # written again each time, of whatever the run has by then
            made_from=("index", "archive", "pseudolabel", "experts"),
            done="the gallery is {out}/report.html",
        ),
    )
}
