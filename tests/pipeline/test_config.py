# SPDX-License-Identifier: MIT
"""The settings: defaults and limits are published, so that a change must be deliberate."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from namedmask.config import Setting, settings

LISTING = Path(__file__).with_name("settings.txt")


def listing() -> str:
    """All settings with limits, default and option, one per line."""
    return "".join(f"{s.name} | {limits(s)} | {s.default} | {s.choices or s.flag}\n" for s in settings())


def limits(one: Setting) -> str:
    """Limits of a setting, of the number of its elements, and of each element."""
    lengths = [repr(m) for m in one.field.metadata if "Len" in repr(m)]
    elements = [
        repr(m.metadata)
        for arg in get_args(one.kind)
        for m in getattr(arg, "__metadata__", ())
        if one.is_list and hasattr(m, "metadata")
    ]
    return ", ".join(filter(None, [one.limits, *lengths, *elements]))


def test_names_limits_and_defaults_are_the_published_ones():
    assert listing() == LISTING.read_text(encoding="utf-8"), f"if this is intended, run python {__file__}"


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
