# SPDX-License-Identifier: MIT
"""Photos and category names in, named segmentation masks out. `Pipeline` and the commands of `cli` make them; the
kernels stand alone in `namedmask_kernels`.

Nothing is printed: messages go to the logger "namedmask".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import NothingUsable, UserError
    from .masks import MaskRecord
    from .photos import PhotoSource
    from .pipeline import Pipeline, Run
    from .progress import ProgressEvent
    from .segmenter.predict import Segmenter
    from .selection import Selection

# Name -> module, imported when the name is first used.
_MODULES = {
    "MaskRecord": "masks",
    "NothingUsable": "errors",
    "PhotoSource": "photos",
    "Pipeline": "pipeline",
    "ProgressEvent": "progress",
    "Run": "pipeline",
    "Segmenter": "segmenter.predict",
    "Selection": "selection",
    "UserError": "errors",
}

__all__ = [
    "MaskRecord",
    "NothingUsable",
    "PhotoSource",
    "Pipeline",
    "ProgressEvent",
    "Run",
    "Segmenter",
    "Selection",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # as slow as the start of Python itself

        return version("namedmask")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
