# SPDX-License-Identifier: MIT
"""A segmenter as one ONNX file for photos of any size, checked with onnxruntime before it is left on the disk.

Input:    photos  uint8 [n, 3, H, W], RGB as decoded: the file holds the normalization
Outputs:  labels  int64 [n, H, W], the class of every pixel; logits float32 [n, classes, ceil(H / 4), ceil(W / 4)]
Metadata: names   JSON list of the names of the classes, the background's first
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..files import atomic_write
from .predict import Segmenter

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OPSET = 18
TOLERANCE = 1e-3  # of the largest logit
SURE = 1e-2  # of the largest logit: where the best two are nearer than that, rounding may choose
CHECKED = ((1, 161, 203), (2, 96, 128))  # n, H, W of photos of noise


class _Exported(nn.Module):
    """What the file computes: photos uint8 [n, 3, H, W] -> labels, logits."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.network = segmenter.network
        self.register_buffer("mean", segmenter.mean)
        self.register_buffer("std", segmenter.std)

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network.coarse_logits((photos.float() / 255 - self.mean) / self.std)
        return F.interpolate(logits, photos.shape[2:], mode="bilinear").argmax(1), logits


def export_onnx(segmenter: Segmenter, path: Path) -> float:
    """Writes a segmenter, of the CPU and in float32, to an ONNX file that onnxruntime runs to the same result.

    Returns the largest difference of a logit between the two, on photos of noise, as a share of the largest logit.
    Raises UserError without the packages or the folder, and where the two differ; then there is no file.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder, or {path.parent} is none")
    try:
        import onnx
        import onnxscript  # noqa: F401  what torch's exporter writes with
        from onnxruntime import InferenceSession
    except ImportError as error:
        raise UserError(f"export wants packages that are not here ({error}): pip install 'namedmask[onnx]'") from None
    network = _Exported(segmenter).eval()
    # No side of the example is a multiple of the strides or equals another, so that none is taken for a constant.
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, 75, 101, dtype=torch.uint8),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["photos"],
        output_names=["labels", "logits"],
        dynamic_shapes=({0: torch.export.Dim("n"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")},),
        verbose=False,
    )
    model = program.model_proto
    onnx.helper.set_model_props(model, {"names": json.dumps(segmenter.names)})
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    worst = _difference(network, InferenceSession(data, providers=["CPUExecutionProvider"]))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path} is not written: onnxruntime's result differs from torch's by {worst:.2g} of the largest logit, "
            f"more than {TOLERANCE:g}"
        )
    with atomic_write(path) as file:
        file.write(data)
    return worst


@torch.inference_mode()
def _difference(network: _Exported, session: InferenceSession) -> float:
    """The largest difference of a logit as a share of the largest; inf where a label differs that is no near tie."""
    worst, draw = 0.0, torch.Generator().manual_seed(0)
    for n, height, width in CHECKED:
        photos = torch.randint(0, 256, (n, 3, height, width), generator=draw, dtype=torch.uint8)
        labels, logits = network(photos)
        their_labels, their_logits = (
            torch.from_numpy(x) for x in session.run(["labels", "logits"], {"photos": photos.numpy()})
        )
        largest = logits.abs().max()
        best = F.interpolate(logits, (height, width), mode="bilinear").topk(2, dim=1).values
        if ((labels != their_labels) & (best[:, 0] - best[:, 1] > SURE * largest)).any():
            return float("inf")
        worst = max(worst, float((logits - their_logits).abs().max() / largest))
    return worst
