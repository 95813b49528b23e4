# SPDX-License-Identifier: MIT
"""The loop, metrics and checkpoints that all trainings share, with a network of one layer."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from namedmask import training
from namedmask.distributed import Worker
from namedmask.errors import DamagedFile, UserError
from namedmask.masks import MaskRecord
from namedmask.photos import PhotoSource
from namedmask.progress import Progress
from namedmask.training import MovingAverage, TrainingPhotos, TrainingState, fit


class Board:
    """TensorBoard's writer: records what is written."""

    def __init__(self, folder: str, first_step: int):
        self.first_step, self.scalars, self.closed = first_step, [], False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, round(value, 4), step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it; TensorBoard is replaced by a Board."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(training, "_tensorboard", Board)
    return clock


def new_state(folder: Path, steps: int, worker: Worker | None = None, about: str = "a") -> TrainingState:
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam([{"params": network.parameters(), "highest": 0.1}])
    return TrainingState(folder, {"about": about}, network, optimizer, steps, worker or Worker())


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_means_are_logged_every_50_steps_and_checkpoints_saved_every_minute(tmp_path, clock, monkeypatch):
    saved = []
    monkeypatch.setattr(TrainingState, "_save", lambda state: saved.append(state.step))
    with new_state(tmp_path, 130) as state:
        for step in range(1, 131):
            clock.now += 1
            state.end_step(3, {"loss": torch.tensor(step / 3)})
    assert saved == [60, 120, 130]
    first, *rest = lines(tmp_path)
    means = [{"step": 50, "loss": 8.5}, {"step": 100, "loss": 25.1667}, {"step": 130, "loss": 38.5}]
    assert first == {"about": "a"} and rest == [mean | {"photos_per_second": 3.0} for mean in means]
    assert state.board.first_step == 1 and state.board.closed
    assert state.board.scalars[:2] == [("loss", 8.5, 50), ("photos_per_second", 3.0, 50)]


def test_other_workers_write_nothing(tmp_path, clock):
    with new_state(tmp_path, 1, Worker(1, 2)) as state:
        state.end_step(1, {"loss": torch.tensor(1.0)})
    assert state.step == 1 and state.board is None and not list(tmp_path.iterdir())


def test_losses_on_other_devices_are_read_every_10_steps(tmp_path, clock, monkeypatch):
    read = []
    for name in ("_log", "_save"):
        monkeypatch.setattr(TrainingState, name, lambda state: None)
    monkeypatch.setattr(TrainingState, "_expect_finite_losses", lambda state: read.append(state.step))
    with new_state(tmp_path, 25) as state:
        for _ in range(25):
            state.end_step(1, {"loss": torch.zeros((), device="meta")})
    assert read == [10, 20, 25]


def test_the_step_of_a_loss_that_is_not_finite_is_named(tmp_path):
    state = new_state(tmp_path, 9)
    state._expect_finite_losses()
    state.step, state.unchecked = 5, [torch.tensor(value) for value in (1.0, torch.nan, 1.0)]
    with pytest.raises(UserError, match=r"the loss of step 4 is NaN or infinite\. Lower --lr and --encoder-lr$"):
        state._expect_finite_losses()
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(UserError, match=r"and start over with --overwrite; .*checkpoint\.pt is of an earlier step$"):
        state._expect_finite_losses()


def interrupted(folder: Path, steps: int = 9) -> dict:
    """Trains for 3 of 9 steps; returns the checkpoint."""
    with contextlib.suppress(KeyboardInterrupt), new_state(folder, steps) as state:
        for _ in range(3):
            state.network(torch.ones(1, 2)).sum().backward()
            state.optimizer.step()
            state.end_step(4, {"loss": torch.tensor(2.0)})
        state._save()
        raise KeyboardInterrupt
    return torch.load(folder / "checkpoint.pt")


def test_moving_average_of_weights_and_statistics():
    network = torch.nn.BatchNorm2d(1)
    average = MovingAverage(network, 0.4)
    expected = 1.0
    for step in range(1, 12):
        network.weight.data.fill_(step)
        network.running_mean.fill_(step - 1)
        network.num_batches_tracked += 1
        average.update(step)
        kept = min(0.4, step / (9 + step))
        expected = kept * expected + (1 - kept) * step
    assert average.network.weight.item() == pytest.approx(expected)
    assert average.network.running_mean.item() == pytest.approx(expected - 1)
    assert int(average.network.num_batches_tracked) == 11 and network.weight.item() == 11
    assert network.training and not average.network.training


def test_training_continues_from_a_checkpoint(tmp_path, clock):
    checkpoint = interrupted(tmp_path)
    past = ['{"step": 1}', '{"step": 3}']
    others = ['{"step": 4}', '{"step": 0}', '{"step": -1}', "{}", "[]", "3", '{"step": "1"}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join([json.dumps({"about": "a"}), *past, *others]))
    with new_state(tmp_path, 9) as state:
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [json.dumps({"about": "a"}), *past]
        assert state.step == 3 and float(state.sums["loss"]) == 6 and state.board.first_step == 4
        assert all(torch.equal(checkpoint["network"][n], value) for n, value in state.network.state_dict().items())
        assert next(iter(state.optimizer.state.values()))["step"] == 3
    with pytest.raises(UserError, match="is of a training with other settings or masks"):
        new_state(tmp_path, 9, about="b")
    assert new_state(tmp_path, 3).step == 3


def change(*keys):
    """A function that sets an entry of nested dicts to a value."""

    def set_entry(tree, value):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return set_entry


@pytest.mark.parametrize(
    ("set_entry", "value", "message"),
    [
        (change("step"), 0, "step: expected 1 to 9, got 0"),
        (change("step"), 10, "step: expected 1 to 9, got 10"),
        (change("step"), True, "step: expected 1 to 9, got True"),
        (change("sums", "loss"), torch.tensor(torch.nan), "not finite"),
        (change("network", "bias"), torch.tensor([torch.inf]), "not finite"),
        (change("optimizer", "state", 0, "exp_avg"), torch.full((1, 2), torch.nan), "not finite"),
        (change("network"), {}, "RuntimeError"),
    ],
)
def test_damaged_checkpoints_are_rejected(tmp_path, clock, set_entry, value, message):
    checkpoint = interrupted(tmp_path)
    set_entry(checkpoint, value)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(DamagedFile, match=message):
        new_state(tmp_path, 9)


@pytest.mark.parametrize("workers", [1, 2])
def test_fit_runs_the_remaining_steps(tmp_path, clock, workers):
    """Losses of photos, learning rates and progress, which counts this worker's share of the photos."""
    interrupted(tmp_path, steps=25)
    seen, rates = [], []

    def batches():
        for number in range(22):
            clock.now += 2
            yield torch.full((4 // workers, 2), number), torch.zeros(1)

    def step(photos, targets):
        assert all(parameter.grad is None for parameter in state.network.parameters())
        seen.append(int(photos[0, 0]))
        rates.append(state.optimizer.param_groups[0]["lr"])
        loss = state.network(photos.float()).sum() * 0
        loss.backward()
        return {"loss": loss.detach() + 0.125 * seen[-1], "other": torch.tensor(9.0)}

    with Progress("train", Worker()) as progress, new_state(tmp_path, 25, Worker(0, workers)) as state:
        fit(state, batches(), step, lambda step, highest: highest * step, 4, "cpu", progress)
    assert seen == list(range(22)) and rates == pytest.approx([0.1 * step for step in range(3, 25)])
    assert (progress.skipped, progress.done) == (12 // workers, 100 // workers)
    assert progress.note == "loss 2.000"  # that of step 20, the seventeenth of these
    last = lines(tmp_path)[-1]
    assert last["other"] == 7.92 and last["seconds_waiting_for_photos"] == 1.76  # means over 25 steps, 22 of them here


def test_replaced_photos(tmp_path):
    """One that cannot be read is reported once and not tried again; memory for the others is reserved."""
    records = [MaskRecord.from_mask(f"{n}.png", np.ones((3, 5), bool), "cat", None, 1.0) for n in range(3)]
    for number, size in enumerate(((5, 3), (3, 5))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    source = PhotoSource(tmp_path)
    photos = TrainingPhotos(source, records, tmp_path, Progress("train", Worker(3, 4)))
    held, decoded, decode = [], [], source.decode
    photos.budget = types.SimpleNamespace(hold=lambda size: held.append(size) or contextlib.nullcontext())
    source.decode = lambda name: decoded.append(name) or decode(name)
    for _ in range(2):
        assert photos.use([2, 1, 0], lambda number, pixels: (number, pixels.shape)) == (0, (3, 5, 3))
    assert decoded == ["2.png", "1.png", "0.png", "0.png"] and held == [3 * 5 * 24] * 4
    assert photos.path.name == "00003.errors.jsonl" and len(photos.path.read_text().splitlines()) == 2
    with pytest.raises(
        UserError, match=r"of 'cat' can be used any more \(the last one: '1.png': has changed since .*\)"
    ):
        photos.use([2, 1], lambda number, pixels: None)


@pytest.fixture
def no_tensorboard_yet():
    for function in (training._summary_writer, training._warn_that_tensorboard):
        function.cache_clear()
    yield
    for function in (training._summary_writer, training._warn_that_tensorboard):
        function.cache_clear()


WRITER = """
class SummaryWriter:
    def __init__(self, folder, purge_step):
        pass

    def add_scalar(self, name, value, step):
        pass

    flush = close = lambda self: None
"""
BROKEN = {
    "import": "raise TypeError('Descriptors cannot be created directly.\\nmore')",
    "its module": "import google_protobuf_that_is_missing",
    "its version": "raise ImportError('version 1.15 or above')",
    "constructor": WRITER.replace("pass", "raise TypeError('x')", 1),
    "UTF-8": WRITER.replace("pass", "'\\udcff'.encode()", 1),
    "add_scalar": WRITER + "\n    def add_scalar(self, *_):\n        raise AttributeError('x')",
    "flush": WRITER + "\n    def flush(self):\n        raise RuntimeError",
    "close": WRITER + "\n    def close(self):\n        raise ValueError('x')",
}
REASONS = {
    "import": "fails (TypeError: Descriptors cannot be created directly.)",
    "its module": "fails (ModuleNotFoundError: No module named 'google_protobuf_that_is_missing')",
    "its version": "fails (ImportError: version 1.15 or above)",
    "constructor": "fails (TypeError: x)",
    "UTF-8": "cannot write to",
    "add_scalar": "fails (AttributeError: x)",
    "flush": "fails (RuntimeError: RuntimeError)",
    "close": "fails (ValueError: x)",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_training_goes_on_without_a_broken_tensorboard(
    broken, tmp_path, monkeypatch, printing, capsys, no_tensorboard_yet
):
    (tmp_path / "tensorboard.py").write_text(BROKEN[broken])
    monkeypatch.setattr(torch.utils, "__path__", [str(tmp_path)])
    monkeypatch.setattr(torch.utils, "tensorboard", None, raising=False)  # set again by the import, removed at the end
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    del sys.modules["torch.utils.tensorboard"]
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        with new_state(tmp_path / name, 2) as state:
            for _ in range(2):
                state.end_step(3, {"loss": torch.tensor(1.0)})
        assert lines(tmp_path / name)[-1]["loss"] == 1
    warnings = capsys.readouterr().err
    folders = 2 if broken == "UTF-8" else 1
    assert warnings.count(f"tensorboard {REASONS[broken]}") == warnings.count("warning") == folders
    assert warnings.count("metrics are in metrics.jsonl alone\n") == folders


def test_a_folder_that_tensorboard_cannot_write_is_an_error(tmp_path, no_tensorboard_yet):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").symlink_to("missing")
    with pytest.raises(OSError, match="tensorboard"), new_state(tmp_path, 1):
        pass


@pytest.mark.parametrize("event", [0, 1, 2])  # that fills the disk: the header, or metrics of the step
def test_a_full_disk_is_one_error_of_tensorboard(event, tmp_path, monkeypatch, no_tensorboard_yet):
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    printed, events, write = [], iter(range(100)), record_writer.write

    def write_until_full(writer, data):
        if next(events) >= event:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, data)

    monkeypatch.setattr(record_writer, "write", write_until_full)
    monkeypatch.setattr(threading, "excepthook", printed.append)
    with pytest.raises(OSError, match=r"tensorboard cannot be written: No space"), new_state(tmp_path, 1) as state:
        state.end_step(3, {"loss": torch.tensor(1.0)})
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert [one.thread for one in printed] == [thread]


def test_tensorboard_may_be_missing(monkeypatch, printing, capsys, no_tensorboard_yet):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # its import raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert training._tensorboard("x", 4) is training._tensorboard("x", 4) is None
    assert capsys.readouterr().err.count("tensorboard is not installed") == 1
