# SPDX-License-Identifier: MIT
"""Connected components, largest component and hole filling of binary masks, one photo or a packed batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends
from .library import register
from .ragged import Array, Ragged, arrange, expect_dtype, pack_numpy
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
    Cost:    two passes over the mask; on CUDA it waits for the device, to learn how many components there are.
             Deterministic: the same on every backend, batch and thread count.
    """
    if _is_plain("connected_components", mask, backend):
        labels, first = np.empty(mask.shape, np.int32), np.empty(2, np.int32)
        areas, boxes = backends.native().connected_components(*pack_numpy(mask), labels.reshape(-1), first)
        return Components(labels, areas, boxes, first)
    ragged, restore = arrange("connected_components", "mask", mask, 0)
    expect_dtype("connected_components", "mask", ragged.rows, torch.bool)
    labels, areas, boxes, offsets = _label(ragged.rows.contiguous(), ragged.offsets, ragged.shapes, backend)
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
    if _is_plain(name, mask, backend):
        out = np.empty(mask.shape, bool)
        getattr(backends.native(), name)(*pack_numpy(mask), out.reshape(-1))
        return out
    ragged, restore = arrange(name, "mask", mask, 0)
    expect_dtype(name, "mask", ragged.rows, torch.bool)
    return restore(op(ragged.rows.contiguous(), ragged.offsets, ragged.shapes, backend))


def _is_plain(name: str, mask: Ragged | Array, backend: str) -> bool:
    return backends.without_torch(name, backend, mask) and (mask.ndim, mask.dtype) == (2, bool)


# -- backends: every implementation takes the op's tensors and returns what the op's schema says ---------------------


Found = tuple[Tensor, Tensor, Tensor, Tensor]  # labels [P], areas [N], boxes [N, 4], offsets [B + 1]


def _label_reference(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Found:
    none = torch.empty(0, dtype=torch.int32)
    labels, areas, boxes, counts = [none], [none], [none.reshape(0, 4)], [0]
    for grid in Ragged(mask, offsets, shapes).grids():
        found = reference.connected_components(grid.cpu().numpy())
        for parts, part in zip((labels, areas, boxes), (found.ravel(), *reference.component_stats(found)), strict=True):
            parts.append(torch.from_numpy(part))
        counts.append(len(areas[-1]))
    first = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    return tuple(x.to(mask.device) for x in (torch.cat(labels), torch.cat(areas), torch.cat(boxes), first))


def _label_cpu(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Found:
    labels, first = torch.empty_like(mask, dtype=torch.int32), torch.empty_like(offsets)
    areas, boxes = backends.native().connected_components(mask, offsets, shapes, labels, first)
    return labels, torch.from_numpy(areas), torch.from_numpy(boxes), first


def _label_cuda(mask: Tensor, offsets: Tensor, shapes: Tensor) -> Found:
    labels, counts = torch.empty_like(mask, dtype=torch.int32), mask.new_empty(shapes.shape[0], dtype=torch.int32)
    scratch, stream, native = _cuda_scratch(mask, shapes), _cuda_stream(mask), backends.native().cuda
    native.connected_components(mask, offsets, shapes, labels, counts, scratch, stream)
    first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    n = int(first[-1])
    areas, boxes = counts.new_empty(n), counts.new_empty(n, 4)
    native.component_stats(labels, offsets, shapes, counts, areas, boxes, stream)
    return labels, areas, boxes, first


def _cuda_scratch(mask: Tensor, shapes: Tensor) -> Tensor:
    return torch.empty(2 * len(mask) + 4 * len(shapes), dtype=torch.int32, device=mask.device)


def _cuda_stream(rows: Tensor) -> int:
    return torch.cuda.current_stream(rows.device).cuda_stream


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


def _fake_label(mask: Tensor, offsets: Tensor, shapes: Tensor, backend: str) -> Found:
    areas = mask.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)
    first = areas.new_empty(offsets.shape)
    return torch.empty_like(mask, dtype=torch.int32), areas, areas.new_empty(areas.shape[0], 4), first


def _dispatch(name: str):
    def run(rows: Tensor, *rest):
        *tensors, backend = rest
        return backends.run(name, backend, rows.device)(rows, *tensors)

    return run


_label = register(
    "connected_components(Tensor mask, Tensor offsets, Tensor shapes, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch("connected_components"),
    _fake_label,
    floats=False,
)
_largest, _fill = (
    register(
        f"{name}(Tensor mask, Tensor offsets, Tensor shapes, str backend) -> Tensor",
        _dispatch(name),
        lambda mask, offsets, shapes, backend: torch.empty_like(mask),
        floats=False,
    )
    for name in ("largest_component", "fill_holes")
)
