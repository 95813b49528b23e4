# SPDX-License-Identifier: MIT
"""Exports a segmenter to ONNX for photos of any size; the model is verified with onnxruntime before it is written.

Input:    photos  uint8 [n, 3, H, W], RGB; normalization is part of the model
Outputs:  labels  int64 [n, H, W], the class of every pixel; logits float32 [n, classes, ceil(H / 4), ceil(W / 4)]
Metadata: names   JSON list of the names of the classes, the background first
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import pos_embed_sincos
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..files import atomic_write
from ..weights import replaced
from .deeplab import DeepLab
from .predict import Segmenter

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_timm_grid = pos_embed_sincos._build_grid

OPSET = 18
TOLERANCE = 1e-3  # maximum error of a logit, relative to the largest logit
NEAR_TIE = 1e-2  # labels may differ where the two largest logits are closer than this, relative to the largest logit
CHECKED_SHAPES = ((1, 161, 203), (2, 96, 128))  # n, H, W of the random photos on which the model is verified


class _Exported(nn.Module):
    """The exported computation: photos uint8 [n, 3, H, W] -> labels, logits."""

    def __init__(self, network: DeepLab):
        super().__init__()
        self.network = network

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network.coarse_logits(self.network.normalized(photos))
        return F.interpolate(logits, photos.shape[2:], mode="bilinear").argmax(1), logits


def export_onnx(segmenter: Segmenter, path: Path) -> float:
    """Exports a segmenter to an ONNX file and verifies it with onnxruntime.

    Args:
        segmenter: A segmenter on the CPU, in float32.
        path: File to write.

    Returns:
        The largest difference of a logit between onnxruntime and torch, relative to the largest logit.

    Raises:
        UserError: If packages are missing, the file cannot be written, or the results differ. No file is written then.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder, or {path.parent} is not a folder")
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter requires it
        from onnxruntime import InferenceSession
    except ImportError as error:
        raise UserError(
            f"export requires packages that are not installed ({error}): pip install 'namedmask[onnx]'"
        ) from None
    network = _Exported(segmenter.network).eval()
    # The sides of the example are unequal and not multiples of the strides, so that the exporter does not specialize.
    try:
        with replaced(pos_embed_sincos, "_build_grid", _grid):
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
        assert program is not None
        model = program.model_proto
        onnx.helper.set_model_props(model, {"names": json.dumps(segmenter.names)})
        onnx.checker.check_model(model)
        data = model.SerializeToString()
        worst = _difference(network, InferenceSession(data, providers=["CPUExecutionProvider"]))
    except Exception as error:  # the exporter, onnx and onnxruntime have their own exceptions
        cause = error.__cause__ or error
        raise UserError(
            f"{path} was not written: encoder {segmenter.network.encoder!r} cannot be exported for photos of any size "
            f"({first_line(cause)})"
        ) from error
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path} was not written: onnxruntime's logits differ from torch's by {worst:.2g} of the largest logit, "
            f"more than {TOLERANCE:g}"
        )
    with atomic_write(path) as file:
        file.write(data)
    return worst


def _grid(shape: Sequence[int], *arguments: Any, **options: Any) -> Tensor:
    """timm's coordinates for rotary embeddings; its own for DINOv3 would fix the size of the photos."""
    if options.get("grid_type") != "centered" or options.get("grid_indexing", "ij") != "ij":
        return _timm_grid(shape, *arguments, **options)
    sides = {"max": torch.sym_max(*shape), "min": torch.sym_min(*shape)}
    side = sides.get(options.get("normalize_coords", "separate"))
    offset = 0.5 + options.get("grid_offset", 0.0)
    axes = [(torch.arange(n) + offset) / (n if side is None else side) for n in shape]
    return 2 * torch.stack(torch.meshgrid(axes, indexing="ij"), -1) - 1


@torch.inference_mode()
def _difference(network: _Exported, session: InferenceSession) -> float:
    """The largest difference of a logit, relative to the largest logit; inf if labels differ except at near ties."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for n, height, width in CHECKED_SHAPES:
        photos = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
        labels, logits = network(photos)
        onnx_labels, onnx_logits = (
            torch.from_numpy(x) for x in session.run(["labels", "logits"], {"photos": photos.numpy()})
        )
        largest = logits.abs().max()
        best = F.interpolate(logits, (height, width), mode="bilinear").topk(2, dim=1).values
        if ((labels != onnx_labels) & (best[:, 0] - best[:, 1] > NEAR_TIE * largest)).any():
            return float("inf")
        worst = max(worst, float((logits - onnx_logits).abs().max() / largest))
    return worst
