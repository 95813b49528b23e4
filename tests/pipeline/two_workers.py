# SPDX-License-Identifier: MIT
"""One of two workers that share batches: python two_workers.py BATCHES. The environment determines its rank.

BATCHES is a file with a list of batches, each with the name of an encoder, photos, labels and settings. The main worker
writes the loss, gradients and BatchNorm statistics of one step for each batch to the same name with the suffix .out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from namedmask import distributed
from namedmask.backbones import untrained_encoder
from namedmask.config import SegmenterTraining
from namedmask.segmenter.batch_norm import synchronize
from namedmask.segmenter.deeplab import DeepLab
from namedmask.segmenter.training import accumulate_gradients


def step(batch: dict, worker: distributed.Worker) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = DeepLab(untrained_encoder(batch["encoder"]), classes=4, head_channels=16)
    if worker.count > 1:
        synchronize(network, "cpu")
    network.train()
    parallel = DistributedDataParallel(network) if worker.count > 1 else None
    part = worker.share(0, len(batch["photos"]))
    photos, labels = (batch[name][part.start : part.stop] for name in ("photos", "labels"))
    loss = accumulate_gradients(
        network, parallel, photos, labels, SegmenterTraining(**batch["settings"]), worker, part.start
    )
    statistics = {name: value for name, value in network.named_buffers() if "running" in name or "num_" in name}
    return {"loss": loss} | {name: p.grad for name, p in network.named_parameters()} | statistics


if __name__ == "__main__":
    path = Path(sys.argv[1])
    worker = distributed.current()
    with worker.collective("cpu"):
        results = [step(batch, worker) for batch in torch.load(path)]
        if worker.is_main:
            torch.save(results, path.with_suffix(".out"))
