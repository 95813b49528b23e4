# SPDX-License-Identifier: MIT
"""Properties that all operators share, tested on the calls in operator_calls.py."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import operator_calls
import pytest
import torch
from operator_calls import CALLS, flat
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import namedmask_kernels as nk
from namedmask_kernels import Ragged, backends

SECTIONS = ("Args:", "Returns:", "Raises:", "Cost:", "Determinism:", "Source:", "Examples:")


def label(value) -> str:
    """The id of a parameter, which must not depend on addresses: xdist compares the ids of its workers."""
    return getattr(value, "__name__", str(value))


operators = pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)


def test_all_operators_are_tested():
    names = {op.__name__ for op in CALLS}
    assert names == set(backends.IMPLEMENTATIONS)
    assert names < set(nk.__all__)


@operators
def test_docstrings_have_all_sections(op):
    lines = [line.strip() for line in op.__doc__.splitlines()]
    assert [line for line in lines if line in SECTIONS] == list(SECTIONS)


class Recorder(TorchDispatchMode):
    """Records the calls of registered operators within its context."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "namedmask_kernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@operators
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(op, backend):
    with Recorder() as recorder:
        op(*CALLS[op], backend=backend)
    ((function, arguments),) = recorder.calls
    torch.library.opcheck(function, arguments)


@operators
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_non_contiguous_views(op, backend):
    first, *rest = CALLS[op]
    view = torch.stack([first, torch.zeros_like(first)], -1)[..., 0]
    for result, expected in zip(
        flat(op(view, *rest, backend=backend)), flat(op(first, *rest, backend=backend)), strict=True
    ):
        assert torch.equal(result, expected)


@operators
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_output_is_written(op, backend, monkeypatch):
    """Results do not depend on what is in new memory."""
    results = []
    for value in (0, 1):
        with monkeypatch.context() as patch:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
                patch.setattr(owner, name, filling(getattr(owner, name), value))
            results.append(flat(op(*CALLS[op], backend=backend)))
    for zeros, ones in zip(*results, strict=True):
        assert torch.equal(zeros, ones)


def filling(allocate, value):
    """The function `allocate`, whose tensors are filled with a value."""
    return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(value)


SIZES = [(7, 9), (1, 1), (0, 4), (5, 3), (1, 8), (6, 0)]


def images(op) -> list[tuple]:
    """The operator's arguments for images of several sizes: crops of those in CALLS."""
    return [tuple(a[:h, :w] if isinstance(a, torch.Tensor) else a for a in CALLS[op]) for h, w in SIZES]


def packed(arguments) -> tuple:
    """The arguments of several images as those of one batch."""
    columns = list(zip(*arguments, strict=True))
    return tuple(Ragged.pack(column) if isinstance(column[0], torch.Tensor) else column[0] for column in columns)


def fields(result) -> list:
    """The fields of a batch's result, each indexed by the image."""
    parts = [result] if isinstance(result, Ragged) else result
    return [part.grids() if isinstance(part, Ragged) else part for part in parts]


# Their arguments or results are arranged differently, so their own tests cover batches.
OTHERS = nk.attention_features, nk.connected_components, nk.resize, nk.run_lengths, nk.vote_masks
batched = pytest.mark.parametrize("op", [op for op in CALLS if op not in OTHERS], ids=lambda op: op.__name__)


@batched
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_results_do_not_depend_on_batch_composition(op, backend):
    batch = fields(op(*packed(images(op)), backend=backend))
    for b, arguments in enumerate(images(op)):
        for result, expected in zip(batch, flat(op(*arguments, backend=backend)), strict=True):
            assert torch.equal(result[b], expected.reshape(result[b].shape))


@batched
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_batch(op, backend):
    empty = [Ragged.of_shapes(a.rows[:0], []) if isinstance(a, Ragged) else a for a in packed(images(op))]
    assert all(len(field) == 0 for field in fields(op(*empty, backend=backend)))


LAYOUT = r"offsets of .* must be \[B \+ 1\] and shapes \[B, 2\], but are "

# change of a batch -> its rows, offsets and shapes, and the error of every backend
MALFORMED = {
    "shapes": (lambda rows, offsets, shapes: (rows, offsets, shapes + 1), "image 0 has shape .* but owns rows 0 to "),
    "offsets": (lambda rows, offsets, shapes: (rows, offsets + 1, shapes), "offsets must run from 0 to the "),
    "fewer rows": (lambda rows, *rest: (rows[:-1], *rest), "offsets must run from 0 to the "),
    "more rows": (lambda rows, *rest: (torch.cat([rows, rows[:1]]), *rest), "offsets must run from 0 to the "),
    "int64 offsets": (lambda rows, offsets, shapes: (rows, offsets.long(), shapes), "offsets of .* must be int32"),
    "int64 shapes": (lambda rows, offsets, shapes: (rows, offsets, shapes.long()), "shapes of .* must be int32"),
    "short offsets": (lambda rows, offsets, shapes: (rows, offsets[:-1], shapes), LAYOUT),
    "one shape": (lambda rows, offsets, shapes: (rows, offsets, shapes[0]), LAYOUT),
    "3-D shapes": (lambda rows, offsets, shapes: (rows, offsets, shapes[None]), LAYOUT),
}
ragged = pytest.mark.parametrize("op", [op for op in CALLS if op is not nk.attention_features], ids=label)


@ragged
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("change", MALFORMED)
def test_malformed_batches_raise(op, backend, change):
    function, message = MALFORMED[change]
    wrong = [Ragged(*function(*a)) if isinstance(a, Ragged) else a for a in arranged(op, "ragged")]
    with pytest.raises((TypeError, ValueError), match=f"{op.__name__}: {message}"):
        op(*wrong, backend=backend)


@pytest.mark.parametrize("op", [nk.bilateral_solver, nk.dense_crf, nk.pamr, nk.random_walk], ids=label)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("change", ["fewer rows", "more rows"])
def test_the_rows_of_two_batches_are_compared(op, backend, change):
    first, second = arranged(op, "ragged")
    second = Ragged(*MALFORMED[change][0](*second))
    with pytest.raises(ValueError, match=f"{op.__name__}: .* must have the same number of rows, but have "):
        op(first, second, backend=backend)


@ragged
def test_offsets_and_shapes_of_any_strides(op):
    batch = arranged(op, "ragged")
    strided = [Ragged(a.rows, *(x.repeat_interleave(2, -1)[..., ::2] for x in a[1:])) if isinstance(a, Ragged) else a
               for a in batch]  # fmt: skip
    assert_same(op(*strided), op(*batch))


@ragged
def test_numpy_arrays_give_numpy_arrays(op):
    arrays = [a.numpy() if isinstance(a, torch.Tensor) else a for a in CALLS[op]]
    for result, expected in zip(flat(op(*arrays)), flat(op(*CALLS[op])), strict=True):
        assert isinstance(result, np.ndarray)
        np.testing.assert_array_equal(result, expected.numpy())


def test_only_torch_and_numpy_are_required():
    """Runs every operator in a process that can import nothing but torch, numpy and what torch itself requires."""
    script = """
import importlib.metadata, re, sys

required, pending = set(), ["torch", "numpy"]
while pending:
    name = re.sub("[-_.]+", "-", re.match("[A-Za-z0-9._-]+", pending.pop())[0]).lower()
    if name not in required:
        required.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        pending += [r for r in requirements if "extra ==" not in r]
own = {"namedmask", "namedmask_kernels"}
for module, distributions in importlib.metadata.packages_distributions().items():
    names = {re.sub("[-_.]+", "-", d).lower() for d in distributions}
    if not names & required and module not in own and module not in sys.modules:
        sys.modules[module] = None  # importing it raises ImportError
blocked = ("scipy", "pydantic", "timm", "open_clip", "torchvision")
assert all(sys.modules.get(module, 1) is None for module in blocked), "not installed, so not tested"

from operator_calls import CALLS
for op, arguments in CALLS.items():
    for backend in ("reference", "cpu"):
        op(*arguments, backend=backend)
        print(op.__name__, backend)
"""
    folder = Path(operator_calls.__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    assert len(child.stdout.splitlines()) == 2 * len(CALLS)


# -- torch ------------------------------------------------------------------------------------------------------------


def arranged(op, kind):
    """The operator's arguments as tensors, or those of two images as a Ragged."""
    if kind == "tensors" or op is nk.attention_features:
        return CALLS[op]
    if op is nk.vote_masks:
        (masks,) = CALLS[op]
        return (Ragged.pack([masks.permute(1, 2, 0)[:h, :w] for h, w in ((6, 8), (4, 3))]),)
    return packed(images(op)[::3])


def assert_same(results, expected):
    for result, other in zip(flat(results), flat(expected), strict=True):
        if isinstance(result, Ragged):
            assert_same(tuple(result), tuple(other))
        else:
            assert torch.equal(result, other)


@operators
@pytest.mark.parametrize("kind", ["tensors", "ragged"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_torch_compile(op, kind, dynamic):
    torch.compiler.reset()
    arguments = arranged(op, kind)
    compiled = torch.compile(op, fullgraph=True, backend="eager", dynamic=dynamic)
    assert_same(compiled(*arguments), op(*arguments))


@ragged
def test_one_graph_is_compiled_for_grids_of_all_sizes(op):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter, dynamic=True)
    for h, w in ((7, 9), (6, 8), (4, 7), (5, 6)):
        crop = (slice(None), slice(h - 1), slice(w - 1)) if op is nk.vote_masks else (slice(h), slice(w))
        arguments = [a[crop].clone() if isinstance(a, torch.Tensor) else a for a in CALLS[op]]
        assert_same(compiled(*arguments), op(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", [nk.bilateral_solver, nk.dense_crf, nk.pamr, nk.random_walk])
def test_compiled_operators_compare_the_grids_of_their_arguments(op):
    torch.compiler.reset()
    first, second = arranged(op, "ragged")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")  # removes dead code
    assert_same(compiled(first, second), op(first, second))
    with pytest.raises(ValueError, match=f"{op.__name__}: .* must have the same height and width, but have "):
        compiled(first, second._replace(shapes=second.shapes.flip(1)))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("op", "settings"),
    [
        (nk.bilateral_solver, {"sigma_spatial": [3.0, 7.5]}),
        (nk.dense_crf, {"gaussian": ([2.0, 3.0], 3.0), "bilateral": ([9.0, 40.0], 13.0, 10.0)}),
        (nk.pamr, {"dilations": [[1, 3], [2]]}),
    ],
    ids=label,
)
def test_torch_compile_with_settings_for_each_image(op, settings, dynamic):
    torch.compiler.reset()
    batch = arranged(op, "ragged")
    compiled = torch.compile(op, fullgraph=True, backend="eager", dynamic=dynamic)
    assert_same(compiled(*batch, **settings), op(*batch, **settings))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


MODES = {
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@operators
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_modes_of_torch(op, backend, mode):
    for kind in ("tensors", "ragged"):
        arguments = arranged(op, kind)
        expected = op(*arguments, backend=backend)
        with MODES[mode]():
            result = op(*arguments, backend=backend)
        assert_same(result, expected)


@operators
def test_vmap(op):
    """torch.func.vmap calls an operator once per example."""
    tensors = [a for a in CALLS[op] if isinstance(a, torch.Tensor)]
    settings = CALLS[op][len(tensors) :]
    twice = [torch.stack([a, a]) for a in tensors]
    results = torch.func.vmap(lambda *arguments: op(*arguments, *settings))(*twice)
    for result, expected in zip(flat(results), flat(op(*CALLS[op])), strict=True):
        assert torch.equal(result, torch.stack([expected, expected]))


DERIVATIVES = {
    "backward": lambda f, x: f(x.clone().requires_grad_()).backward(),
    "autograd.functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, (x,), (x,)),
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "func.vjp": lambda f, x: torch.func.vjp(f, x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "func.linearize": lambda f, x: torch.func.linearize(f, x),
    "vmap of func.grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x[None]),
    "func.grad of vmap": lambda f, x: torch.func.grad(lambda y: torch.func.vmap(f)(y).sum())(x[None]),
    "func.jvp of vmap": lambda f, x: torch.func.jvp(torch.func.vmap(f), (x[None],), (x[None],)),
    "compiled backward": lambda f, x: torch.compile(f, backend="eager")(x.clone().requires_grad_()).backward(),
    "compiled func.jvp": lambda f, x: torch.compile(
        lambda y: torch.func.jvp(f, (y,), (y,)), backend="eager", fullgraph=True
    )(x),
}
differentiated = pytest.mark.parametrize("derivative", DERIVATIVES)


def weighted(op, *, detach=False):
    """A differentiable number: an argument times the operator's results, or 0 for those of no float type."""

    def number(first):
        results = flat(op(first.detach() if detach else first, *CALLS[op][1:]))
        return sum((first.mean() * result.sum() for result in results), first.sum())

    return number


@pytest.mark.parametrize(
    "op",
    [nk.attention_features, nk.bilateral_solver, nk.dense_crf, nk.mask_cut, nk.normalized_cut, nk.pamr, nk.random_walk,
     nk.resize],
    ids=label,
)  # fmt: skip
@differentiated
@pytest.mark.filterwarnings("ignore")  # of torch.compile and of torch.autograd's anomaly mode
def test_derivatives_raise(op, derivative):
    torch.compiler.reset()
    first = CALLS[op][0].float()
    with pytest.raises(RuntimeError, match=f"{op.__name__} has no (gradient|forward-mode derivative); call it "):
        DERIVATIVES[derivative](weighted(op), first)
    DERIVATIVES[derivative](weighted(op, detach=True), first)


@differentiated
@pytest.mark.filterwarnings("ignore")
def test_integers_have_no_derivative(derivative):
    """Derivatives of a function of labels take them as constants."""
    torch.compiler.reset()
    DERIVATIVES[derivative](weighted(nk.spectral_clusters), CALLS[nk.spectral_clusters][0])


@pytest.mark.parametrize("op", [op for op in CALLS if op is not nk.attention_features], ids=label)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_arguments_may_require_gradients(op, backend):
    arguments = [a.clone().requires_grad_() if hasattr(a, "dtype") and a.is_floating_point() else a for a in CALLS[op]]
    assert_same(op(*arguments, backend=backend), op(*CALLS[op], backend=backend))


def test_derivatives_where_labels_are_constant():
    features = CALLS[nk.spectral_clusters][0]
    function = weighted(nk.spectral_clusters)
    expected = 1 + nk.spectral_clusters(features, 3).sum() / features.numel()
    assert torch.allclose(torch.func.grad(function)(features), expected)
    assert torch.allclose(torch.func.jvp(function, (features,), (features,))[1], expected * features.sum())


# -- kinds of arrays --------------------------------------------------------------------------------------------------


def as_numpy(op, change):
    """The operator's arguments as numpy arrays, changed; attention_features takes tensors only."""
    return [change(a.numpy()) if isinstance(a, torch.Tensor) else a for a in CALLS[op]]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    """The array, one byte behind the start of a buffer."""
    buffer = np.zeros(array.nbytes + 1, np.uint8)[1:]
    buffer[:] = np.frombuffer(array.tobytes(), np.uint8)
    return np.ndarray(array.shape, array.dtype, buffer.data)


LAYOUTS = {
    "unaligned": unaligned,
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "read-only": read_only,
    "negative strides": lambda array: array[::-1, ::-1].copy()[::-1, ::-1],
    "Fortran order": np.asfortranarray,
    "subclass": lambda array: array.view(type("Subclass", (np.ndarray,), {})),
}
of_arrays = pytest.mark.parametrize(
    "op", [op for op in CALLS if op is not nk.attention_features], ids=lambda op: op.__name__
)


@of_arrays
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy_arrays_of_any_layout(op, layout, recwarn):
    results = flat(op(*as_numpy(op, LAYOUTS[layout])))
    for result, expected in zip(results, flat(op(*CALLS[op])), strict=True):
        assert isinstance(result, np.ndarray)
        np.testing.assert_array_equal(result, expected.numpy())
    assert not recwarn.list


@of_arrays
def test_arrays_that_cannot_be_read_are_rejected_by_name(op):
    name = op.__name__
    first, *rest = CALLS[op]
    array = first.numpy()
    for value, message in (
        (np.ma.masked_array(array, mask=array > 0), "must not be a masked array"),
        (array.astype(object), "must have a dtype that torch supports, but is object"),
        (array.astype(str), "must have a dtype that torch supports, but is <U"),
        (array.astype(np.longdouble), "must have a dtype that torch supports, but is (float128|longdouble)"),
        (first.to_sparse(), "must be a dense tensor, but is torch.sparse_coo"),
        (array.tolist(), "must be a numpy array, a torch tensor or a Ragged, but is list"),
        (Ragged(array, [0], [0]), "must be a Ragged of tensors"),
        (first.to(torch.complex64), "must be .*, but is complex64"),
        (None, "must be .*, but is NoneType"),
    ):
        with pytest.raises(TypeError, match=f"{name}: [a-z]+ {message}"):
            op(value, *rest)


@of_arrays
@pytest.mark.parametrize("shape", [(2**31, 0), (0, 2**31)], ids=str)
def test_arrays_beyond_the_range_of_int32_are_rejected(op, shape):
    side = "height" if shape[0] else "width"
    channels = slice(1, 1) if op is nk.vote_masks else slice(2, None)
    large = [
        torch.zeros(*(a.shape[:1] if op is nk.vote_masks else ()), *shape, *a.shape[channels][:1], dtype=a.dtype)
        if isinstance(a, torch.Tensor)
        else a
        for a in CALLS[op]
    ]
    for arguments in (large, [a.numpy() if isinstance(a, torch.Tensor) else a for a in large]):
        with pytest.raises(ValueError, match=f"{side} must be at most 2147483647, but is 2147483648"):
            op(*arguments)


@operators
@pytest.mark.parametrize("kind", ["tensors", "ragged"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_tensors_that_are_not_dense_are_rejected(op, kind):
    first, *rest = arranged(op, kind)
    dense = first.rows if isinstance(first, Ragged) else first
    for tensor, message in (
        (dense.to_sparse(), "must be a dense tensor, but is torch.sparse_coo; call .to_dense"),
        (torch.nested.nested_tensor([dense, dense]), "must not be a nested tensor; "),
        (torch.nested.nested_tensor([dense, dense], layout=torch.jagged), "must not be a nested tensor; "),
    ):
        value = first._replace(rows=tensor) if isinstance(first, Ragged) else tensor
        with pytest.raises(TypeError, match=f"{op.__name__}: .* {message}"):
            op(value, *rest)


@pytest.mark.parametrize("op", [nk.connected_components, nk.fill_holes, nk.largest_component, nk.vote_masks])
@pytest.mark.parametrize("true", [1, 255])
def test_uint8_masks(op, true):
    """OpenCV's masks are 0 and 255, pycocotools' 0 and 1."""
    (mask,) = CALLS[op]
    bytes_ = mask.byte() * true
    for backend in ("cpu", "reference"):
        expected = op(mask, backend=backend)
        assert_same(op(bytes_, backend=backend), expected)
        for result, other in zip(flat(op(bytes_.numpy(), backend=backend)), flat(expected), strict=True):
            assert result.dtype == other.numpy().dtype and np.array_equal(result, other.numpy())
    (batch,) = arranged(op, "ragged")
    assert_same(op(batch.with_rows(batch.rows.byte() * true)), op(batch))


@pytest.mark.parametrize("op", [nk.bilateral_solver, nk.dense_crf, nk.pamr, nk.random_walk], ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_soft_arguments_of_any_float_type(op, dtype):
    first, *rest = CALLS[op]
    soft = first.to(torch.bfloat16)  # exact in float32 and float64, rounded once more to float16
    soft = soft.to(dtype)
    for backend in ("cpu", "reference"):
        result = op(soft, *rest, backend=backend)
        assert result.dtype == torch.float32 and torch.equal(result, op(soft.float(), *rest, backend=backend))
    if dtype != torch.bfloat16:  # which numpy does not have
        assert op(soft.numpy(), *(x.numpy() for x in rest)).dtype == np.float32


@operators
@pytest.mark.parametrize("backend", [None, 1, b"cpu", ["cpu"], torch.device("cpu")], ids=str)
def test_backends_that_are_no_strings_are_rejected(op, backend):
    for kind in ("tensors", "numpy") if op is not nk.attention_features else ("tensors",):
        arguments = as_numpy(op, lambda array: array) if kind == "numpy" else CALLS[op]
        with pytest.raises(TypeError, match=rf"^{op.__name__}: backend must be a string, but is .*$"):
            op(*arguments, backend=backend)


# -- numbers ----------------------------------------------------------------------------------------------------------

# public operator -> its integer settings with their least valid values, and its float settings
INTEGERS = {
    nk.attention_features: {"tap_rows": 0},
    nk.bilateral_solver: {"iterations": 0},
    nk.dense_crf: {"iterations": 0},
    nk.mask_cut: {"objects": 1, "max_iterations": 1},
    nk.normalized_cut: {"max_iterations": 1},
    nk.pamr: {"iterations": 0, "dilations": 1},
    nk.random_walk: {"steps": 0},
    nk.spectral_clusters: {"k": 1, "seed": -(2**63)},
}
FLOATS = {
    nk.attention_features: ("scale",),
    nk.bilateral_solver: (
        "confidence",
        "sigma_spatial",
        "sigma_luma",
        "sigma_chroma",
        "smoothness",
        "tolerance",
    ),
    nk.dense_crf: ("gaussian", "bilateral"),
    nk.mask_cut: ("tau", "eps", "tolerance"),
    nk.normalized_cut: ("tau", "eps", "tolerance"),
    nk.random_walk: ("sharpness",),
}
PER_IMAGE = ("sigma_spatial",)  # settings that may also be a sequence of one number per image
integers = pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in INTEGERS.items() for name in names], ids=label
)


def arguments_without(op, name):
    return CALLS[op][:1] if op is nk.spectral_clusters and name == "k" else CALLS[op]


@integers
def test_integers_of_any_type_are_accepted(op, name):
    expected = flat(op(*arguments_without(op, name), **{name: [2] if name == "dilations" else 2}))
    for value in (np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)):
        result = op(*arguments_without(op, name), **{name: [value] if name == "dilations" else value})
        assert all(torch.equal(a, b) for a, b in zip(flat(result), expected, strict=True))
    if name in ("tap_rows", "k", "dilations"):
        for values in (np.array([2, 1]), torch.tensor([2, 1]), range(2, 0, -1)):
            op(*arguments_without(op, name), **{name: values})


@integers
def test_invalid_integers_are_rejected_before_anything_is_allocated(op, name):
    for value in (1.5, np.float64(2), "2", None, torch.tensor(2.0)):
        with pytest.raises(TypeError, match=f"{op.__name__}: {name} must be an integer, but is "):
            op(*arguments_without(op, name), **{name: [value] if name == "dilations" else value})
    most = 2**63 - 1 if name in ("dilations", "seed") else 2**31 - 1
    for value in (INTEGERS[op][name] - 1, most + 1, 2**63, 10**400):
        with pytest.raises(ValueError, match=f"{op.__name__}: {name} must be at (least|most) "):
            op(*arguments_without(op, name), **{name: [value] if name == "dilations" else value})


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in FLOATS.items() for name in names], ids=label)
def test_numbers_of_any_type_are_accepted_and_others_rejected(op, name):
    count = {"gaussian": 2, "bilateral": 3}.get(name)
    for value in (np.float32(0.5), np.int64(1), torch.tensor(0.5), 1) if name != "eps" else (np.float32(0.5),):
        if not (name.startswith("sigma") and value < 1):
            op(*CALLS[op], **{name: (10 * value,) * count if count else value})
    invalid = ["0.5", 1j]
    invalid += [] if name == "scale" else [None]
    invalid += [] if name in PER_IMAGE else [[0.5]]
    for value in invalid:
        with pytest.raises(TypeError, match=f"{op.__name__}: {name} must be a number, but is "):
            op(*CALLS[op], **{name: (value,) * count if count else value})
    with pytest.raises(ValueError, match=f"{op.__name__}: {name} must be "):
        op(*CALLS[op], **{name: (10**400,) * count if count else 10**400})


# public operator -> its settings that are several numbers
SEQUENCES = {nk.dense_crf: ("gaussian", "bilateral"), nk.pamr: ("dilations",), nk.resize: ("sizes", "mean", "std")}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in SEQUENCES.items() for name in names], ids=label)
def test_one_number_is_no_sequence(op, name):
    tensors = [argument for argument in CALLS[op] if isinstance(argument, torch.Tensor)]
    others = {"sizes": (5, 12), "mean": (0.5,) * 3, "std": (0.5,) * 3} if op is nk.resize else {}
    for value in (3, 2.5, np.float32(3), np.array(3), torch.tensor(3)):
        with pytest.raises((TypeError, ValueError), match=f"^{op.__name__}: {name} must be .*, but is "):
            op(*tensors, **{**others, name: value})


@pytest.mark.parametrize(
    ("op", "name"), [(nk.resize, "sizes"), (nk.dense_crf, "gaussian"), (nk.dense_crf, "bilateral")]
)
def test_a_generator_is_no_sequence(op, name):
    tensors = [argument for argument in CALLS[op] if isinstance(argument, torch.Tensor)]
    with pytest.raises((TypeError, ValueError), match=f"^{op.__name__}: {name} must be .*, but is <generator"):
        op(*tensors, **{name: (number for number in (5, 12))})


def test_tapped_rows_are_checked_before_they_are_listed():
    for taps in (2**31 - 1, 13, range(2**40), [12]):
        with pytest.raises(ValueError, match="attention_features: tap_rows must be at most "):
            nk.attention_features(*CALLS[nk.attention_features], tap_rows=taps)
    empty = torch.zeros(0, 3, 2, 8), torch.zeros(1, dtype=torch.int32)
    for taps in (5, 2**16):
        assert nk.attention_features(*empty, tap_rows=taps).rows.shape == (0, 2, taps)
    with pytest.raises(ValueError, match="attention_features: tap_rows must be at most 65536"):
        nk.attention_features(*empty, tap_rows=2**31 - 1)


ODD_BYTES = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
import namedmask_kernels as nk
from namedmask_kernels import backends
from operator_calls import flat

generator = torch.Generator().manual_seed(0)
masks = torch.rand(3, 70, 139, generator=generator) > 0.4  # words of 64 pixels and a rest
image = torch.randint(0, 256, (70, 139, 3), dtype=torch.uint8, generator=generator)
bytes_ = torch.tensor([1, 2, 127, 128, 254, 255], dtype=torch.uint8)
odd = (masks * bytes_[torch.randint(0, 6, masks.shape, generator=generator)]).view(torch.bool)
for op, *others in ((nk.bilateral_solver, image), (nk.connected_components,), (nk.largest_component,), (nk.fill_holes,),
                    (nk.run_lengths,), (nk.vote_masks,)):
    one = slice(None) if op is nk.vote_masks else 0
    for a, b in zip(flat(op(masks[one], *others)), flat(op(odd[one], *others)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, op.__name__
"""


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_bytes_other_than_one_are_true(run_at_level, level):
    """A bool array may view them, such as masks of OpenCV, which are 0 and 255."""
    run_at_level(level, ODD_BYTES.replace("sys.argv[2]", repr(str(Path(__file__).parent))))
