# SPDX-License-Identifier: MIT
"""The exceptions that the commands print as a single line."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# The stage that computes the files in a folder of a run, or a file of it, again.
_STAGE_OF = {
    "index": "index",
    "archive.json": "archive",
    "masks": "pseudolabel",
    "detected": "pseudolabel",
    "errors.jsonl": "pseudolabel",
    "saliency": "train-saliency",
    "experts": "experts",
    "refining": "experts",
    "refined": "experts",
    "segmenter": "train",
}


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Sequence[str], count: int = 3) -> str:
    """The first of some names, each shortened, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(name if len(name) <= 80 else f"{name[:77]}..." for name in names[:count]) + more


def counted(number: int, noun: str) -> str:
    """ "1 photo", "2,000 photos", "3 categories"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"


def quoted(names: Iterable[object]) -> str:
    """`listed`, with quotes and escapes."""
    return listed([repr(name) for name in names])


# Of pydantic and typer, in our words.
MESSAGES = {
    "Value error, ": "",
    "Input should be": "expected",
    "less than or equal to": "at most",
    "greater than or equal to": "at least",
    "greater than": "above",
    "less than": "below",
    ", unable to parse string as a number": "",
    ", unable to parse string as an integer": "",
}


def plain(message: str) -> str:
    """A message of pydantic or typer in the words of ours."""
    for long, short in MESSAGES.items():
        message = message.replace(long, short)
    return message


def wrong_value(name: str, error: Any) -> str:
    """A pydantic error in one line: the field, what was expected and what came."""
    message = plain(error["msg"]).removeprefix("Field ")
    return f"{name}: {message}" if error["type"] == "missing" else f"{name}: {message}, got {error['input']!r}"


# In the messages of torch's allocators and of tensors too large to address.
_NO_MEMORY = ("can't allocate memory", "out of memory", "size calculation overflowed", "multiplication overflow")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch has failed to allocate memory. torch's CPU allocator has no type of its own."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)
    )


def explained(error: Exception) -> Exception:
    """The exception itself, or a UserError with the remedy.

    There is one if memory ran out, a file could not be opened, or another package could not be imported.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        file, reason = os.fsdecode(error.filename), error.strerror or error
        return UserError(f"{file}: {reason}; correct or move it, and run the same command again")
    if is_out_of_memory(error):
        return UserError(
            f"out of memory ({first_line(error)}); lower --image-size, --crop-size, --batch-size or --workers (see "
            "Troubleshooting in the documentation)"
        )
    if (module := not_imported(error)) is None:
        return error
    from importlib import metadata  # takes as long as the start of Python

    package = module.partition(".")[0]
    names = metadata.packages_distributions().get(package)
    if names is None:  # a module of the user's own
        return UserError(f"{module} cannot be imported: {type(error).__name__}: {error}")
    name, beside, options = names[0], "", "--no-deps"
    if name == "torchvision":  # each of its versions and builds works with a single one of torch
        import torch

        beside = f" beside torch {torch.__version__}"
        options = "torch" if torch.version.cuda else "torch --index-url https://download.pytorch.org/whl/cpu"
    return UserError(
        f"{name} {metadata.version(name)} cannot be imported{beside}: "
        f"{first_line(error)}; install it again: pip install --force-reinstall {name} {options}"
    )


def not_imported(error: Exception) -> str | None:
    """The module outside this project whose import raised the exception, if one did."""
    names = [
        frame.f_globals.get("__name__", "")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    ours = not names or names[-1].partition(".")[0] in ("namedmask", "namedmask_kernels", "__main__")
    return None if ours else names[-1]


class NothingUsable(UserError):
    """No photo could be used. The commands exit with code 3."""


class DamagedFile(UserError, ValueError):
    """A file with results cannot be used: it was cut off, overwritten or edited.

    Args:
        path: The file.
        reason: What is wrong: an exception, or a phrase.
        line: Number of the line, from 1.
        remedy: What to do; default: delete the file and run the stage that writes it, if it is in a run folder.
    """

    def __init__(self, path: str | os.PathLike, reason: object, *, line: int | None = None, remedy: str = ""):
        path = Path(path)
        if isinstance(reason, BaseException):
            first = (str(reason).splitlines() or [""])[0].removeprefix(f"{path} ")
            reason = first if type(reason) in (ValueError, UserError) else f"{type(reason).__name__}: {first}"
        place = f"{path}:{line}" if line else f"{path}"
        super().__init__(f"{place}: {reason}; the file is damaged: {remedy or _remedy(path)}")


class WriteError(UserError, OSError):
    """A file could not be written. `errno` is that of the cause."""


def _remedy(path: Path) -> str:
    for folder in (path, *path.parents):
        if stage := _STAGE_OF.get(folder.name):
            run = folder.parent
            break
    else:
        return "delete it and make it again"
    again = f"run `namedmask {stage} {run}` to make it again"
    if stage == "index":
        again = f"run `namedmask index --out {run}` to make it again"
    shard = path.name.removesuffix(".errors.jsonl")
    if path.name.endswith(".errors.jsonl") and shard.isdecimal():  # the shard is what the stage looks for
        suffix = ".safetensors" if stage == "index" else ".jsonl"
        return f"delete it and {path.with_name(shard + suffix)}, and {again}"
    if folder.name == "detected":
        return f"delete it and {run / 'masks' / path.name}, and {again}"
    return f"delete it and {again}"
