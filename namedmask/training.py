# SPDX-License-Identifier: MIT
"""What every training shares: its checkpoint, its metrics, and going on after an interruption to the same result.

A training's folder:
  metrics.jsonl   what the training is of, then a line every LOG_EVERY steps; the means since the line before
  tensorboard/    the same for TensorBoard
  checkpoint.pt   the whole state, every SAVE_EVERY seconds and at the end
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import Worker
from .errors import UserError
from .files import atomic_write

LOG_EVERY = 50  # steps
SAVE_EVERY = 60.0  # seconds


class TrainingState:
    """The state of a training on disk; `step` is the number of steps done, and where to go on.

    A training that draws all that step i needs from its seed and i ends with the same weights, however often it was
    killed. The main worker writes; all restore.
    """

    def __init__(self, folder: Path, about: dict, network: nn.Module, optimizer: Optimizer, steps: int, worker: Worker):
        """about: what the result depends on, as plain values. Raises UserError where the folder's is of another."""
        self.folder, self.about, self.network, self.optimizer = folder, about, network, optimizer
        self.steps, self.worker = steps, worker
        self.step, self.photos = 0, 0
        self.sums: dict[str, Tensor] = {}  # of the values since the last line
        self._restore()

    def __enter__(self) -> TrainingState:
        if self.worker.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        self.logged = self.saved = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        if self.worker.is_main:
            self.board.close()

    def end_step(self, photos: int, values: dict[str, Tensor]) -> None:
        """A step is done. photos: seen by all workers; values: scalars to keep the mean of, read only when logged."""
        self.step += 1
        self.photos += photos
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
        if not self.worker.is_main:
            return
        last = self.step == self.steps
        if self.step % LOG_EVERY == 0 or last:
            self._log()
        if last or time.monotonic() - self.saved >= SAVE_EVERY:
            self._save()
            self.saved = time.monotonic()

    def _log(self) -> None:
        now = time.monotonic()
        count = (self.step - 1) % LOG_EVERY + 1
        line = {name: float(value) / count for name, value in self.sums.items()}
        line["photos_per_second"] = self.photos / (now - self.logged)
        for name, value in line.items():
            self.board.add_scalar(name, value, self.step)
        self.board.flush()
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step} | {name: round(value, 4) for name, value in line.items()}) + "\n")
        self.logged, self.photos, self.sums = now, 0, {}

    def _save(self) -> None:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        with atomic_write(self.folder / "checkpoint.pt") as file:
            torch.save({**state, "sums": self.sums, "about": self.about}, file)

    def _restore(self) -> None:
        """Takes up the checkpoint, if there is one. What the metrics say of later steps is dropped."""
        metrics, checkpoint = self.folder / "metrics.jsonl", self.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if state["about"] != self.about:
                raise UserError(
                    f"{self.folder} is of a training with other settings or masks; give the old ones or remove it"
                )
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            device = next(self.network.parameters()).device
            self.step, self.sums = state["step"], {name: value.to(device) for name, value in state["sums"].items()}
        if self.worker.is_main:
            lines = [json.dumps(self.about)]
            if self.step and metrics.exists():
                lines += [x for x in metrics.read_text().splitlines() if 0 < json.loads(x).get("step", 0) <= self.step]
            with atomic_write(metrics) as file:
                file.write("".join(line + "\n" for line in lines).encode())
