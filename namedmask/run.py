# SPDX-License-Identifier: MIT
"""A run and its folder: the lock, its settings, its stages one after another, in one process or many.

run.toml  stages.json  index/  archive.json  masks/  errors.jsonl  saliency/  experts/  refined/  segmenter/
report.html  (each described where it is made)
.replaced/   what a command with --overwrite replaces, until it has finished
.outdated/   what --update has set aside, until the stage that takes what is still valid has finished
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from . import distributed, hub, launcher
from .archive import expect_distinct, read_archive
from .config import RunConfig, flatten, make_config, merge, nest, to_toml
from .distributed import Worker
from .errors import UserError, counted, listed
from .files import (
    OLD,
    OUTDATED,
    absolute,
    atomic_write,
    expect_writable,
    locked,
    make_folder,
    outdated_folders,
    put_back_files,
    remove_empty,
    remove_files,
    remove_stale,
    set_aside,
    set_outdated,
)
from .masks import is_refined, read_errors, read_masks
from .photos import PhotoSource, open_source
from .progress import Progress, logger
from .record import (
    IMPORTED,
    LEFT_BEHIND,
    UNFINISHED,
    UPDATED,
    RunRecord,
    StageRecord,
    expect_no_files,
    made_with,
    read_config,
    read_record,
    recorded_config,
    stage_record,
)
from .stages import STAGES, Context, Plan, Stage, selects_experts

# Of a run, besides the outputs of its stages.
FILES = ("run.toml", "errors.jsonl", "report.html", "review.jsonl", "sheets.json")
CHECKED_PHOTOS = 1000  # of a run whose photos have moved or changed
GROWING = ("categories:", "archive.", "index.embeddings:")  # what the differences that --update accepts begin with


def claim(out: Path, photos: str) -> None:
    """Makes `out` a run folder of these photos, unless it is one. Raises UserError if it has files of other origin."""
    record = read_record(out)
    if record.photos is None:
        expect_no_files(out, (*FILES, *(name for stage in STAGES.values() for name in stage.outputs)))
        record.photos = photos
        record.write(out)


def settle(
    out: Path,
    given: dict,
    stages: Sequence[str],
    overwrite: bool = False,
    workers: int | None = None,
    imported: str = "",
    update: bool = False,
) -> RunConfig:
    """Determines the settings of a run folder, records those of `stages` and writes run.toml.

    A setting is, in this order: the given one, if one of `stages` reads it; the one that the run has recorded; its
    default. While a stage has no results, its settings may change.

    Args:
        out: The run folder.
        given: Nested settings. Those that none of `stages` reads are ignored.
        stages: Names of the stages that are to run.
        overwrite: Move the results of `stages`, and those made from them, to OUT/.replaced. `finish` removes them,
            `put_back` restores them.
        workers: Number of processes that are about to run the stages, which are checked (`Stage.check`) unless they
            are complete. None: the stages do not run now and are not checked.
        imported: The file or folder from which the results of `stages` are imported, instead of running them. Only
            the given settings are recorded for them, as `UNFINISHED`. What an import that was killed has left is
            removed. "": they are not imported.
        update: Accept other category names and another size of the archive, and photos that were added or removed. The
            results of `stages` that this changes, and those made from them, are moved to OUT/.outdated, where the
            stages find what is still valid. A segmenter stays, unless `stages` name it.

    Raises:
        UserError: If existing results were made with other settings or other photos, or not by a run at all, or if a
            check fails. With `imported`, if there are results. Nothing is removed or recorded then.
    """
    record, todo = read_record(out), [STAGES[name] for name in stages]
    _outdate(out, record)  # that a kill interrupted
    aside = record.replaced.stages if record.replaced else {}  # of an unfinished command
    if record.photos is None:
        expect_no_files(out, FILES)
    for stage in STAGES.values():
        if stage.name not in aside:  # a kill interrupted set_aside
            put_back_files(out, stage.own_files(out / OLD))
    recorded_config(out, record)
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
    replaced = _made_from(todo, record) if overwrite else []
    leftovers: list[Stage] = []  # of attempts with other settings
    outdated: list[Stage] = []
    kept_imports: set[str] = set()
    settled = RunRecord(config.photos, dict(record.stages), record.digests, record.replaced)
    for stage in (one for one in todo if one.sections):
        _expect_ours(out, stage, record)
        old, has_results = record.stages.get(stage.name), stage.has_results(out)
        for one in (STAGES[name] for name in (*stage.made_from, stage.name)):
            if one not in replaced and not (imported and one in todo):
                _expect_whole_import(out, one, record)
        new = stage_record(config, stage.sections, record.digests)
        stays = old if has_results and not overwrite and not update else None
        _add_upstream(new, _earlier(stage, todo, out, stays), settled)
        differences = old.differences(new) if old else []
        again = imported and old is not None and UNFINISHED in old.made_with
        keeps = old is not None and has_results and not overwrite and not again
        kept_import = old.made_with.get(IMPORTED) if old and keeps else None
        if old and keeps:
            if imported:
                raise UserError(f"{out} has results of `{stage.name}` already; --overwrite replaces them")
            _expect_continuation(out, stage, old, new, differences, update)
        if update and keeps and not kept_import:
            changed = differences or any(one.name in stage.made_from for one in outdated)
            if changed or stage.outdated(out, config, source):
                outdated.append(stage)
                if stage.name == "index" and differences:  # other embeddings: the file has all of them
                    leftovers.append(stage)
        if again or (differences and not has_results):
            leftovers.append(stage)
        if imported:
            new.settings = {name: value for name, value in new.settings.items() if name in flatten(given)}
        new.made_with = old.made_with if old and keeps else made_with() | ({IMPORTED: imported} if imported else {})
        if stage in outdated:
            new.made_with = made_with() | {UPDATED: "; ".join(differences) or "photos"}
        settled.stages[stage.name] = old if old and kept_import else new
        kept_imports |= {stage.name} if kept_import else set()
    if outdated:
        _expect_update(out, config, source, record)
        outdated += _outdated_by(outdated, todo, settled, out)
    if record.photos not in (None, config.photos):
        if not any(stage.has_results(out) for stage in STAGES.values()):
            leftovers.append(STAGES["index"])  # the list of the other photos
        elif not (overwrite and ("index" if STAGES["index"].has_results(out) else "archive") in stages):
            _expect_same_photos(out, source, record)
    if workers is not None:
        ahead = [stage for stage in todo if stage in (*replaced, *outdated) or not stage.complete(out, config)]
        _check(out, config, source, stages, workers, ahead, frozenset(kept_imports))
    _remove_stale(out)
    for stage in leftovers:
        remove_files(out, stage.own_files(out))
    own = {stage.name: stage.own_files(out) for stage in replaced}  # before archive.json is gone, which names experts
    for stage in replaced:
        if stage.name in aside:
            remove_files(out, own[stage.name])
        else:
            set_aside(out, own[stage.name])
            settled.replaced = settled.replaced or RunRecord(record.photos)
            settled.replaced.stages[stage.name] = record.stages.get(stage.name, StageRecord())
    if outdated:
        if "train" in settled.stages and STAGES["train"] not in outdated:
            settled.stages["train"].made_with[LEFT_BEHIND] = f"by an update of {', '.join(s.name for s in outdated)}"
        make_folder(out / OUTDATED / str(len(outdated_folders(out))))
        settled.outdating = [stage.name for stage in outdated]
    text = to_toml(config, {name: stage.made_with for name, stage in settled.stages.items()})
    for stage in todo if imported else ():
        settled.stages[stage.name].made_with[UNFINISHED] = "true"
    settled.write(out)
    _outdate(out, settled)
    with atomic_write(out / "run.toml") as file:
        file.write(text.encode(errors="backslashreplace"))  # names that are not UTF-8
    return config


def _expect_whole_import(out: Path, stage: Stage, record: RunRecord) -> None:
    """Raises UserError if the results of a stage are what an import that was killed has left."""
    made_with = record.stages.get(stage.name, StageRecord()).made_with
    if UNFINISHED in made_with and stage.has_results(out):
        raise UserError(
            f"the import of {made_with[IMPORTED]} into {out} was interrupted: run it again, or replace what it has "
            f"left with `namedmask {_command(stage, out)} --overwrite`"
        )


def _expect_continuation(
    out: Path, stage: Stage, old: StageRecord, new: StageRecord, differences: Sequence[str], update: bool
) -> None:
    """Raises UserError if a stage cannot go on from its results.

    Args:
        out: The run folder.
        stage: A stage that has results.
        old: Their record.
        new: What their record would be now.
        differences: Settings that differ from those that they were made with.
        update: Accept differences that only make the run grow.
    """
    kept_import = old.made_with.get(IMPORTED)
    if kept_import and not stage.continues_imported:
        raise _imported(out, stage, kept_import)
    if kept_import and differences:
        raise UserError(
            f"the results of `{stage.name}` in {out} were imported from {kept_import}, so these options have no "
            f"effect: {'; '.join(differences)} (leave them out, or replace the imported results with "
            f"`namedmask {_command(stage, out)} --overwrite`)"
        )
    grows = all(line.startswith(GROWING) for line in differences)
    if differences and grows and not update and LEFT_BEHIND in old.made_with:  # the user has given no other options
        raise UserError(f"{_left_behind(out)}: {'; '.join(differences)}")
    if stage.name == "train":  # what its masks were made with does not matter to an update, which starts again
        own = [line for line in differences if line.partition(":")[0] in new.settings]
        if update:
            differences, grows = own, not own
        elif differences and not own:
            raise UserError(
                f"{out / stage.outputs[0]} was trained on masks that were made with other settings: "
                f"{'; '.join(differences)}; `namedmask train {out} --update` trains it again"
            )
    if differences and not (update and grows):
        updates = ", bring it up to date with --update, which computes only what is new" if grows else ""
        raise UserError(
            f"{out / stage.outputs[0]} was made with other settings: {'; '.join(differences)} (leave these options out "
            f"to continue with the old ones{updates}, use another run folder, or make it again with these options and "
            f"`namedmask {_command(stage, out)} --overwrite`, which keeps what earlier stages made)"
        )


def _imported(out: Path, stage: Stage, origin: str) -> UserError:
    return UserError(
        f"the results of `{stage.name}` in {out} were imported from {origin} and serve the later stages as they are; "
        f"`namedmask {_command(stage, out)} --overwrite` replaces them"
    )


def _expect_update(out: Path, config: RunConfig, source: PhotoSource, record: RunRecord) -> None:
    """Raises UserError if --update would drop all names, or most photos, of a run: that is more likely a mistake."""
    before = record.settings().get("categories", [])
    if before and not set(before) & set(config.categories):
        raise UserError(
            f"--update keeps the names that --categories lists, and it lists none of {out}: {listed(before)}. List old "
            "and new names, or use another run folder"
        )
    _expect_same_photos(out, source, record)


def _outdated_by(outdated: Sequence[Stage], todo: Sequence[Stage], settled: RunRecord, out: Path) -> list[Stage]:
    """The later stages whose results do not fit to those of `outdated` any more. Their records in `settled` get the
    settings that the results will be made from. A segmenter stays: it is useful until another one is trained."""
    found: list[Stage] = []
    for stage in STAGES.values():
        names = {one.name for one in (*outdated, *found)} & set(stage.made_from)
        own = settled.stages.get(stage.name)
        if not names or own is None or stage in todo or stage.name == "train" or not stage.has_results(out):
            continue
        if (origin := own.made_with.get(IMPORTED)) and not stage.continues_imported:
            raise _imported(out, stage, origin)
        files = {name: digest for name, digest in own.files.items() if name in own.settings}
        settled.stages[stage.name] = renewed = StageRecord(own.settings, {}, files, own.made_with)
        _add_upstream(renewed, stage.made_from, settled)
        found.append(stage)
    return found


def _earlier(stage: Stage, todo: Sequence[Stage], out: Path, stays: StageRecord | None) -> list[str]:
    """The earlier stages whose results go into those of `stage`; `stays` is the record of its results if they stay."""
    names = [name for name in stage.made_from if STAGES[name] in todo or STAGES[name].has_results(out)]
    if stage.name == "train" and "experts" in names and not (_uses_experts(stays) if stays else is_refined(out)):
        names.remove("experts")  # whose networks alone change no mask
    return names


def _uses_experts(segmenter: StageRecord) -> bool:
    """Whether a segmenter was trained on the masks of experts: it may be older than they are."""
    return any(name.startswith("experts.") for name in segmenter.upstream)


def _add_upstream(stage: StageRecord, earlier: Iterable[str], settled: RunRecord) -> None:
    """Adds the settings and files of earlier stages to the record of a stage that is made from them."""
    for name in earlier:
        if name in settled.stages:
            stage.upstream |= settled.stages[name].settings
            stage.files |= settled.stages[name].files


def _outdate(out: Path, record: RunRecord) -> None:
    """Moves the results of the stages in record.outdating to OUT/.outdated. Imported networks stay."""
    own = {name: STAGES[name].present_files(out) for name in record.outdating}  # before archive.json is gone
    for name, files in own.items():
        if IMPORTED in record.stages[name].made_with:
            files = [path for path in files if path.parts[len(out.parts)] != "experts"]
        set_outdated(out, files)
    if record.outdating:
        record.outdating = []
        record.write(out)


def _remove_stale(out: Path) -> None:
    """Removes what killed commands have left unfinished in a run folder and in the folders of its stages."""
    for folder in (out, *(out / name for stage in STAGES.values() for name in stage.outputs)):
        remove_stale(folder)


def _check(
    out: Path,
    config: RunConfig,
    source: PhotoSource,
    stages: Sequence[str],
    workers: int,
    ahead: Sequence[Stage],
    imported: frozenset[str],
) -> None:
    """Raises UserError if one of `stages` that has work `ahead` cannot run."""
    if "archive" in stages and STAGES["archive"] not in ahead:  # as in `work`
        ahead = [stage for stage in ahead if stage.name != "index"]
    loading = {stage.name for stage in ahead}
    if "archive" in stages and not config.categories:  # class folders need no CLIP model
        loading -= {"index", "archive"}
    if "experts" in imported:
        loading.discard("experts")
    weights = hub.needed(config, loading, selects_experts(out, config))
    plan = Plan(out, config, source, tuple(stages), workers, tuple(weights), imported)
    for check in dict.fromkeys(stage.check for stage in ahead):
        check(plan)


def move_photos(out: Path, photos: str | None) -> None:
    """Records where the photos of a run are now; None: where they were.

    Raises:
        UserError: If `out` is not a run folder, or the photos are others.
    """
    if photos is not None:
        with locked(out):
            settle(out, {"photos": absolute(photos)}, ["report"])


def finish(out: Path, stages: Sequence[str]) -> None:
    """Removes the results in OUT/.replaced that `stages`, which have finished, replace."""
    record = read_record(out)
    if record.replaced is None:
        return
    for stage in _made_from([STAGES[name] for name in stages], record.replaced):
        remove_files(out / OLD, stage.own_files(out / OLD))
        record.replaced.stages.pop(stage.name, None)
    if not record.replaced.stages:
        record.replaced = None
        remove_empty(out / OLD, out)
    record.write(out)


def put_back(out: Path) -> bool:
    """Restores the results in OUT/.replaced and their record, and removes what has been made since.

    If it is killed, the next command continues it.

    Returns:
        Whether there were any.
    """
    record = read_record(out)
    if record.replaced is None:
        return False
    stages = [STAGES[name] for name in record.replaced.stages]
    for stage in stages:
        remove_files(out, stage.own_files(out))
    record.photos = record.replaced.photos
    record.stages |= {name: stage for name, stage in record.replaced.stages.items() if stage.settings}
    record.replaced = None
    record.write(out)
    for stage in stages:
        put_back_files(out, stage.own_files(out / OLD))
    return True


def _command(stage: Stage, out: Path) -> str:
    return f"{stage.name} --out {out}" if stage.name == "index" else f"{stage.name} {out}"


def _made_from(stages: Sequence[Stage], record: RunRecord) -> list[Stage]:
    """The stages and those made from their results, as far as they are recorded, last ones first: if the removal of
    their results is interrupted, what is left was made from what is left."""
    names = {stage.name for stage in stages}
    made = [stage for stage in reversed(STAGES.values()) if stage in stages or not names.isdisjoint(stage.made_from)]
    segmenter, trained = STAGES["train"], record.stages.get("train")
    if trained and names.intersection((*segmenter.made_from, "train")) == {"experts"} and not _uses_experts(trained):
        made.remove(segmenter)
    return [stage for stage in made if stage.name in record.stages or not stage.sections]


def _expect_categories(config: RunConfig, source: PhotoSource, stages: Sequence[str]) -> None:
    if "archive" in stages and not config.categories and not Path(source.path).is_dir():
        raise UserError(f"{config.photos} is not a folder of class folders: pass --categories or --categories-file")
    expect_distinct(config.categories, "--categories")
    if config.index.embeddings and config.index.clip_weights:
        raise UserError("pass --embeddings or --clip-weights, not both")


def _expect_ours(out: Path, stage: Stage, record: RunRecord) -> None:
    """Files that no run has recorded may be the user's: neither continued nor removed."""
    links = [name for name in stage.outputs if (out / name).is_symlink() and not (out / name).exists()]
    expect_no_files(out, links if stage.name in record.stages else stage.outputs)


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


@contextmanager
def _torch_restored() -> Iterator[None]:
    """Restores what stages change of torch in this process: its number of threads and its random state."""
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@_torch_restored()
def start(
    out: Path,
    given: dict,
    stages: Sequence[str],
    workers: int = 1,
    gpus: int | None = None,
    overwrite: bool = False,
    trace: Path | None = None,
    update: bool = False,
) -> bool:
    """Runs stages of the run folder `out`.

    Under torchrun or SLURM this process is one of many already and takes its place among them.

    Args:
        out: The run folder; created if `given` has photos.
        given: Nested settings, as for `settle`.
        stages: Names of the stages, in order.
        workers: Number of processes on the CPU.
        gpus: Number of processes with a GPU each, instead; None: one if there is a GPU.
        overwrite: Start over; as for `settle`.
        trace: File for torch's profiler trace of some batches of `pseudolabel`, from worker 0.
        update: As for `settle`.

    Returns:
        False if masks were to be made and there is none, else True.

    Raises:
        UserError: As `settle` does, if a stage cannot use its input, or if a worker died.
    """
    if "photos" not in given:
        read_config(out)  # an error for what is not a run folder, before one is made
    gpus = distributed.count_gpus(gpus, workers)
    device = "cuda" if gpus else "cpu"
    worker = distributed.current()
    if gpus and (gpus == 1 or worker.count > 1):  # this process uses a GPU itself
        distributed.warm_up(worker.device(device))
    if not worker.is_main:
        worker.barrier("settled")
        work(out, stages, worker, device, trace)
        return True
    if worker.count > 1:
        logger.info(f"worker 0 of {worker.count}; waiting for the others")
    if trace is not None:
        expect_writable(trace)  # before the work
    with locked(out):
        try:
            count = max(worker.count, workers, gpus)
            config = settle(out, given, stages, overwrite and worker.attempt == 0, count, update=update)
        except UserError as error:
            worker.fail(str(error))
            raise
        worker.barrier("settled")
        if worker.count == 1 and gpus <= 1:
            _announce(out, config, stages, worker.device(device))
        try:
            if worker.count > 1 or max(workers, gpus) == 1:
                work(out, stages, worker, device, trace)
            else:
                launcher.launch(__name__, out, device, gpus or workers, str(trace or ""), *stages)
            has_masks = "pseudolabel" not in stages or _log_counts(out)
        except Exception as error:
            if worker.count == 1:  # else the other workers may still write
                _keep_replaced(out, error)
            raise
        if has_masks or not put_back(out):
            finish(out, stages)
    for stage in stages:
        if STAGES[stage].done:
            logger.info(STAGES[stage].done.format(out=out))
    if update:
        _log_outdated(out, stages)
    return has_masks


def _log_outdated(out: Path, stages: Sequence[str]) -> None:
    """Logs which results of later stages an update has left behind."""
    record = read_record(out)
    for name, stage in STAGES.items():
        if name not in stages and stage.sections and stage.outdated_files(out):
            again = f"`namedmask {_command(stage, out)}` makes what is new"
            logger.info(f"the results of `{name}` are out of date: {again}")
    segmenter = record.stages.get("train", StageRecord())
    if LEFT_BEHIND in segmenter.made_with and STAGES["train"].has_results(out):
        logger.info(_left_behind(out))


def _left_behind(out: Path) -> str:
    return f"{out / 'segmenter'} is from before the update; `namedmask train {out} --update` trains another one"


def _remove_outdated(out: Path, stages: Sequence[str]) -> None:
    """Removes the results of stages from before an update, when the stages have finished."""
    for stage in stages:
        remove_files(out, STAGES[stage].outdated_files(out))
    for folder in outdated_folders(out):
        remove_empty(folder, out)


def _announce(out: Path, config: RunConfig, stages: Sequence[str], device: str) -> None:
    """Logs how long a long run will take, before it starts. One that continues shows its time as progress alone."""
    if not logger.isEnabledFor(logging.INFO):
        return
    from .estimate import MEASURED, announce
    from .threads import limit_torch_threads

    if set(MEASURED) <= set(stages) and not any(STAGES[name].has_results(out) for name in MEASURED):
        limit_torch_threads()
        if line := announce(config, device):
            logger.info(line)


def _keep_replaced(out: Path, error: Exception) -> None:
    """After an error, restores the results that were to be replaced, or says where they are if there are new ones."""
    with contextlib.suppress(OSError):
        replaced = read_record(out).replaced
        if replaced is None:
            return
        if not any(STAGES[name].has_results(out) for name in replaced.stages):
            put_back(out)
        elif isinstance(error, UserError):
            error.args = (f"{error}; until the command has finished, the earlier results are kept in {out / OLD}",)


def _log_counts(out: Path) -> bool:
    """Logs how many masks a finished run has; returns whether there are any."""
    masks = sum(1 for _ in read_masks(out / "masks"))
    errors = sum(1 for _ in read_errors(out / "errors.jsonl"))
    failed = f"; photos and folders that could not be used: {errors}, see {out / 'errors.jsonl'}" if errors else ""
    logger.info(f"{counted(masks, 'mask')} in {out / 'masks'}{failed}")
    return masks > 0


def work(out: Path, stages: Sequence[str], worker: Worker, device: str, trace: Path | None = None) -> None:
    """This worker's part of the stages. device: "cpu" or "cuda". trace: see `start`."""
    from .threads import limit_torch_threads

    try:
        limit_torch_threads()
        device = worker.device(device)
        config = read_config(out)
        source, asked = open_source(config.photos), stages
        if "archive" in stages and (not config.categories or (out / "archive.json").exists()):
            stages = [stage for stage in stages if stage != "index"]  # class folders, or retrieved already
        if worker.is_main:
            _remove_stale(out)  # also of a worker that was killed, when all are started again
        for stage in stages:
            worker.barrier(f"before {stage}")
            with Progress(stage, worker) as progress:
                traced = trace if worker.is_main else None
                STAGES[stage].run(Context(out, config, source, worker, device, progress, traced))
        worker.barrier("end")
        if worker.is_main:
            _remove_outdated(out, asked)
    except Exception as error:
        worker.fail(str(error))
        raise


def _work(out: Path, worker: Worker, device: str, trace: str, *stages: str) -> None:
    work(out, stages, worker, device, Path(trace) if trace else None)


if __name__ == "__main__":
    launcher.as_worker(_work)
