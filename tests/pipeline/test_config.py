# SPDX-License-Identifier: MIT
"""The settings: defaults and limits are published, so that a change must be deliberate."""

from __future__ import annotations

from pathlib import Path

from namedmask.config import settings

LISTING = Path(__file__).with_name("settings.txt")


def listing() -> str:
    """All settings with limits, default and option, one per line."""
    return "".join(f"{s.name} | {s.limits} | {s.default} | {s.choices or s.flag}\n" for s in settings())


def test_names_limits_and_defaults_are_the_published_ones():
    assert listing() == LISTING.read_text(encoding="utf-8"), f"if this is intended, run python {__file__}"


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
