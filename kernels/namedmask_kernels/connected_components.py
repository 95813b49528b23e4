# SPDX-License-Identifier: MIT
"""Connected components, largest component and hole filling of binary masks, one photo or a packed batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import Array, Ragged, arrange, expect_dtype
from .reference import connected_components as reference


class Components(NamedTuple):
    """What `connected_components` found; N components over all photos of the batch.

    labels:  int32, arranged like the mask; 0 is background
    areas:   int32 [N] pixels, photo after photo, label after label
    boxes:   int32 [N, 4] as x, y, width, height
    offsets: int32 [B + 1]; photo b's components are areas[offsets[b] : offsets[b + 1]]

    All on the mask's device.
    """

    labels: Ragged | Array
    areas: Array
    boxes: Array
    offsets: Array


def connected_components(mask: Ragged | Array, *, backend: str = "auto") -> Components:
    """Labels the 4-connected components of a mask.

    mask:    bool [H, W] (numpy or torch) or Ragged bool rows [P]; results are of the same kind.
    Labels:  1, 2, ... per photo, in raster order of each component's first pixel, as scipy.ndimage.label gives them.
    Errors:  TypeError for a mask that is not bool; ValueError for a wrong shape or a backend that cannot run.
    Cost:    two passes over the mask; on CUDA the one operator here that waits for the device, to learn how many
             components there are. Deterministic: the same on every backend, batch and thread count.
    """
    ragged, restore = arrange("connected_components", "mask", mask, 0)
    expect_dtype("connected_components", "mask", ragged.rows, torch.bool)
    labels, counts = _label(ragged.rows.contiguous(), ragged.offsets, ragged.shapes, backend)
    areas, boxes = _stats(labels, ragged.offsets, ragged.shapes, counts, backend)
    offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    labels = restore(labels)
    if not isinstance(labels, (Ragged, Tensor)):  # numpy in, numpy out
        return Components(labels, areas.numpy(), boxes.numpy(), offsets.numpy())
    return Components(labels, areas, boxes, offsets)


def largest_component(mask: Ragged | Array, *, backend: str = "auto") -> Ragged | Array:
    """Keeps each mask's component with most pixels (of equals, the first in raster order).

    mask: bool [H, W] (numpy or torch) or Ragged bool rows [P]; the result is arranged likewise. Errors, cost and
    determinism as `connected_components`.
    """
    return _mask_to_mask("largest_component", _largest, mask, backend)


def fill_holes(mask: Ragged | Array, *, backend: str = "auto") -> Ragged | Array:
    """Fills the background that no 4-connected path joins to the photo's border, as scipy's binary_fill_holes does.

    mask: bool [H, W] (numpy or torch) or Ragged bool rows [P]; the result is arranged likewise. Errors, cost and
    determinism as `connected_components`.
    """
    return _mask_to_mask("fill_holes", _fill, mask, backend)


def _mask_to_mask(name: str, op, mask: Ragged | Array, backend: str) -> Ragged | Array:
    ragged, restore = arrange(name, "mask", mask, 0)
    expect_dtype(name, "mask", ragged.rows, torch.bool)
    return restore(op(ragged.rows.contiguous(), ragged.offsets, ragged.shapes, backend))


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------


def _label_reference(mask: Tensor, offsets: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    labels = [torch.from_numpy(reference.connected_components(g.cpu().numpy())).flatten()
              for g in Ragged(mask, offsets, shapes).grids()]  # fmt: skip
    counts = torch.tensor([int(x.max()) if x.numel() else 0 for x in labels], dtype=torch.int32)
    return torch.cat([torch.empty(0, dtype=torch.int32), *labels]).to(mask.device), counts.to(mask.device)


def _label_cpu(mask: Tensor, offsets: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    labels, counts = _fake_label(mask, offsets, shapes, "cpu")
    backends.native().connected_components(mask, offsets, shapes, labels, counts)
    return labels, counts


def _label_cuda(mask: Tensor, offsets: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    labels, counts = _fake_label(mask, offsets, shapes, "cuda")
    scratch, stream = _cuda_scratch(mask, shapes), _cuda_stream(mask)
    backends.native().cuda.connected_components(mask, offsets, shapes, labels, counts, scratch, stream)
    return labels, counts


def _cuda_scratch(mask: Tensor, shapes: Tensor) -> Tensor:
    return torch.empty(2 * len(mask) + 4 * len(shapes), dtype=torch.int32, device=mask.device)


def _cuda_stream(rows: Tensor) -> int:
    return torch.cuda.current_stream(rows.device).cuda_stream


def _stats_reference(labels: Tensor, offsets: Tensor, shapes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    stats = [reference.component_stats(g.cpu().numpy()) for g in Ragged(labels, offsets, shapes).grids()]
    areas = torch.cat([torch.empty(0, dtype=torch.int32), *(torch.from_numpy(areas) for areas, _ in stats)])
    boxes = torch.cat([torch.empty(0, 4, dtype=torch.int32), *(torch.from_numpy(boxes) for _, boxes in stats)])
    return areas.to(labels.device), boxes.to(labels.device)


def _stats_cpu(labels: Tensor, offsets: Tensor, shapes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    n = int(counts.sum())
    areas, boxes = counts.new_empty(n), counts.new_empty(n, 4)
    backends.native().component_stats(labels, offsets, shapes, counts, areas, boxes)
    return areas, boxes


def _stats_cuda(labels: Tensor, offsets: Tensor, shapes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    n = int(counts.sum())
    areas, boxes = counts.new_empty(n), counts.new_empty(n, 4)
    backends.native().cuda.component_stats(labels, offsets, shapes, counts, areas, boxes, _cuda_stream(labels))
    return areas, boxes


def _mask_reference(function):
    def run(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Tensor:
        out = [torch.from_numpy(function(g.cpu().numpy())).flatten() for g in Ragged(mask, offsets, shapes).grids()]
        return torch.cat([mask[:0].cpu(), *out]).to(mask.device)

    return run


def _mask_cpu(name: str):
    def run(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Tensor:
        out = torch.empty_like(mask)
        getattr(backends.native(), name)(mask, offsets, shapes, out)
        return out

    return run


def _mask_cuda(name: str):
    def run(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Tensor:
        out = torch.empty_like(mask)
        scratch, stream = _cuda_scratch(mask, shapes), _cuda_stream(mask)
        getattr(backends.native().cuda, name)(mask, offsets, shapes, out, scratch, stream)
        return out

    return run


backends.IMPLEMENTATIONS |= {
    "connected_components": {"reference": _label_reference, "cpu": _label_cpu, "cuda": _label_cuda},
    "component_stats": {"reference": _stats_reference, "cpu": _stats_cpu, "cuda": _stats_cuda},
    "largest_component": {
        "reference": _mask_reference(reference.largest_component),
        "cpu": _mask_cpu("largest_component"),
        "cuda": _mask_cuda("largest_component"),
    },
    "fill_holes": {
        "reference": _mask_reference(reference.fill_holes),
        "cpu": _mask_cpu("fill_holes"),
        "cuda": _mask_cuda("fill_holes"),
    },
}


# -- torch.library ---------------------------------------------------------------------------------------------------


def _fake_label(mask: Tensor, offsets: Tensor, shapes: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mask, dtype=torch.int32), mask.new_empty(shapes.shape[0], dtype=torch.int32)


def _fake_stats(labels: Tensor, offsets: Tensor, shapes: Tensor, counts: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    return counts.new_empty(n), counts.new_empty(n, 4)


def _dispatch(name: str):
    def run(rows: Tensor, *rest):
        *tensors, backend = rest
        return backends.run(name, backend, rows.device)(rows, *tensors)

    return run


_label = register(
    "connected_components(Tensor mask, Tensor offsets, Tensor shapes, str backend) -> (Tensor, Tensor)",
    _dispatch("connected_components"),
    _fake_label,
)
_stats = register(
    "component_stats(Tensor labels, Tensor offsets, Tensor shapes, Tensor counts, str backend) -> (Tensor, Tensor)",
    _dispatch("component_stats"),
    _fake_stats,
)
_largest, _fill = (
    register(
        f"{name}(Tensor mask, Tensor offsets, Tensor shapes, str backend) -> Tensor",
        _dispatch(name),
        lambda mask, offsets, shapes, backend: torch.empty_like(mask),
    )
    for name in ("largest_component", "fill_holes")
)
