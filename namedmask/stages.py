# SPDX-License-Identifier: MIT
"""The stages of a run: what each reads, what it writes, and how it runs.

`run` settles the settings of a run folder and calls the stages; `cli` makes a command of each.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import NothingUsable, UserError, counted
from .files import is_file, make_folder, outdated_folders

if TYPE_CHECKING:  # --help imports this module: what a stage needs is imported when it runs
    from .archive import Archive
    from .config import DeepLabTraining, RunConfig
    from .distributed import Worker
    from .hub import Published
    from .masks import ErrorRecord
    from .photos import PhotoSource
    from .progress import Progress


@dataclass
class Context:
    """What a stage is given: the run folder, its settings and photos, and this worker's place in the run.

    device: "cpu", or this worker's GPU as torch names it.
    trace: file for a profiler trace; None but for worker 0.
    """

    out: Path
    config: RunConfig
    source: PhotoSource
    worker: Worker
    device: str
    progress: Progress
    trace: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What a command is about to do: run `stages` in `workers` processes, with these published weights.

    imported: those of the stages that continue from imported results
    """

    out: Path
    config: RunConfig
    source: PhotoSource
    stages: tuple[str, ...]
    workers: int
    weights: tuple[Published, ...]
    imported: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    name:      of its command
    summary:   its help text
    run:       every worker calls it; it continues from what is in the run folder
    files:     patterns of the files in the run folder that it makes, in the order in which --overwrite removes them
    finished:  patterns of files that hold results; while there are none, the settings may change
    complete:  whether there is nothing left to do
    check:     raises UserError if it cannot run, before any earlier result is removed: loads its models and looks for
               what earlier stages make, unless they are among the stages of the plan
    sections:  of RunConfig, that it reads
    made_from: stages whose output goes into its own; when they are made again, so is it
    outdated:  whether --update has to make its results again although no setting differs; it may take what is still
               valid from OUT/.outdated
    done:      what to print at the end, with {out} for the run folder
    continues_imported: whether it accepts imported results of its own; else they can only be replaced
    select:    of the files in a folder that `files` match, those that it has made
    """

    name: str
    summary: str
    run: Callable[[Context], None]
    files: tuple[str, ...]
    finished: tuple[str, ...]
    complete: Callable[[Path, RunConfig], bool] = lambda out, config: False
    check: Callable[[Plan], None] = lambda plan: None
    sections: tuple[str, ...] = ()
    made_from: tuple[str, ...] = ()
    outdated: Callable[[Path, RunConfig, PhotoSource], bool] = lambda out, config, source: False
    done: str = ""
    continues_imported: bool = False
    select: Callable[[Path, list[Path]], list[Path]] = lambda folder, paths: paths

    @property
    def outputs(self) -> tuple[str, ...]:
        """The files and folders in the run folder that it makes."""
        return tuple(dict.fromkeys(pattern.partition("/")[0] for pattern in self.files))

    def has_results(self, out: Path) -> bool:
        """Whether `out` has results of it, present ones or those from before an update."""
        folders = (out, *outdated_folders(out))
        return any(self.select(folder, list(folder.glob(pattern))) for folder in folders for pattern in self.finished)

    def own_files(self, out: Path) -> list[Path]:
        """The files below `out` that it has made, those from before an update included."""
        return [*self.present_files(out), *self.outdated_files(out)]

    def present_files(self, folder: Path) -> list[Path]:
        """The files below a folder that have names of its results. A folder of such a name is the user's."""
        paths = (path for pattern in self.files for path in sorted(folder.glob(pattern)))
        return self.select(folder, list(filter(is_file, paths)))

    def outdated_files(self, out: Path) -> list[Path]:
        """The files from before an update."""
        return [path for folder in outdated_folders(out) for path in self.present_files(folder)]


def _expect_photos(plan: Plan) -> None:
    if next(plan.source.names(lambda _: None), None) is None:
        raise UserError(f"there are no photos in {plan.config.photos}")


def _check_embedder(plan: Plan) -> None:
    """Checks the stages index and archive, which share the model."""
    from .hub import require
    from .index import make_embedder

    config, folder = plan.config, plan.out / "index"
    if "archive" in plan.stages and not config.categories:
        _class_folders(plan.source)
        return
    if "index" in plan.stages:
        _expect_photos(plan)
    elif not _has_all_embeddings(plan.out, config):
        raise UserError(f"{folder} is not finished; run `namedmask index {config.photos} --out {plan.out}` first")
    require(plan.weights)
    embedder = make_embedder(config.index, "cpu")
    if "archive" in plan.stages and config.index.embeddings:
        embedder.texts(config.categories, ())  # an error if one is missing


def _has_all_embeddings(out: Path, config: RunConfig) -> bool:
    from .index import missing_shards

    return (out / "index" / "photos.jsonl").exists() and not missing_shards(out / "index", config.index)


def _lists_other_photos(out: Path, config: RunConfig, source: PhotoSource) -> bool:
    from .index import lists_other_photos

    return lists_other_photos(out / "index", source)


def _index(ctx: Context) -> None:
    from .index import KnownEmbeddings, build_index, list_photos, read_photos

    folder = ctx.out / "index"
    make_folder(folder)
    if ctx.worker.is_main and not (folder / "photos.jsonl").exists():
        list_photos(ctx.source, folder)
    ctx.worker.barrier("photos are listed")
    known = KnownEmbeddings([outdated / "index" for outdated in outdated_folders(ctx.out)], ctx.config.index)
    ctx.progress.total, kept = 0, 0
    for name in read_photos(folder):
        ctx.progress.total += 1
        kept += name in known
    embedder = build_index(ctx.source, folder, ctx.config.index, ctx.worker, ctx.device, ctx.progress.advance, known)
    if embedder is not None:
        ctx.progress.note = embedder.about
    if known.places:
        gone = len(known.places) - kept
        counts = f"{counted(ctx.progress.total - kept, 'new photo')} indexed, {kept:,} kept"
        counts += f", {gone:,} gone" * (gone > 0)
        ctx.progress.note = "; ".join(filter(None, (counts, ctx.progress.note)))
    ctx.worker.barrier("photos are indexed")
    if ctx.worker.is_main:
        _expect_an_embedding(ctx)


def _expect_an_embedding(ctx: Context) -> None:
    """Raises NothingUsable if no photo has an embedding. An index without one is no result: it is removed."""
    from .archive import read_shards

    folder = ctx.out / "index"
    if not any(len(photo) for _, photo in read_shards(folder)):
        assemble_run_errors(ctx.out)
        for shard in folder.glob("*.safetensors"):
            shard.unlink()
        raise NothingUsable(f"no photo in {ctx.config.photos} could be embedded; see {ctx.out / 'errors.jsonl'}")


def _archive(ctx: Context) -> None:
    from .archive import prompts, search_index, write_archive
    from .curation import FILE, summary, write_dropped
    from .index import expect_protocol, make_embedder, read_photos

    path, config = ctx.out / "archive.json", ctx.config
    if not ctx.worker.is_main or path.exists():
        return
    if not config.categories:
        write_archive(path, _archive_of_class_folders(ctx))
        return
    folder = ctx.out / "index"
    if not _has_all_embeddings(ctx.out, config):
        raise UserError(f"{folder} is not finished; run `namedmask index {config.photos} --out {ctx.out}` first")
    _expect_an_embedding(ctx)
    embedder = make_embedder(config.index, ctx.device)
    expect_protocol(folder, embedder)
    text = embedder.texts(config.categories, prompts())
    archive, dropped = search_index(folder, config.categories, text, config.archive, read_photos(folder))
    if dropped:
        ctx.progress.note = f"dropped {summary(Counter(one.reason for one in dropped))}: {ctx.out / FILE}"
    if len(config.categories) > 1 and len({frozenset(e.photo for e in one) for one in archive.photos.values()}) == 1:
        ctx.progress.note = (
            "every photo was retrieved for every category: set --photos-per-category to at most the number of photos "
            "that show a category"
        )
    write_dropped(ctx.out / FILE, dropped)
    write_archive(path, archive)


def _class_folders(source: PhotoSource, errors: list[ErrorRecord] | None = None) -> dict[str, list[str]]:
    """The photos of each class folder. Raises UserError if there are none, or if two names are too similar."""
    from .archive import expect_distinct
    from .photos import note_unlisted

    folders = source.categories(note_unlisted([] if errors is None else errors))
    if not folders:
        raise UserError(f"there are no photos in the folders of {source.path}")
    expect_distinct(folders, source.path)
    return folders


def _lists_other_class_folders(out: Path, config: RunConfig, source: PhotoSource) -> bool:
    from .archive import read_archive
    from .index import listing_errors

    if config.categories or not (out / "archive.json").exists():
        return False
    archive = read_archive(out / "archive.json")
    errors: list[ErrorRecord] = []
    before = {name: [entry.photo for entry in archive.photos[name]] for name in archive.categories}
    return _class_folders(source, errors) != before or errors != listing_errors(out / "index")


def _archive_of_class_folders(ctx: Context) -> Archive:
    from .archive import Archive, Retrieved
    from .masks import errors_path, write_errors

    errors: list[ErrorRecord] = []
    folders = _class_folders(ctx.source, errors)
    make_folder(ctx.out / "index")
    write_errors(errors_path(ctx.out / "index" / "photos.jsonl"), errors)
    return Archive(list(folders), {name: [Retrieved(p, None) for p in photos] for name, photos in folders.items()})


def _check_pseudolabel(plan: Plan) -> None:
    from .archive import read_archive
    from .hub import require
    from .names import expect_clip
    from .saliency import make_detector

    if "archive" not in plan.stages:
        read_archive(plan.out / "archive.json")
    if plan.config.detector.selection == "name":
        expect_clip(plan.config)
    require(plan.weights)
    make_detector(plan.config.detector, "cpu")


def _has_all_masks(out: Path, config: RunConfig) -> bool:
    from .archive import read_archive
    from .pseudolabel import missing_shards

    if not (out / "archive.json").exists():
        return False
    return not missing_shards(read_archive(out / "archive.json"), out / "masks", config.pseudolabel.shard_size)


def _pseudolabel(ctx: Context) -> None:
    from .archive import read_archive
    from .distributed import Worker
    from .pseudolabel import known_labels, pseudolabel, units_of, work_of

    archive, folder, progress = read_archive(ctx.out / "archive.json"), ctx.out / "masks", ctx.progress
    make_folder(folder)
    units = units_of(work_of(archive), ctx.config)
    known = known_labels((outdated / "masks" for outdated in outdated_folders(ctx.out)), ctx.config)
    progress.total = len(units)
    labeler = pseudolabel(
        ctx.source, archive, folder, ctx.config, ctx.worker, ctx.device, progress.advance, ctx.trace, known
    )
    if labeler is not None:
        whose = f"worker {ctx.worker.rank}: " if ctx.worker.count > 1 else ""
        progress.note = whose + labeler.times.summary()
    if known:
        kept = sum(unit in known for unit in units)
        counts = f"{counted(len(units) - kept, 'photo')} labeled, {kept:,} kept"
        progress.note = "; ".join(filter(None, (counts, progress.note)))
    ctx.worker.barrier("masks are made")
    if not ctx.worker.is_main:
        return
    if ctx.worker.count > 1:  # shards that a lost worker had claimed, unless all workers were restarted with it
        pseudolabel(ctx.source, archive, folder, ctx.config, Worker(), ctx.device, progress.advance_new, known=known)
    _assemble_errors(ctx)


def assemble_run_errors(out: Path) -> None:
    """Writes OUT/errors.jsonl, the errors of all stages."""
    from .masks import assemble_errors

    places = ("index/*", "archive", "masks/*", "saliency/*", "refined/*", "experts/*/*", "segmenter/*")
    assemble_errors(out / "errors.jsonl", [p for place in places for p in sorted(out.glob(f"{place}.errors.jsonl"))])


def _assemble_errors(ctx: Context) -> None:
    """Writes OUT/errors.jsonl, and notes how many photos this stage could not use."""
    from .masks import read_errors

    assemble_run_errors(ctx.out)
    errors = read_errors(ctx.out / "errors.jsonl")
    if failed := len({error.photo for error in errors if error.stage == ctx.progress.stage}):
        note = f"{counted(failed, 'photo')} could not be used, see errors.jsonl"
        ctx.progress.note = "; ".join(filter(None, (ctx.progress.note, note)))


def _expect_all_masks(plan: Plan | Context, refined: bool = True) -> None:
    """Raises UserError if masks are missing: a training on a part of them would count as finished forever.

    A plan may make them itself, before the training.

    refined: Whether the experts' masks, which are made of all masks, serve as well.
    """
    from .archive import read_archive
    from .masks import is_refined

    if isinstance(plan, Plan) and "pseudolabel" in plan.stages:
        return
    if refined and is_refined(plan.out):
        return
    read_archive(plan.out / "archive.json")
    if not _has_all_masks(plan.out, plan.config):
        raise UserError(f"{plan.out / 'masks'} is not finished; run `namedmask pseudolabel {plan.out}` first")


def _check_saliency(plan: Plan) -> None:
    from .hub import require
    from .saliency.selfmask_training import expect_even_batch, initial_network

    _expect_all_masks(plan, refined=False)
    expect_even_batch(plan.config.saliency, plan.workers)
    require(plan.weights)
    initial_network(plan.config.saliency)


def _train_saliency(ctx: Context) -> None:
    from .saliency.selfmask_training import train_saliency

    _expect_all_masks(ctx, refined=False)
    train_saliency(ctx.out, ctx.source, ctx.config.saliency, ctx.worker, ctx.device, ctx.progress)
    _finish(ctx)


def _check_training(plan: Plan, settings: DeepLabTraining, workers: int) -> None:
    from .hub import require
    from .segmenter.training import expect_even_batch, initial_network

    expect_even_batch(settings, workers)
    require(plan.weights)
    initial_network(settings, classes=2)


def _check_experts(plan: Plan) -> None:
    from .hub import require
    from .names import expect_clip

    _expect_all_masks(plan, refined=False)
    settings = plan.config.experts
    if selects_experts(plan.out, plan.config):  # before a training that takes hours
        expect_clip(plan.config)
        require(plan.weights)
    if "experts" in plan.imported:
        from .experts import expect_imported_networks

        expect_imported_networks(plan.out)
        return
    _check_training(plan, settings, plan.workers if settings.mode == "shared" else 1)


def _is_refined(out: Path, config: RunConfig) -> bool:
    from .masks import is_refined

    return is_refined(out)


def selects_experts(out: Path, config: RunConfig) -> bool:
    """Whether names decide which masks the experts replace, with "auto" resolved."""
    select = config.experts.select
    has_index = not config.index.embeddings and next((out / "index").glob("*.safetensors"), None) is not None
    return has_index if select == "auto" else select == "name"


def _experts(ctx: Context) -> None:
    from .archive import read_archive
    from .experts import train_experts
    from .names import NameScorer
    from .record import IMPORTED, read_record

    _expect_all_masks(ctx)
    imported = IMPORTED in read_record(ctx.out).stages["experts"].made_with
    scorer = None
    if selects_experts(ctx.out, ctx.config):
        categories = read_archive(ctx.out / "archive.json").categories
        scorer = functools.partial(NameScorer, ctx.config.index, categories, ctx.device)
    train_experts(ctx.out, ctx.source, ctx.config.experts, ctx.worker, ctx.device, ctx.progress, imported, scorer)
    _finish(ctx)


def _without_other_networks(folder: Path, paths: list[Path]) -> list[Path]:
    """The files of the experts of a run folder, without networks of the user, such as a copy of an expert.

    Without an archive, as in OUT/.replaced, all of them.
    """
    from .archive import read_archive
    from .experts import SHARED, network_path

    try:
        categories = read_archive(folder / "archive.json").categories
    except UserError:
        return paths
    known = {network_path(folder, name) for name in (*categories, SHARED)}
    return [path for path in paths if path.suffix != ".safetensors" or path in known]


def _finish(ctx: Context) -> None:
    """Reports the photos that a training could not use, when all workers have finished it."""
    ctx.worker.barrier(f"{ctx.progress.stage} is finished")
    if ctx.worker.is_main:
        _assemble_errors(ctx)


def _check_train(plan: Plan) -> None:
    _expect_all_masks(plan)
    # Outdated networks alone do not matter: without refined/, training uses the detector's masks.
    if any(path.parent.name == "refined" for path in STAGES["experts"].outdated_files(plan.out)):
        raise UserError(
            f"the experts' masks of {plan.out} are from before the update; `namedmask experts {plan.out}` makes them "
            "again and keeps results that are still valid"
        )
    _check_training(plan, plan.config.segmenter, plan.workers)


def _train(ctx: Context) -> None:
    from .segmenter.training import train_segmenter

    _expect_all_masks(ctx)
    train_segmenter(ctx.out, ctx.source, ctx.config.segmenter, ctx.worker, ctx.device, ctx.progress)
    _finish(ctx)


def _report(ctx: Context) -> None:
    from .report import write_report

    if ctx.worker.is_main:
        write_report(ctx.out)


_SHARD = "[0-9][0-9][0-9][0-9]*[0-9]"
_TRAINING = ("checkpoint.pt", "metrics.jsonl", f"{_SHARD}.errors.jsonl", "tensorboard/events.out.tfevents.*")

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "index",
            "Compute CLIP image embeddings of all photos.",
            _index,
            files=(f"index/{_SHARD}.safetensors", "index/*.errors.jsonl", "index/photos.jsonl"),
            finished=("index/*.safetensors",),
            complete=_has_all_embeddings,
            check=_check_embedder,
            sections=("index",),
            outdated=_lists_other_photos,
        ),
        Stage(
            "archive",
            "Retrieve the best photos of each category.",
            _archive,
            files=("archive.json", "archive.errors.jsonl", "archive.dropped.jsonl"),
            finished=("archive.json",),
            complete=lambda out, _: (out / "archive.json").exists(),
            check=_check_embedder,
            sections=("categories", "archive"),
            made_from=("index",),
            outdated=_lists_other_class_folders,
            continues_imported=True,
        ),
        Stage(
            "pseudolabel",
            "Compute a mask for every photo of an archive.",
            _pseudolabel,
            files=(f"masks/{_SHARD}.jsonl", f"masks/{_SHARD}.errors.jsonl", f"detected/{_SHARD}.jsonl"),
            finished=("masks/*[0-9].jsonl",),
            complete=_has_all_masks,
            check=_check_pseudolabel,
            sections=("detector", "refine", "pseudolabel"),
            made_from=("index", "archive"),
        ),
        Stage(
            "train-saliency",
            "Train a SelfMask network on a run's masks.",
            _train_saliency,
            files=("saliency/model.safetensors", *(f"saliency/{name}" for name in _TRAINING)),
            finished=("saliency/model.safetensors", "saliency/checkpoint.pt"),
            complete=lambda out, _: (out / "saliency" / "model.safetensors").exists(),
            check=_check_saliency,
            sections=("saliency",),
            # From no stage: the network stays useful when masks are made again, perhaps with its help.
            done="the SelfMask network is in {out}/saliency/model.safetensors",
        ),
        Stage(
            "experts",
            "Train category experts, which relabel photos.",
            _experts,
            files=(
                *(f"{folder}/{_SHARD}{kind}.jsonl" for folder in ("refined", "refining") for kind in ("", ".errors")),
                "experts/*.safetensors",
                *(f"experts/*/{name}" for name in _TRAINING),
            ),
            finished=(
                "experts/*.safetensors",
                "experts/*/checkpoint.pt",
                "refining/*[0-9].jsonl",
                "refined/*[0-9].jsonl",
            ),
            complete=_is_refined,
            check=_check_experts,
            sections=("experts",),
            made_from=("index", "archive", "pseudolabel"),
            outdated=lambda out, config, source: True,  # its digests of the masks decide what it takes
            done="the experts' masks are in {out}/refined",
            continues_imported=True,
            select=_without_other_networks,
        ),
        Stage(
            "train",
            "Train a segmenter on the masks of a run.",
            _train,
            files=(
                "segmenter/model.safetensors",
                "segmenter/best.safetensors",
                "segmenter/categories.json",
                *(f"segmenter/{name}" for name in _TRAINING),
            ),
            finished=("segmenter/model.safetensors", "segmenter/checkpoint.pt"),
            complete=lambda out, _: (out / "segmenter" / "model.safetensors").exists(),
            check=_check_train,
            sections=("segmenter",),
            made_from=("index", "archive", "pseudolabel", "experts"),
            outdated=lambda out, config, source: True,
            done="the segmenter is in {out}/segmenter",
        ),
        Stage(
            "report",
            "Write the gallery of a run, report.html.",
            _report,
            files=("report.html",),
            finished=(),  # written again each time, of whatever the run has by then
            made_from=("index", "archive", "pseudolabel", "experts"),
            done="the gallery is {out}/report.html",
        ),
    )
}

LABELING = ("index", "archive", "pseudolabel", "report")  # what `namedmask run` runs
