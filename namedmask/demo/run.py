# SPDX-License-Identifier: MIT
"""`namedmask demo`: photos rendered here, the ordinary pipeline over them, and what its masks and segmenter are worth.

OUT is an ordinary run folder, with these beside:

photos/00000.png                       the index, rendered; 4 photos of each kind and 5 of none in every 53
scenes.png  masks.png  segments.png    contact sheets, also in report.html
demo.json                              the figures of the printed tables (see `score` and `score_scenes`); written last
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import run
from ..config import DetectorConfig, RefineConfig
from ..distributed import Worker, count_gpus
from ..errors import UserError
from ..files import TEMPORARY_PREFIX, atomic_write
from ..progress import Progress
from ..threads import kernels_on_one_thread, map_ahead, thread_count
from .folder import FIGURES, SHEETS, fingerprint, read_figures
from .models import CLIP_NAME, ENCODER_NAME, SELFMASK_WEIGHTS, VIT_NAME
from .scenes import KINDS, index_photo

SEED = 7  # neither training (tools/train_demo_weights.py) nor the choice of the settings below has seen this one
STAGES = ("index", "archive", "pseudolabel", "experts", "train")
BLOCK = 53  # photos: what `scenes.index_photo` deals the kinds in

# Chosen on photos of another seed. The solver's sigmas are given for photos of 512 pixels: these are of 160. COARSE
# serves the cut and what takes no learning better than REFINE, which SelfMask's finer masks want.
SPECTRAL = {"backbone": VIT_NAME, "features": "tokens", "center_features": True, "tau": 0.0, "image_size": 128}
DETECTOR = {"name": "selfmask", "backbone": VIT_NAME, "image_size": 160, "scales": [1.0, 1.4], "horizontal_flip": True}
REFINE = {
    "name": "bilateral",
    "largest_component": True,
    "fill_holes": True,
    "sigma_spatial": 20.0,
    "sigma_luma": 12.0,
    "sigma_chroma": 5.0,
    "smoothness": 128.0,
}
COARSE = REFINE | {"sigma_spatial": 26.0, "sigma_chroma": 6.0, "smoothness": 256.0}

# Short trainings on small photos, from encoders of the demo: photos shrunk less, rates higher than the paper's.
LEARNING = {
    "head_channels": 64,
    "crop_size": 96,
    "scale": (0.4, 1.0),
    "blur_sigma": (0.1, 1.0),
    "batch_size": 16,
    "weight_decay": 1e-4,
    "encoder_bn_momentum": 0.1,
}
EXPERTS = LEARNING | {
    "mode": "shared",
    "encoder": VIT_NAME,
    "encoder_weights": str(SELFMASK_WEIGHTS),
    "steps": 80,
    "lr": 3e-3,
    "encoder_lr": 3e-4,
}
# Nothing is pasted: views of 96 pixels have no room, and segmenters are better for it (bench/ABLATIONS.md, seeds 8, 9).
SEGMENTER = LEARNING | {"encoder": ENCODER_NAME, "steps": 155, "lr": 3e-3, "encoder_lr": 1e-3, "paste_objects": (0, 0)}


def run_demo(
    out: Path, *, overwrite: bool = False, blocks: int = 20, best: int = 50, steps: int | None = None, scenes: int = 80
) -> dict:
    """Runs the demo in the folder `out`, or what is left of it to do; prints and returns the figures of demo.json.

    overwrite: make everything anew. blocks: of 53 photos each. best: photos in the archive of each kind. steps: of the
    experts' and the segmenter's trainings, instead of the demo's. scenes: that the segmenter is scored on.
    """
    from .score import print_figures, score
    from .score_scenes import score_scenes
    from .sheets import draw_masks, draw_scenes, draw_segments

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
        "pseudolabel": {"keep_detected": True},
        "detector": DETECTOR,
        "refine": REFINE,
        "experts": EXPERTS | ({"steps": steps} if steps else {}),
        "segmenter": SEGMENTER | ({"steps": steps} if steps else {}),
    }
    if overwrite:
        (out / FIGURES).unlink(missing_ok=True)
    with timed("render"):
        render(out / "photos", SEED, blocks * BLOCK, overwrite)
    if overwrite:
        with run.locked(out):
            run.settle(out, given, list(run.STAGES), overwrite)
    # Where somebody else uses a core too, threads that share each product slow the training of such small networks
    # several times; and the rounding would depend on their number.
    with kernels_on_one_thread("cuda" if count_gpus(None, 1) else "cpu"):
        for stage in STAGES:
            with timed(stage):
                run.start(out, given, [stage], workers=1, gpus=None, overwrite=False)

    figures = read_figures(out)
    if figures is None or not all((out / name).exists() for name in (*SHEETS, "report.html")):
        with timed("score"):
            figures, shown = score(out, SEED, DetectorConfig(**SPECTRAL), RefineConfig(**COARSE))
            of_scenes, segmented = score_scenes(out, SEED, scenes)
            figures |= of_scenes
        with timed("report"):
            drawn = draw_scenes(SEED), draw_masks(shown), draw_segments(segmented)
            for sheet, name in zip(drawn, SHEETS, strict=True):
                with atomic_write(out / name) as file:
                    sheet.save(file, "png")
            from ..report import write_report

            write_report(out, dict(zip(SHEETS.values(), drawn, strict=True)))
        figures |= {"seconds": {**seconds, "all": round(sum(seconds.values()), 1)}, "made_of": fingerprint(out)}
        with atomic_write(out / FIGURES) as file:
            file.write(json.dumps(figures, indent=1).encode() + b"\n")
    print_figures(figures)
    print(f"figures: {out / FIGURES}; sheets: {', '.join(str(out / name) for name in SHEETS)}")
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
            progress.advance(1)


def photo_name(number: int) -> str:
    """What photo `number` of the index is called."""
    return f"{number:05}.png"
