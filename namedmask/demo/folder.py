# SPDX-License-Identifier: MIT
"""What a demo's folder holds beside a run's files, and whether it is of the masks that are there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FIGURES = "demo.json"
SHEETS = {
    "scenes.png": "What the photos look like",
    "masks.png": "Photo, SelfMask alone, refined, truth",
    "segments.png": "Scenes of several objects: a mask that CLIP names, the segmenter, the truth",
}


def fingerprint(out: Path) -> str:
    """Tells one set of archive, masks and segmenter from another."""
    digest = hashlib.sha256()
    for made in ("archive.json", "masks/*.jsonl", "refined/*.jsonl", "segmenter/model.safetensors"):
        for path in sorted(out.glob(made)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_figures(out: Path) -> dict | None:
    """The figures of an earlier run, if they are of these very masks."""
    try:
        figures = json.loads((out / FIGURES).read_bytes())
    except (OSError, ValueError):
        return None
    return figures if figures.get("made_of") == fingerprint(out) else None


def contact_sheets(out: Path) -> dict[str, Image.Image]:
    """The sheets of the demo in `out` by their captions, for a report that is written again.

    Empty where no demo has made `out`, or the masks are no longer those that it has scored and drawn.
    """
    from PIL import Image

    if read_figures(out) is None:
        return {}
    return {caption: Image.open(out / name) for name, caption in SHEETS.items() if (out / name).exists()}
