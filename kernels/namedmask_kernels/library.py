# SPDX-License-Identifier: MIT
"""Registration of the operators: one call per operator tells torch.library and `backends` about it.

A new operator NAME requires, in Python, a definition for one image in reference/NAME.py and a module NAME.py with the
public function and this call:

    _erode = register(
        "erode(Tensor mask, Tensor offsets, Tensor shapes, int iterations) -> Tensor",
        reference=per_image(reference.erode, numpy=True),  # for a reference in numpy
    )

The "cpu" backend is then `_native.erode(mask, offsets, shapes, out, iterations)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .ragged import Ragged, expect_rows

# Library.define + impl + register_fake cost about half as much per call as torch.library.custom_op.
LIBRARY = torch.library.Library("namedmask_kernels", "DEF")


def like_first(first: Tensor, *arguments: object) -> Tensor:
    """The usual output: one tensor with the shape and dtype of the first argument."""
    return torch.empty_like(first)


def first_packed(first: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """The usual packed tensor whose rows the offsets count: the first argument."""
    return (first,)


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    outputs: Callable[..., Any] = like_first,
    packed: Callable[..., tuple[Tensor, ...]] = first_packed,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    cuda_workspace: Callable[[int, int], int] | None = None,
    cuda_needs_triton: bool = False,
    triton: Callable[..., Any] | None = None,
    capturable: bool = False,
    differentiable: bool = True,
) -> Callable[..., Any]:
    """Registers an operator and its implementations.

    Every implementation takes the arguments of the schema, on the device of the first one, and returns its results.

    Args:
        schema: As torch.library writes it, "name(Tensor mask, ..., int iterations) -> Tensor". Tensors come first.
        reference: The definition, on any device.
        outputs: Takes the arguments and returns the results unfilled, a tensor or a tuple; used for tracing, too.
        packed: Takes the arguments and returns the tensors whose number of rows the reference compares with offsets.
        cpu: If None, `_native.name(*tensors, *outputs, *settings)`.
        cuda: If None, and `cuda_workspace` is given,
            `_native.cuda.name(*tensors, *outputs, workspace, *settings, stream)`.
        cuda_workspace: Takes the number of rows of the first tensor and the number of images, and returns the number of
            int32 elements of the workspace.
        cuda_needs_triton: Whether a part of the CUDA implementation is written in Triton.
        triton: The Triton implementation.
        capturable: Whether CUDA graphs may capture the GPU implementations: they only enqueue kernels, on memory of the
            call itself. A cached table or a copy from pinned memory would be reused while the graph still reads it.
        differentiable: False if all arguments or all results are integers, which have no gradients; the check costs
            half of a call's overhead.

    Returns:
        The operator: takes the arguments of the schema and the name of a backend.
    """
    name, arguments = schema.split("(", 1)
    tensors = arguments.split(")")[0].count("Tensor ")
    if cuda_workspace is not None:
        cuda = _cuda_kernel(name, tensors, outputs, cuda_workspace)
    on_gpu = {"cuda": cuda, "triton": triton}
    available = {backend: _on_gpu(name, run, capturable) for backend, run in on_gpu.items() if run is not None}
    available["cpu"] = cpu or _cpu_kernel(name, tensors, outputs)
    checked = _checked(name, tensors, packed, reference) if "Tensor shapes" in schema else reference
    available["reference"] = _in_plain_mode(checked)
    backends.IMPLEMENTATIONS[name] = available
    if cuda_needs_triton:
        backends.CUDA_WITH_TRITON.add(name)

    def dispatch(*arguments: Any) -> Any:
        return available[backends.choose(name, arguments[-1], arguments[0].device)](*arguments[:-1])

    # Where an operator cannot be captured, torch.compile(mode="reduce-overhead") splits its graphs.
    tags = () if capturable else (torch.Tag.cudagraph_unsafe,)
    LIBRARY.define(schema.replace(")", ", str backend)", 1), tags=tags)
    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    qualified = f"namedmask_kernels::{name}"
    torch.library.register_fake(qualified, lambda *arguments: outputs(*arguments[:-1]), lib=LIBRARY)
    operator = getattr(torch.ops.namedmask_kernels, name)
    if differentiable:
        LIBRARY.impl(name, _without_gradient(name, tensors, operator), "Autograd")

    def call(*arguments: Any) -> Any:
        if not isinstance(arguments[-1], str):  # torch would print the schema
            raise TypeError(f"{name}: backend must be a string, but is {arguments[-1]!r}")
        return operator(*arguments)

    return call


def _without_gradient(name: str, tensors: int, operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's rule of differentiation: backward passes and tangents raise an error.

    With torch.library.register_autograd, forward-mode tangents would become zero without an error.
    """

    def forward(context: object, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def backward(context: object, *gradients: object) -> None:
        raise RuntimeError(f"{name} has no gradient; call it under torch.no_grad() or on detached tensors")

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def run(*arguments: Any) -> Any:
        inputs = arguments[:tensors]
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
            raise RuntimeError(f"{name} has no forward-mode derivative; call it on detached tensors")
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
            return forward(None, *arguments)
        if torch._C._are_functorch_transforms_active():  # such as torch.func.grad, which cannot call the function
            backward(None)
        return function.apply(*arguments)

    return run


def per_image(
    function: Callable[..., Any],
    *,
    outputs: Callable[..., Any] = like_first,
    numpy: bool = False,
    varying: Collection[int] = (),
) -> Callable[..., Any]:
    """Makes a reference that takes a packed batch from one that takes an image.

    Args:
        function: Takes the image's grid [h, w, ...] of every packed tensor, then the settings. Returns a value per
            output: an array in raster order, or a number for an output with one element per image.
        outputs: As in `register`.
        numpy: Whether the function takes numpy arrays.
        varying: Which settings, by position, are lists of one value for all images or of one for each; the function
            takes the image's value.

    Returns:
        A function of the operator's arguments: packed tensors, offsets, shapes, settings.
    """

    def run(*arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        *packed, offsets, shapes = tensors
        settings = arguments[len(tensors) :]
        results = outputs(*arguments)
        bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        grids = zip(*(Ragged(rows, offsets, shapes).grids() for rows in packed), strict=True)
        for image, ((begin, end), own) in enumerate(zip(bounds, grids, strict=True)):
            given = [grid.cpu().numpy() for grid in own] if numpy else own
            chosen = (_of_image(s, image) if i in varying else s for i, s in enumerate(settings))
            values = function(*given, *chosen)
            for result, value in zip(_as_tuple(results), _as_tuple(values), strict=True):
                if isinstance(value, (int, float)):
                    result[image] = value
                else:
                    part = result[begin:end]
                    part.copy_((value if isinstance(value, Tensor) else torch.from_numpy(value)).reshape(part.shape))
        return results

    return run


def cuda_stream(tensor: Tensor) -> int:
    """The handle of the current stream of the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _of_image(values: Sequence[Any], image: int) -> Any:
    return values[image if len(values) > 1 else 0]


def _as_tuple(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def _checked(
    name: str, tensors: int, packed: Callable[..., tuple[Tensor, ...]], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """The reference, after a check of offsets and shapes, the last tensors. Kernels check them themselves."""

    def run(*arguments: Any) -> Any:
        expect_rows(name, *arguments[tensors - 2 : tensors], *packed(*arguments))
        return reference(*arguments)

    return run


def _on_gpu(name: str, function: Callable[..., Any], capturable: bool) -> Callable[..., Any]:
    """A GPU implementation whose CUDA errors name the operator.

    With CUDA_LAUNCH_BLOCKING=1 it waits for its kernels, so that a fault in one of them is its own.
    """

    def run(*arguments: Any) -> Any:
        if not capturable and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{name} cannot be captured in a CUDA graph; call it outside of the graph")
        blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        try:
            results = function(*arguments)
            if blocking:
                torch.cuda.synchronize(arguments[0].device)
        except RuntimeError as error:
            if "CUDA" not in str(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            hint = "" if blocking else _MAY_BE_EARLIER
            raise RuntimeError(f"{name}: {error}{hint}") from error
        return results

    return run


_MAY_BE_EARLIER = """
This may be the fault of an earlier operation, since a GPU runs behind the CPU; CUDA_LAUNCH_BLOCKING=1 shows which."""


def _in_plain_mode(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference in the precision that it states and without a graph of gradients, on which kernels do not depend.

    Operators that are not `differentiable` get arguments that require gradients.
    """

    def run(*arguments: Any) -> Any:
        with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
            return reference(*arguments)

    return run


def _cpu_kernel(name: str, tensors: int, outputs: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        results = outputs(*arguments)
        getattr(backends.native(), name)(*arguments[:tensors], *_as_tuple(results), *arguments[tensors:])
        return results

    return run


def _cuda_kernel(
    name: str, tensors: int, outputs: Callable[..., Any], workspace: Callable[[int, int], int]
) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        results = outputs(*arguments)
        first, shapes = arguments[0], arguments[tensors - 1]
        scratch = torch.empty(workspace(len(first), len(shapes)), dtype=torch.int32, device=first.device)
        kernel = getattr(backends.native().cuda, name)
        kernel(*arguments[:tensors], *_as_tuple(results), scratch, *arguments[tensors:], cuda_stream(first))
        return results

    return run
