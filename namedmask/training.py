# SPDX-License-Identifier: MIT
"""What every training shares: its loop, checkpoint and metrics, how it continues, and what it does without a photo.

A training's folder:
  metrics.jsonl   the settings in the first line, then a line every LOG_EVERY steps with means since the last
                  and, if photos are held out, a line per score
  tensorboard/    the same for TensorBoard, if it is installed
  checkpoint.pt   the whole state, every SAVE_EVERY seconds and at the end
  best.safetensors   the network at its best score, if photos are held out
  00000.errors.jsonl   photos that the first worker could not read, and so on
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import Worker
from .errors import DamagedFile, UserError, first_line
from .files import atomic_write, move, outdated_folders, remove_empty, write_error, writing
from .masks import RESIZED, ErrorRecord, MaskRecord, errors_path
from .memory import MemoryBudget
from .photos import PhotoError, PhotoSource
from .progress import Progress, warn
from .threads import map_ahead, thread_count, use_one_torch_thread
from .weights import read, write

LOG_EVERY = 50  # steps
SAVE_EVERY = 60.0  # seconds
BYTES_PER_PIXEL = 24  # of a photo in a training: decoding, or pixels, mask and labels
NOTE_EVERY = 10  # steps; reading a loss makes the CPU wait for a GPU
AGREEMENT = "agreement with held-out masks"
HELD_OUT = "agreement_with_held_out_masks"  # in metrics.jsonl

Result = TypeVar("Result")
Network = TypeVar("Network", bound=nn.Module)


def trained_on(folder: Path, again: str) -> str:
    """Returns the digest of the masks that a finished training was about, from its metrics.jsonl.

    Args:
        folder: Folder of the training.
        again: The command that repeats it, for the message.

    Raises:
        DamagedFile: If the file has none.
    """
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as lines:
            return json.loads(next(lines))["masks"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        raise DamagedFile(path, error, remedy=f"train the network again with `{again} --overwrite`") from None


class Scoring(NamedTuple):
    """How a training is scored.

    Attributes:
        score: The agreement with held-out masks, the same in every worker; None if none of their photos can be read.
        every: Steps between two scores. The last step is scored, too.
    """

    score: Callable[[], float | None]
    every: int


class Score(NamedTuple):
    """A score and the number of steps after which it was reached."""

    value: float
    step: int


class MovingAverage(Generic[Network]):
    """A network whose weights and statistics are an exponential moving average of those of another one in training.

    Attributes:
        network: The average, in eval mode.
    """

    def __init__(self, trained: Network, decay: float):
        """
        Args:
            trained: The network in training.
            decay: Share of the average that a step keeps.
        """
        self.trained, self.decay = trained, decay
        self.network = copy.deepcopy(trained).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after step `step` = 1, 2, ...; the first steps count little, for those weights are poor."""
        change = 1 - min(self.decay, step / (9 + step))
        for average, value in zip(self.network.state_dict().values(), self.trained.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, change)
            else:
                average.copy_(value)  # numbers of batches


class TrainingState:
    """The state of a training on disk. `step` is the number of finished steps, `latest` and `best` are its scores.

    A training that derives the randomness of step i from its seed and i ends with the same weights however often it was
    interrupted. The main worker writes; all workers restore.
    """

    def __init__(
        self,
        folder: Path,
        about: dict,
        network: nn.Module,
        optimizer: Optimizer,
        steps: int,
        worker: Worker,
        scoring: Scoring | None = None,
        average: MovingAverage[Any] | None = None,
    ):
        """
        Args:
            folder: where the files are.
            about: what the result depends on, as plain values.
            network: restored from the checkpoint, if there is one, and saved.
            optimizer: likewise.
            steps: length of the training.
            scoring: how the network is scored; None: it is not.
            average: of the network; it is what is scored and kept. None: the network itself.

        Raises:
            UserError: the checkpoint in `folder` is of a training about something else.
        """
        self.folder, self.about, self.network, self.optimizer = folder, about, network, optimizer
        self.steps, self.worker, self.scoring, self.average = steps, worker, scoring, average
        self.result = average.network if average else network
        self.latest: Score | None = None
        self.best: Score | None = None
        self.step, self.photos = 0, 0
        self.sums: dict[str, Tensor] = {}  # of the values since the last line
        self.unchecked: list[Tensor] = []  # sums of the losses of the latest steps
        self.board: Any = None
        self._restore()

    def __enter__(self) -> TrainingState:
        if self.worker.is_main:
            with writing(self.folder / "tensorboard"):
                self.board = _tensorboard(str(self.folder / "tensorboard"), self.step + 1)
        self.logged = self.saved = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._use_board(lambda board: board.close())

    def end_step(self, photos: int, values: dict[str, Tensor]) -> None:
        """Counts a finished step; scores, logs and saves when it is time. Every worker calls it.

        Args:
            photos: number of photos that all workers have seen in it.
            values: scalars whose means are logged. They are read only then.
        """
        self.step += 1
        self.photos += photos
        if self.average:
            self.average.update(self.step)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.unchecked.append(sum(values.values(), torch.zeros(())))
        last = self.step == self.steps
        if self.step % NOTE_EVERY == 0 or last or self.unchecked[-1].device.type == "cpu":
            self._expect_finite_losses()
        if self.scoring and (self.step % self.scoring.every == 0 or last):
            self._score(self.scoring.score)
        if not self.worker.is_main:
            return
        if self.step % LOG_EVERY == 0 or last:
            self._log()
        if last or time.monotonic() - self.saved >= SAVE_EVERY:
            self._save()
            self.saved = time.monotonic()

    def _expect_finite_losses(self) -> None:
        finite = torch.stack(self.unchecked).isfinite().tolist() if self.unchecked else []
        if not all(finite):
            self._fail(f"the loss of step {self.step - len(finite) + finite.index(False) + 1} is NaN or infinite")
        self.unchecked = []

    def _fail(self, reason: str) -> NoReturn:
        """Raises UserError: the training has diverged."""
        checkpoint = self.folder / "checkpoint.pt"
        kept = f"; {checkpoint} is of an earlier step" if checkpoint.exists() else ""
        raise UserError(
            f"{self.folder}: {reason}. Lower --lr and --encoder-lr{', and start over with --overwrite' if kept else ''}"
            f"{kept}"
        )

    def _score(self, score: Callable[[], float | None]) -> None:
        """Scores the network and keeps it if it is the best so far."""
        began = time.monotonic()
        self._expect_finite_losses()
        if (value := score()) is None:
            return
        self.latest = Score(value, self.step)
        is_best = self.best is None or value > self.best.value
        self.best = self.latest if is_best else self.best
        if self.worker.is_main:
            self._write_metrics({HELD_OUT: value})
            if is_best:
                self._expect_finite_weights()
                write(self.folder / "best.safetensors", self.result)
        self.logged += time.monotonic() - began  # photos_per_second is that of the training

    def note(self) -> str:
        """The latest score, for the progress; "" if there is none."""
        return f"{AGREEMENT} {self.latest.value:.3f}" if self.latest else ""

    def _log(self) -> None:
        now = time.monotonic()
        count = (self.step - 1) % LOG_EVERY + 1
        line = {name: float(value) / count for name, value in self.sums.items()}
        line["photos_per_second"] = self.photos / (now - self.logged)
        self._write_metrics(line)
        self.logged, self.photos, self.sums = now, 0, {}

    def _write_metrics(self, line: dict[str, float]) -> None:
        rounded = {name: round(value, 4) for name, value in line.items()}
        text = json.dumps({"step": self.step} | rounded, allow_nan=False) + "\n"
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(text)
        except OSError as error:
            raise write_error(path, error) from error

        def add(board: Any) -> None:
            for name, value in line.items():
                board.add_scalar(name, value, self.step)
            board.flush()

        self._use_board(add)

    def _use_board(self, use: Callable[[Any], None]) -> None:
        """Calls a function with the TensorBoard writer, if there is one. The training goes on without a broken one."""
        if self.board is None:
            return
        try:
            use(self.board)
        except OSError as error:
            raise write_error(self.folder / "tensorboard", error) from error
        except Exception as error:
            self.board = None
            _warn_that_tensorboard(_fails(error))

    def _expect_finite_weights(self) -> None:
        for name, tensor in self.network.state_dict().items():
            if not tensor.isfinite().all():
                self._fail(f"{name} is NaN or infinite after step {self.step}")

    def _save(self) -> None:
        self._expect_finite_losses()
        self._expect_finite_weights()
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        if self.average:
            state["average"] = self.average.network.state_dict()
        with atomic_write(self.folder / "checkpoint.pt") as file:
            torch.save({**state, "sums": self.sums, "best": self.best and tuple(self.best), "about": self.about}, file)

    def _restore(self) -> None:
        """Loads the checkpoint, if there is one, and drops the metrics of later steps."""
        metrics, checkpoint = self.folder / "metrics.jsonl", self.folder / "checkpoint.pt"
        if checkpoint.exists():
            remedy = "delete it and run the same command again; this training starts over"
            try:
                state = read(checkpoint).tree
                about = state["about"]
            except (UserError, KeyError) as error:
                raise DamagedFile(checkpoint, error, remedy=remedy) from None
            if about != self.about:
                raise UserError(
                    f"{checkpoint} is of a training with other settings or masks, or review.jsonl has changed since; "
                    "continue with those, or start over with --overwrite"
                )
            try:
                self._load(state)
            except Exception as error:  # whatever a missing, superfluous or misshapen entry raises
                raise DamagedFile(checkpoint, error, remedy=remedy) from None
        if self.worker.is_main:
            lines = [json.dumps(self.about)]
            if self.step and metrics.exists():
                lines += [line for line in metrics.read_text(errors="replace").splitlines() if self._is_past(line)]
            with atomic_write(metrics) as file:
                file.write("".join(line + "\n" for line in lines).encode())

    def _load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.network.load_state_dict(state["average"])
        tensors = [*self.network.state_dict().values(), *self.result.state_dict().values(), *state["sums"].values()]
        tensors += [value for slots in self.optimizer.state.values() for value in slots.values()]
        if not all(torch.isfinite(tensor).all() for tensor in tensors if isinstance(tensor, Tensor)):
            raise ValueError("it has values that are not finite")
        if type(state["step"]) is not int or not 0 < state["step"] <= self.steps:
            raise ValueError(f"step: expected 1 to {self.steps}, got {state['step']!r}")
        if state["best"] is not None:
            self.best = Score(*state["best"])
            if not 0 <= self.best.value <= 1 or not 0 < self.best.step <= state["step"]:
                raise ValueError(f"best: expected a score and its step, got {state['best']!r}")
        device = next(self.network.parameters()).device
        self.step, self.sums = state["step"], {name: value.to(device) for name, value in state["sums"].items()}

    def _is_past(self, line: str) -> bool:
        """Whether a line of metrics.jsonl is of a finished step. A kill may have cut off the last line."""
        try:
            return 0 < json.loads(line).get("step", 0) <= self.step
        except (ValueError, AttributeError, TypeError):
            return False


def take_outdated(out: Path, folder: Path, about: dict, *results: Path) -> bool:
    """Moves a training from before an update of the run folder `out` back, if there is one about the same.

    If it is killed, the next call continues it.

    Args:
        out: The run folder.
        folder: Where the training is to be, below `out`.
        about: What the result depends on, as for `TrainingState`.
        results: Files of the training outside `folder`.

    Returns:
        Whether there is one.
    """
    for outdated in reversed(outdated_folders(out)):
        before = outdated / folder.relative_to(out)
        metrics = before / "metrics.jsonl"
        if metrics.exists() and metrics.read_text(errors="replace").partition("\n")[0] == json.dumps(about):
            files = [path for path in sorted(before.rglob("*")) if path.is_file() and path != metrics]
            files += [path for result in results if (path := outdated / result.relative_to(out)).exists()]
            for path in (*files, metrics):  # the metrics last: they identify the others
                move(path, out / path.relative_to(outdated))
                remove_empty(path.parent, out)
            return True
    return False


class TrainingPhotos:
    """The photos of a training. One that cannot be read any more is replaced by another one and reported.

    The replacement depends on the photos alone, so that a training stays reproducible and independent of the number of
    workers. It may be used from several threads.

    Args:
        source: The photos.
        records: A mask for each training sample.
        folder: Folder of the training, for the errors.
        progress: Progress of the stage, in whose name errors are reported.
    """

    def __init__(self, source: PhotoSource, records: Sequence[MaskRecord], folder: Path, progress: Progress):
        self.source, self.records, self.progress = source, records, progress
        self.path = errors_path(folder / f"{progress.worker.rank:05}.jsonl")
        self.unusable: dict[str, str] = {}  # with the reason
        self.budget, self.lock = MemoryBudget(), threading.Lock()

    def use(self, numbers: Iterable[int], function: Callable[[int, np.ndarray], Result]) -> Result:
        """Calls `function` with the first of the samples whose photo can be read.

        Args:
            numbers: Numbers of the samples, in order of preference.
            function: Called with the number of the sample and its photo, uint8 [H, W, 3].

        Returns:
            The result of `function`.

        Raises:
            UserError: If no photo can be read.
        """
        for number in numbers:
            if (result := self.use_one(number, function)) is not None:
                return result
        record = self.records[number]
        raise UserError(
            f"none of the photos of {record.category!r} can be used any more (the last one: {record.photo!r}: "
            f"{self.unusable[record.photo]}): restore them, or remove the category and its masks"
        )

    def use_one(self, number: int, function: Callable[[int, np.ndarray], Result]) -> Result | None:
        """Calls `function` with a sample, as `use` does. Returns None if its photo cannot be read."""
        record = self.records[number]
        if record.photo in self.unusable:
            return None
        try:
            with self.budget.hold(math.prod(record.size) * BYTES_PER_PIXEL):
                pixels = self.source.decode(record.photo).pixels
                if pixels.shape[:2] != record.size:
                    raise PhotoError(record.photo, RESIZED)
                return function(number, pixels)
        except PhotoError as error:
            self._report(error)
            return None

    def _report(self, error: PhotoError) -> None:
        with self.lock:
            if error.photo not in self.unusable:
                self.unusable[error.photo] = error.reason
                with self.path.open("ab") as file:
                    file.write(ErrorRecord(error.photo, self.progress.stage, error.reason).to_line())


def loaded_batches(
    load: Callable[[int], tuple[Tensor, Tensor]], steps: range, batch_size: int, worker: Worker
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this worker's photos and targets of each step, which threads load ahead.

    Args:
        load: Returns the photo and the target of a sample, by its number in the whole training; step s has the numbers
            from s * `batch_size` on.
        steps: Numbers of the steps.
        batch_size: Samples of a batch of all workers together.
        worker: This worker.
    """
    numbers = (number for step in steps for number in worker.share(step * batch_size, batch_size))
    count = batch_size // worker.count
    samples = map_ahead(load, numbers, thread_count(), use_one_torch_thread, ahead=count)
    for _ in steps:
        photos, targets = zip(*itertools.islice(samples, count), strict=True)
        yield torch.stack(photos), torch.stack(targets)


def fit(
    state: TrainingState,
    batches: Iterator[tuple[Tensor, Tensor]],
    step: Callable[[Tensor, Tensor], dict[str, Tensor]],
    learning_rate: Callable[[int, float], float],
    batch_size: int,
    device: str,
    progress: Progress,
) -> None:
    """Runs the remaining steps of a training.

    Args:
        state: The training, at the step where it continues.
        batches: This worker's photos and targets of each remaining step.
        step: Computes the gradients and losses of a batch on `device`; the first loss is shown as progress.
        learning_rate: The rate of a step, from a parameter group's highest rate, which is its entry "highest".
        batch_size: Photos of a batch of all workers together.
        device: Device of this worker, as torch names it.
        progress: Advances with every photo.
    """
    share = batch_size // state.worker.count
    progress.advance(state.step * share, existing=True)
    while state.step < state.steps:
        began = time.monotonic()
        photos, targets = next(batches)
        waited = torch.tensor(time.monotonic() - began)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, group["highest"])
        state.optimizer.zero_grad()
        losses = step(photos.to(device), targets.to(device))
        state.optimizer.step()
        state.end_step(batch_size, {**losses, "seconds_waiting_for_photos": waited})
        if state.step % NOTE_EVERY == 0:
            name, value = next(iter(losses.items()))
            progress.note = ", ".join(filter(None, (f"{name} {float(value):.3f}", state.note())))
        progress.advance(share)


@functools.cache  # once, not for every category
def _warn_that_tensorboard(reason: str) -> None:
    warn(f"tensorboard {reason}: metrics are in metrics.jsonl alone")


def _report_unless_tensorboard(report: Callable[[Any], object], args: Any) -> None:
    """Reports an exception in a thread, unless it is in TensorBoard's: the next call of the writer raises it again."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        report(args)


def _fails(error: Exception) -> str:
    return f"fails ({type(error).__name__}: {first_line(error)})"


@functools.cache  # a second import of a broken package may raise something else
def _summary_writer() -> Any:
    """TensorBoard's SummaryWriter; None, and a warning, if it is not installed or its import fails."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # a TypeError of another protobuf, for example
        missing = isinstance(error, ModuleNotFoundError) and error.name in ("tensorboard", "torch.utils.tensorboard")
        _warn_that_tensorboard("is not installed" if missing else _fails(error))
        return None
    threading.excepthook = functools.partial(_report_unless_tensorboard, threading.excepthook)
    return SummaryWriter


def _tensorboard(folder: str, first_step: int) -> Any:
    """A TensorBoard writer; None, and a warning, if there is none that works. Raises OSError of `folder`."""
    if (writer := _summary_writer()) is None:
        return None
    try:
        return writer(folder, purge_step=first_step)
    except OSError:
        raise
    except UnicodeEncodeError:  # tensorboard writes to paths in UTF-8 only
        _warn_that_tensorboard(f"cannot write to {folder}, which is not UTF-8")
    except Exception as error:
        _warn_that_tensorboard(_fails(error))
    return None
