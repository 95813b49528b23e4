# SPDX-License-Identifier: MIT
"""`namedmask demo`: photos rendered here, the ordinary pipeline over them, and what its masks are worth.

OUT is an ordinary run folder, with these beside:

photos/00000.png           the index, rendered; 4 photos of each kind and 5 of none in every 53
scenes.png  masks.png      contact sheets, also in report.html
demo.json                  the figures of the printed table (`score` says what they mean); written last
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .. import run
from ..config import DetectorConfig
from ..distributed import Worker
from ..errors import UserError
from ..files import TEMPORARY_PREFIX, atomic_write
from ..progress import Progress
from ..threads import map_ahead, thread_count
from .models import CLIP_NAME, VIT_NAME
from .scenes import KINDS, index_photo

if TYPE_CHECKING:
    from PIL import Image

SEED = 7  # neither training (tools/train_demo_weights.py) nor the choice of the settings below has seen this one
SHEETS = {"scenes.png": "What the photos look like", "masks.png": "Photo, SelfMask alone, refined, truth"}
BLOCK = 53  # photos: what `scenes.index_photo` deals the kinds in

# Chosen on photos of another seed. The solver's sigmas are given for photos of 512 pixels: these are of 160.
SPECTRAL = {"backbone": VIT_NAME, "features": "tokens", "centre": True, "tau": 0.0, "image_size": 128}
DETECTOR = {"name": "selfmask", "backbone": VIT_NAME, "image_size": 160}
REFINE = {
    "name": "bilateral",
    "largest_component": True,
    "sigma_spatial": 26.0,
    "sigma_luma": 12.0,
    "sigma_chroma": 6.0,
}


def run_demo(out: Path, *, overwrite: bool = False, blocks: int = 20, best: int = 50) -> dict:
    """Runs the demo in the folder `out`, or what is left of it to do; prints and returns the figures of demo.json.

    overwrite: make everything anew. blocks: of 53 photos each. best: photos in the archive of each kind.
    """
    from .score import fingerprint, print_figures, score
    from .sheets import draw_masks, draw_scenes

    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[stage] = round(time.perf_counter() - start, 1)

    given = {
        "photos": str((out / "photos").absolute()),
        "categories": list(KINDS),
        "index": {"clip_model": CLIP_NAME},
        "archive": {"photos_per_category": best},
        "detector": DETECTOR,
        "refine": REFINE,
    }
    if overwrite:
        (out / "demo.json").unlink(missing_ok=True)
    with timed("render"):
        render(out / "photos", SEED, blocks * BLOCK, overwrite)
    if overwrite:
        with run.locked(out):
            run.prepare(out, given, run.STAGES, overwrite)
    for stage in ("index", "archive", "pseudolabel"):
        with timed(stage):
            run.start(out, given, [stage], workers=1, gpus=None, overwrite=False)

    figures = _finished(out, fingerprint(out))
    if figures is None:
        with timed("score"):
            figures, shown = score(out, SEED, DetectorConfig(**SPECTRAL))
        with timed("report"):
            drawn = draw_scenes(SEED), draw_masks(shown)
            for sheet, name in zip(drawn, SHEETS, strict=True):
                with atomic_write(out / name) as file:
                    sheet.save(file, "png")
            from ..report import write_report

            write_report(out, dict(zip(SHEETS.values(), drawn, strict=True)))
        figures |= {"seconds": {**seconds, "all": round(sum(seconds.values()), 1)}, "made_of": fingerprint(out)}
        with atomic_write(out / "demo.json") as file:
            file.write(json.dumps(figures, indent=1).encode() + b"\n")
    print_figures(figures)
    print(f"figures: {out / 'demo.json'}; sheets: {', '.join(str(out / name) for name in SHEETS)}")
    print(f"look at {out / 'report.html'}")
    return figures


def render(folder: Path, seed: int, count: int, overwrite: bool) -> None:
    """Makes the photos that are not in `folder` yet. Raises UserError where it holds other files, to harm none."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names = [photo_name(number) for number in range(count)]
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if strangers := sorted(there.difference(names)):
        raise UserError(f"{folder} holds files that this demo has not made ({strangers[0]}); choose another --out")

    def draw(number: int) -> None:
        path = folder / names[number]
        if overwrite or names[number] not in there:
            # Whole or not at all, as the names with a dot are nobody's photos.
            temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
            Image.fromarray(index_photo(seed, number).image).save(temporary, "png", compress_level=1)
            temporary.replace(path)

    with Progress("render", Worker()) as progress:
        progress.total = count
        for _ in map_ahead(draw, range(count), thread_count()):
            progress.tick(1)


def photo_name(number: int) -> str:
    """What photo `number` of the index is called."""
    return f"{number:05}.png"


def contact_sheets(out: Path) -> dict[str, Image.Image]:
    """The sheets of the demo in `out` by their captions, for a report that is written again.

    Empty where the masks are no longer those that the demo has scored and drawn.
    """
    from PIL import Image

    from .score import fingerprint

    if _figures(out, fingerprint(out)) is None:
        return {}
    return {caption: Image.open(out / name) for name, caption in SHEETS.items() if (out / name).exists()}


def _figures(out: Path, made_of: str) -> dict | None:
    """The figures of an earlier run, if they are of these very masks."""
    try:
        figures = json.loads((out / "demo.json").read_bytes())
    except (OSError, ValueError):
        return None
    return figures if figures.get("made_of") == made_of else None


def _finished(out: Path, made_of: str) -> dict | None:
    """The same, if all that goes with them is there too."""
    complete = all((out / name).exists() for name in (*SHEETS, "report.html"))
    return _figures(out, made_of) if complete else None
