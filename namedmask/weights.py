# SPDX-License-Identifier: MIT
"""Weights: every file of tensors goes through `read`, and into every network through `load`.

timm and open_clip create networks, convert the names of other codes and resample position embeddings; they are given
tensors, never a path. So no file is ever unpickled, whatever their version does, and no tensor stays random unnoticed.
"""

from __future__ import annotations

import argparse
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .errors import UserError, first_line, listed
from .files import atomic_write, open_file, read_bytes

State = dict[str, Tensor]
Converter = Callable[..., Mapping[str, Tensor]]  # (tensors, network) -> tensors under the network's names

MAX_DEPTH = 4  # of the dictionaries in a checkpoint
# Tensors of a file may share memory, such as tied embeddings. More than this many times the size of the file is no
# checkpoint, but an attempt to fill the memory.
MAX_SHARING = 4
AVERAGED = re.compile(r"(?<![a-z])(teacher|ema)(?![a-z])", re.IGNORECASE)  # of two copies, the better one
MAX_CANDIDATES = 16

# Buffers that networks compute themselves, or that profilers (thop) leave in a file.
CONSTANTS = ("attn_mask", "filt", "total_ops", "total_params")
HEADS = ("head", "head_dist", "fc", "fc_norm", "classifier", "attn_pool")  # of timm's models; not used here


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        tree: Dictionaries of tensors, nested as the training code wrote them.
        source: Where they are from, as the beginning of an error message.
    """

    tree: dict[str, Any]
    source: str


def read(path: str | Path, option: str = "") -> Weights:
    """Reads a safetensors file, or a file that torch opens with weights_only=True. No code of the file is executed.

    Args:
        path: The file.
        option: Option of the command that takes the path, for error messages.

    Raises:
        UserError: If the file does not exist, cannot be read or holds other objects than tensors and plain values.
    """
    from safetensors.torch import load as load_bytes
    from safetensors.torch import load_file

    path = Path(path)
    source = f"{option} {path}".strip()
    try:
        with open_file(path) as file:
            head = file.read(9)
        if head[8:] == b"{":  # after the length of safetensors' JSON header
            # load_file takes UTF-8 paths only.
            tree: Any = load_file(path) if _is_utf8(path) else load_bytes(read_bytes(path))
        elif _is_torchscript(path):
            raise UserError(
                f"{source} is a TorchScript program, as OpenAI's files of CLIP are; if you trust it, save its tensors: "
                "torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
            )
        elif head.startswith((b"PK", b"\x80")):
            with torch.serialization.safe_globals([argparse.Namespace]):  # options of a training, in many checkpoints
                tree = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UserError(f"{source} cannot be read: it is neither a safetensors file nor a file of torch.save")
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such file") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # each format has its own exceptions
        raise UserError(f"{source} cannot be read: {_why_unreadable(path, error)}") from None
    claimed = sum(tensor.numel() * tensor.element_size() for _, state in _states(tree) for tensor in state.values())
    if claimed > MAX_SHARING * path.stat().st_size:
        raise UserError(f"{source} cannot be read: its tensors claim {claimed:,} bytes, far more than it has")
    if not claimed:
        raise UserError(f"{source} holds no named tensors")
    return Weights(tree, source)


def write(path: Path, network: nn.Module) -> None:
    """Writes the tensors of a network to a safetensors file, which appears whole or not at all."""
    from safetensors.torch import save

    with atomic_write(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # not a zip file, or a damaged one
        return False


def _why_unreadable(path: Path, error: Exception) -> str:
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file that torch can open
        unsafe = []
    unsafe = [name for name in unsafe if name != "argparse.Namespace"]
    if unsafe:
        return (
            f"it holds Python objects ({listed(unsafe)}), which could execute code; save only the tensors, as "
            "torch.save(network.state_dict(), FILE) or with safetensors"
        )
    line = first_line(error)
    if "PytorchStreamReader" in line or "inline_container" in line:
        return "it is damaged, or a zip file that torch has not written"
    if "weights_only" in line or line.startswith("Weights only"):  # torch advises to switch the protection off
        return "it is damaged, or holds Python objects, not only tensors"
    return line


def load(
    network: nn.Module,
    weights: Weights,
    what: str,
    convert: Converter | None = None,
    needed: Collection[str] | None = None,
) -> None:
    """Loads weights into a network, completely or not at all.

    Training codes nest their weights ("state_dict", "model", "teacher", ...) and prefix their names ("module.",
    "backbone.", "encoder.", ...). The part of the file and the prefix are chosen that give the network most tensors; of
    equals, those of a teacher or of an exponential moving average. Names may have "_" for "." as in timm's encoders.

    Args:
        network: The network.
        weights: The weights.
        what: Name of the network for error messages.
        convert: Maps tensors with the names of other codes to those of the network, and resamples them.
        needed: Names of tensors that must be there; None: `parameters_and_statistics` of the network.

    Raises:
        UserError: If a tensor is missing, has another shape or a value that is not finite, or if the file has more
            layers than the network, or more tensors in its layers. The network is unchanged then.
    """
    own = network.state_dict()
    names = {flat(name): name for name in own}
    expected = names.keys() & {flat(name) for name in needed or parameters_and_statistics(network)}
    best: tuple[int, State] = (-1, {})
    for state in candidates(weights.tree, names):
        given = {names.get(flat(name), name): tensor for name, tensor in _converted(state, network, convert).items()}
        found = sum(names[name] in given and _fits(given[names[name]], own[names[name]]) for name in expected)
        best = max(best, (found, given), key=lambda one: one[0])
        if found == len(expected):
            break
    given = best[1]
    expect(own, given, weights.source, what, [name for name in own if flat(name) in expected])
    fitting = {name: given[name].to(own[name].dtype) for name in own if name in given and _fits(given[name], own[name])}
    for name, tensor in fitting.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{weights.source} is damaged: {name} has values that are NaN or infinite")
    network.load_state_dict(fitting, strict=False)


def expect(own: State, given: State, source: str, what: str, needed: Sequence[str] | None = None) -> None:
    """Compares the names and shapes of given tensors with those of a network, which may be on the meta device.

    Args:
        own: Tensors of the network.
        given: Tensors of a file, under the network's names.
        source: The file, for the error message.
        what: Name of the network for the error message.
        needed: Names that must be among the given ones; None: all.

    Raises:
        UserError: If a needed tensor is missing or has another shape, or if the file has more layers than the network,
            or more tensors in its layers, such as scales of quantized or adapted weights.
    """
    needed = list(own) if needed is None else needed
    absent = [name for name in needed if name not in given]
    misfits = [name for name in needed if name in given and not _fits(given[name], own[name])]
    layers = {_layer(name) for name in own}
    modules = {name.partition(".")[0] for name in own if "." in name}
    unknown = [name for name in given if name not in own]
    surplus = [name for name in unknown if _layer(name) in layers or _is_used(name, given[name], modules)]
    if not (absent or misfits or surplus):
        return
    faults = [f"it has {len(needed) - len(absent) - len(misfits)} of {len(needed)} tensors"]
    if absent:
        faults.append(f"missing {listed(absent)}")
    if misfits:
        faults.append(f"{misfits[0]} is {_describe(given[misfits[0]])}, expected {_describe(own[misfits[0]])}")
    if surplus or (absent and unknown):
        faults.append(f"unexpected {listed(surplus or unknown)}")
    raise UserError(f"{source} does not fit {what}: {'; '.join(faults)}")


def candidates(tree: dict[str, Any], names: Collection[str]) -> list[State]:
    """The parts of a checkpoint that may be the weights of a network, the most likely first.

    Args:
        tree: Dictionaries of tensors, as `read` returns them.
        names: Names of the network's tensors, with "_" for ".".
    """
    found: list[tuple[int, bool, int, State]] = []
    for label, state in _states(tree):
        hits: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for key in state:
            for prefix in _prefixes(key):
                hits[prefix] += flat(key[len(prefix) :]) in names
                count[prefix] += 1
        shared = max((prefix for prefix in count if count[prefix] == len(state)), key=len)
        for prefix in dict.fromkeys([*(prefix for prefix, _ in hits.most_common(4)), shared, ""]):
            part = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
            found.append((hits[prefix], bool(AVERAGED.search(f"{label}.{prefix}")), len(part), part))
    found.sort(key=lambda one: one[:3], reverse=True)
    return [part for *_, part in found[:MAX_CANDIDATES]]


def _states(tree: Any, label: str = "", depth: int = MAX_DEPTH) -> Iterator[tuple[str, State]]:
    """The dictionaries of a checkpoint that hold tensors, with the keys that lead to them."""
    if not isinstance(tree, dict):
        return
    state = {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if state:
        yield label, state
    for key, value in tree.items() if depth else ():
        yield from _states(value, f"{label}.{key}", depth - 1)


def _prefixes(key: str) -> Iterator[str]:
    """All prefixes of a name that end with a dot, and the empty one."""
    yield ""
    for dot in re.finditer(r"\.", key):
        yield key[: dot.end()]


def flat(name: str) -> str:
    """A name with "_" for ".", as timm's encoders have it."""
    return name.replace(".", "_")


def _is_used(name: str, tensor: Tensor, modules: Collection[str]) -> bool:
    """Whether a tensor that a network does not know takes part in what these modules of it compute: not a head, not a
    constant, not a table of integers such as BatchNorm's counters."""
    parts = name.split(".")
    return parts[0] in modules and tensor.is_floating_point() and not set(parts) & {*HEADS, *CONSTANTS}


def _layer(name: str) -> str:
    """A name without the numbers of layers."""
    return re.sub(r"(?<=_)\d+(?=_)", "*", flat(name))


def parameters_and_statistics(network: nn.Module) -> list[str]:
    """Names of the tensors without which a network would be partly random.

    Other buffers are computed by the network itself, and old files lack BatchNorm's counters.
    """
    names = [name for name, _ in network.named_parameters()]
    for prefix, module in network.named_modules():
        if isinstance(module, _NormBase):
            names += [f"{prefix}.{name}" for name in ("running_mean", "running_var")]
    return names


def _converted(state: State, network: nn.Module, convert: Converter | None) -> Mapping[str, Tensor]:
    if convert is None:
        return state
    try:
        try:
            return convert(dict(state), network)
        except TypeError:  # some of timm's converters take the tensors alone
            return convert(dict(state))
    except Exception:  # made for another network: the tensors keep their names
        return state


def _fits(tensor: Tensor, own: Tensor) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    return plain and tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()


def _describe(tensor: Tensor) -> str:
    kinds = {"sparse": tensor.layout != torch.strided, "without values (meta)": tensor.is_meta}
    kind = "".join(f"{name} " for name, is_it in kinds.items() if is_it)
    return f"{kind}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# -- timm and open_clip ------------------------------------------------------------------------------------------------

_replacing = threading.RLock()


@contextmanager
def replaced(module: Any, name: str, function: Callable) -> Iterator[None]:
    """Replaces a function of a module during the block, which one thread enters at a time."""
    with _replacing:
        original = getattr(module, name)
        setattr(module, name, function)
        try:
            yield
        finally:
            setattr(module, name, original)


def timm_model(
    name: str, what: str, source: Callable[[Any], Weights], needed: Collection[str] | None = None, **options: Any
) -> Any:
    """Creates a timm model with weights.

    timm converts the names of a model's authors only on the way to its own loader. `load` takes the place of that one,
    which in some versions executes pickles, and leaves missing tensors at random values.

    Args:
        name: Name of the model.
        what: Its name for error messages.
        source: Maps the model's pretrained_cfg to its weights.
        needed: See `load`; None: all but `HEADS`.
        options: Passed on to timm.

    Raises:
        UserError: If the weights do not fit.
    """
    import timm
    from timm.models import _builder

    loaded = []

    def load_pretrained(model: nn.Module, pretrained_cfg: Any, filter_fn: Converter | None = None, **_: Any) -> None:
        body = [name for name in parameters_and_statistics(model) if name.partition(".")[0] not in HEADS]
        load(model, source(pretrained_cfg), what, filter_fn, needed or body)
        loaded.append(model)

    with replaced(_builder, "load_pretrained", load_pretrained):
        model = timm.create_model(name, pretrained=True, **options)
    if not loaded:
        raise UserError(f"{what}: timm cannot load weights into it; choose another model")
    return model


def clip_model(name: str, what: str, source: Callable[[Any], Weights], **options: Any) -> Any:
    """Creates a CLIP model of open_clip with weights.

    As in `timm_model`, `load` takes the place of open_clip's own loader, but its conversions stay.

    Args:
        name: Name of the model.
        what: Its name for error messages.
        source: Maps the settings of the published weights, {} if there are none, to the weights.
        options: Passed on to open_clip. If `pretrained` is a tag, the preprocessing is that of its weights.

    Raises:
        UserError: If the weights do not fit.
    """
    import open_clip
    from open_clip import factory

    def convert(state: State, model: nn.Module) -> State:
        converted: State = {}
        with replaced(factory, "load_state_dict", lambda *_, **__: state):
            model.load_state_dict = lambda state, **_: converted.update(state)  # type: ignore[assignment]
            try:
                open_clip.load_checkpoint(model, "")
            finally:
                del model.load_state_dict
        return converted

    used: dict[str, Any] = {}

    def settle(cfg: dict[str, Any], **_: Any) -> str:
        used.update(cfg)
        return "published"

    def load_checkpoint(model: nn.Module, *_: Any, **__: Any) -> None:
        load(model, source(used), what, convert)

    with replaced(factory, "download_pretrained", settle), replaced(factory, "load_checkpoint", load_checkpoint):
        return open_clip.create_model_and_transforms(name, **options)[0]
