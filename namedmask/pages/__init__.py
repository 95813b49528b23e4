# SPDX-License-Identifier: MIT
"""The HTML pages: their templates, style and script, and what fills them. `pictures` draws what they show."""

from __future__ import annotations

import json
import re
from array import array
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import markupsafe
import numpy as np

from ..masks import ErrorRecord, read_errors

ERRORS_SHOWN = 200
_BINS = 20
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(value: Any) -> Any:
    """Escapes control characters, and the lone surrogates of names that are not UTF-8, as Python does."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), value)


def script_json(value: Any) -> markupsafe.Markup:
    """JSON that can stand in a <script> of a page: ASCII without "<"."""
    return markupsafe.Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def template(name: str) -> jinja2.Template:
    """A template of this folder."""
    # finalize is applied to every value that is put into the page.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["anchor"] = anchor
    return environment.get_template(name)


def anchor(*names: str) -> str:
    """The fragment of a URL, and the id of an element, for a category, or for a category and a photo."""
    kind = "mask" if names[1:] else "category"
    return "/".join([kind, *(quote(name, safe="", errors="surrogateescape") for name in names)])


def histogram(scores: np.ndarray | array, low: float, high: float) -> str:
    """The bars of a histogram as an SVG path, `_BINS` wide and 1 high."""
    counts, _ = np.histogram(scores, _BINS, (low, high))
    heights = counts / max(1, counts.max())
    return "".join(f"M{x} 1V{1 - y:.3f}h.9V1z" for x, y in enumerate(heights) if y)


def read_some_errors(path: Path) -> tuple[list[ErrorRecord], int]:
    """The first `ERRORS_SHOWN` errors of a run and the total number."""
    if not path.exists():
        return [], 0
    errors = read_errors(path)
    shown = list(islice(errors, ERRORS_SHOWN))
    return shown, len(shown) + sum(1 for _ in errors)
