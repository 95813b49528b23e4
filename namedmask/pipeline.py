# SPDX-License-Identifier: MIT
"""The pipeline from Python: `Pipeline` makes a run, `Run` reads it.

    run = Pipeline("photos", ["cat", "dog"], out="run").run()
    for record in run.masks():
        print(record.photo, record.category, record.score, record.mask().shape)

Nothing is printed. Messages go to the logger "namedmask", progress to the argument `progress`.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .archive import Archive, read_archive
from .config import RunConfig, checked, merge
from .errors import NothingUsable, UserError, explained
from .files import absolute
from .masks import ErrorRecord, MaskRecord, is_refined, read_errors, read_masks
from .progress import Listener, listening
from .record import read_config
from .review import read_review, reviewed_masks
from .selection import Selection, select
from .stages import LABELING, STAGES

if TYPE_CHECKING:
    from .convert import Converted, FormatName
    from .photos import PhotoSource
    from .segmenter.predict import Segmenter

MaskStage = Literal["best", "detector", "experts"]


class Pipeline:
    """Makes a run: photos and category names in, masks and networks out.

    The commands do the same: each method continues what is in the run folder, settings that a stage has used are kept,
    and changed ones are an error unless `overwrite` or `update` is set, see `run`. A run that a command has started can
    be continued here, and the other way round.

    Args:
        photos: Folder, list file (.txt) or .tar of photos. None: those of the run in `out`.
        categories: Category names in class order. None: those of the run in `out`, or the names of class folders.
        out: Run folder; created if missing, continued if it exists.
        preset: Named settings, such as a published experiment's; `namedmask presets` lists them. Other arguments win
            over it.
        workers: Number of processes on the CPU.
        gpus: Number of processes with a GPU each. None: one if there is a GPU and `workers` is 1.
        progress: Called with a `ProgressEvent` whenever a stage has processed photos, and at the end of each stage.
            Events count the photos of all workers; with several, they come from another thread. An exception that it
            raises ends the run, which can be continued.
        settings: Sections of settings, such as ``detector={"name": "selfmask", "image_size": 512}``, with the names on
            the settings page.

    Raises:
        UserError: If a setting does not exist or a value does not fit.
        TypeError: If an argument has another type.
    """

    def __init__(
        self,
        photos: str | os.PathLike[str] | None = None,
        categories: Sequence[str] | None = None,
        *,
        out: str | os.PathLike[str] = "run",
        preset: str | None = None,
        workers: int = 1,
        gpus: int | None = None,
        progress: Listener | None = None,
        **settings: Mapping[str, Any],
    ):
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: expected a function, got {progress!r}")
        workers = operator.index(workers)
        if workers < 1:
            raise UserError(f"workers: expected at least 1, got {workers}")
        gpus = None if gpus is None else operator.index(gpus)
        if gpus is not None and gpus < 0:
            raise UserError(f"gpus: expected at least 0, got {gpus}")
        given = _plain(settings)
        if categories is not None:
            given["categories"] = categories if isinstance(categories, str) else list(categories)
            if not given["categories"]:
                raise UserError("categories: no category name was given")
        given = checked(given)
        if preset is not None:
            from .presets import preset as preset_settings

            given = merge(preset_settings(preset), given)
        if photos is not None:
            if not os.fspath(photos):  # else it would be the working directory
                raise UserError("photos: the path is empty")
            given["photos"] = absolute(os.fsdecode(photos))
        self.out, self.preset = Path(out), preset
        self.workers, self.gpus, self.progress = workers, gpus, progress
        self._given = given

    def __repr__(self) -> str:
        return f"Pipeline({self._given.get('photos')!r}, out={str(self.out)!r})"

    def run(self, *, overwrite: bool = False, update: bool = False) -> Run:
        """Labels the photos: `index`, `archive`, `pseudolabel` and `report`, as `namedmask run` does.

        Args:
            overwrite: Start over; replace the results of these stages and those made from them.
            update: Add names or photos to the results; compute only what is new.

        Returns:
            The run.

        Raises:
            UserError: If the user can fix it: a file is missing, a setting has changed, the memory is not sufficient.
            NothingUsable: If no photo could be used; a UserError.
        """
        return self._run(LABELING, overwrite, update)

    def index(self, *, overwrite: bool = False, update: bool = False) -> Run:
        """Computes the CLIP embeddings of all photos. Class folders need none."""
        return self._run(("index",), overwrite, update)

    def archive(self, *, overwrite: bool = False, update: bool = False) -> Run:
        """Retrieves the best photos of each category: `Run.archive`."""
        return self._run(("archive",), overwrite, update)

    def pseudolabel(self, *, overwrite: bool = False, update: bool = False) -> Run:
        """Makes a mask for every photo of the archive: `Run.masks`."""
        return self._run(("pseudolabel",), overwrite, update)

    def train_saliency(self, *, overwrite: bool = False) -> Run:
        """Trains a SelfMask network on the masks: OUT/saliency/model.safetensors."""
        return self._run(("train-saliency",), overwrite)

    def experts(self, *, overwrite: bool = False, update: bool = False) -> Run:
        """Trains category experts, which make the masks again: `Run.masks`."""
        return self._run(("experts",), overwrite, update)

    def train(self, *, overwrite: bool = False, update: bool = False) -> Run:
        """Trains a segmenter of all categories on the best masks: `Run.segmenter`.

        With `update` it trains another one if the masks have changed.
        """
        return self._run(("train",), overwrite, update)

    def report(self) -> Run:
        """Writes the gallery of the run: `Run.report`."""
        from .report import write_report
        from .run import move_photos

        move_photos(self.out, self._given.get("photos"))
        write_report(self.out)
        return Run(self.out)

    def _run(self, stages: Sequence[str], overwrite: bool, update: bool = False) -> Run:
        from .presets import expect_names
        from .run import start

        if overwrite and update:
            raise UserError("pass overwrite or update, not both")
        if self.preset is not None and "archive" in stages:
            expect_names(self.preset, self._given, self.out)
        try:
            with listening(self.progress):
                has_masks = start(self.out, self._given, stages, self.workers, self.gpus, overwrite, update=update)
        except Exception as error:
            if (why := explained(error)) is error:
                raise
            raise why from error
        if not has_masks:
            raise NothingUsable(f"no photo of {self.out} could be used; see {self.out / 'errors.jsonl'}")
        return Run(self.out)


class Run:
    """The results of a run, finished or not. Reading changes nothing, so a run may be read while it is being made.

    Attributes:
        path: The run folder.

    Args:
        path: The run folder.

    Raises:
        UserError: If it is not a run folder, or if its record is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        read_config(self.path)  # the error

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, categories={len(self.categories)}, stages={self.stages})"

    def __len__(self) -> int:
        """Number of masks that `masks()` yields. It reads them."""
        return sum(1 for _ in self.masks())

    @property
    def stages(self) -> list[str]:
        """The stages that have results, perhaps not all of theirs yet."""
        return [name for name, stage in STAGES.items() if stage.has_results(self.path)]

    @property
    def settings(self) -> RunConfig:
        """The settings that the stages of the run have recorded, and the defaults of the others."""
        return read_config(self.path)

    @property
    def categories(self) -> list[str]:
        """The names of the categories in class order; none if they are class folders that have not been read yet."""
        if (self.path / "archive.json").exists():
            return self.archive.categories
        return self.settings.categories

    @property
    def photos(self) -> PhotoSource:
        """The photos: ``run.photos.decode(record.photo).pixels`` are those of a mask.

        Raises:
            UserError: If they are gone.
        """
        from .photos import open_source

        return open_source(self.settings.photos)

    @property
    def archive(self) -> Archive:
        """The photos of each category. Raises UserError if they have not been retrieved yet."""
        return read_archive(self.path / "archive.json")

    @property
    def report(self) -> Path:
        """The path of the gallery, report.html."""
        return self.path / "report.html"

    def masks(self, stage: MaskStage = "best", selection: Selection | None = None) -> Iterator[MaskRecord]:
        """Iterates over the masks, in the order of the run.

        Args:
            stage: "detector" or "experts": the masks of one of them, none if there are none yet; those of the experts
                count once they are complete. "best": the experts' if there are any, else the detector's, with the
                review (OUT/review.jsonl) applied.
            selection: Which masks to leave out by their scores. It is applied to all masks at once, in memory.

        Returns:
            Records of photo, category and score. `MaskRecord.mask` decodes the mask, bool [height, width].

        Raises:
            ValueError: If there is no such stage.
            DamagedFile: If a file is damaged; a UserError.
        """
        if stage not in get_args(MaskStage):
            raise ValueError(f"stage: expected one of {', '.join(get_args(MaskStage))}, got {stage!r}")
        review = {}
        if stage == "best":
            records, review = reviewed_masks(self.path), read_review(self.path)
        elif stage == "detector":
            records = read_masks(self.path / "masks")
        else:
            records = read_masks(self.path / "refined") if is_refined(self.path) else iter(())
        return records if selection is None else iter(select(records, selection, review))

    def errors(self) -> Iterator[ErrorRecord]:
        """Iterates over the photos that could not be used, with stage and reason, as far as stages have finished."""
        path = self.path / "errors.jsonl"
        return read_errors(path) if path.exists() else iter(())

    def convert(
        self, to: FormatName, out: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
    ) -> Converted:
        """Writes the best masks as a data set for other tools, as `namedmask convert` does.

        Args:
            to: Name of the format, such as "coco" or "yolo-seg".
            out: The folder to write. It appears when it is complete.
            overwrite: Replace a data set in `out` that `convert` has written.
            options: The fields of `namedmask.convert.Options`, such as ``selection=Selection(min_score=0.4)``.

        Raises:
            UserError: If masks, photos or `out` cannot be used as asked; nothing is changed then.
        """
        from .convert import Options, convert

        return convert(self.path, to, out, Options(**options), overwrite=overwrite)

    def segmenter(self, device: str = "cpu", precision: str | None = None) -> Segmenter:
        """Loads the segmenter that `Pipeline.train` has trained.

        Args:
            device: Device as torch names it.
            precision: "float32" or "bfloat16"; None: bfloat16 on a GPU, float32 on the CPU.

        Raises:
            UserError: If there is none.
        """
        from .segmenter.predict import Segmenter

        return Segmenter.load(self.path / "segmenter", device=device, precision=precision)


def _plain(value: Any) -> Any:
    """Python's dictionaries, lists, strings and numbers instead of other mappings, tuples, paths and those of numpy."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return os.fsdecode(value) if isinstance(value, os.PathLike) else value
