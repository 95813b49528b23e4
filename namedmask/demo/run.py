# SPDX-License-Identifier: MIT
"""`namedmask demo`: renders photos, runs the ordinary pipeline on them and scores its masks and its segmenter.

OUT is an ordinary run folder with these files in addition:

photos/00000.png                       the rendered photos: 4 of each kind and 5 without an object in every block of 53
scenes.png  masks.png  segments.png    contact sheets, also shown in report.html
demo.json                              the figures of the printed tables (see `score` and `score_scenes`); written last
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import run
from ..config import DetectorConfig, RefineConfig
from ..distributed import Worker, count_gpus
from ..errors import UserError
from ..files import atomic_write, locked, make_folder, write_json
from ..progress import Progress
from ..record import expect_no_files, read_record
from ..report import results_digest, write_report
from ..threads import kernels_on_one_thread, map_ahead, thread_count
from .models import CLIP_NAME, ENCODER_NAME, SELFMASK_WEIGHTS, VIT_NAME
from .scenes import KINDS, index_photo

SEED = 7  # used neither by training (tools/train_demo_weights.py) nor to choose the settings below
STAGES = ("index", "archive", "pseudolabel", "experts", "train")
BLOCK = 53  # photos in which `scenes.index_photo` shows each kind equally often
FIGURES = "demo.json"
SHEETS = {
    "scenes.png": "Rendered photos",
    "masks.png": "Photo, SelfMask alone, refined mask, ground truth",
    "segments.png": "Scenes of several objects: SelfMask's mask with CLIP's name, the segmenter, ground truth",
}

# Chosen on photos of another seed. The sigmas of the solver are given for photos of 512 pixels; these have about 160.
# COARSE suits the cut and the baselines, REFINE the finer masks of SelfMask. In bfloat16, masks are as good as in
# float32 (bench/ABLATIONS.md), and computed in less time on CPUs that multiply in it.
SPECTRAL: dict[str, Any] = {
    "select": "name",
    "backbone": VIT_NAME,
    "features": "tokens",
    "center_features": True,
    "tau": 0.0,
    "image_size": 128,
    "precision": "bfloat16",
}
DETECTOR = {
    "name": "selfmask",
    "select": "name",
    "backbone": VIT_NAME,
    "image_size": 160,
    "scales": [1.0, 1.4],
    "horizontal_flip": True,
    "precision": "bfloat16",
}
REFINE: dict[str, Any] = {
    "name": "bilateral",
    "largest_component": True,
    "fill_holes": True,
    "sigma_spatial": 20.0,
    "sigma_luma": 12.0,
    "sigma_chroma": 5.0,
    "smoothness": 128.0,
}
COARSE = REFINE | {"sigma_spatial": 26.0, "sigma_chroma": 6.0, "smoothness": 256.0}

# Short trainings on small photos from the demo's own encoders: less downscaling and higher learning rates than in the
# paper. Dropout, random positions and the use of photos with empty masks are the paper's.
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
# No copy-paste: crops of 96 pixels have no room for it, and segmenters score higher without it (seeds 8 and 9 of
# bench/ABLATIONS.md). Dilations that stay within a crop, weaker changes of color and blur, and a lower
# weight of the background help in so few steps, and so do photos drawn by score and averaged weights, more in longer
# trainings.
SEGMENTER = LEARNING | {
    "encoder": ENCODER_NAME,
    "dilations": [2, 4, 6],
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "grayscale_prob": 0.05,
    "blur_prob": 0.2,
    "background_weight": 0.5,
    "score_power": 2.0,
    "ema_decay": 0.99,
    "steps": 155,
    "lr": 3e-3,
    "encoder_lr": 1e-3,
    "paste_objects": (0, 0),
    "allow_empty": True,  # experts of a few steps predict no object
    "held_out": 0.0,  # the demo scores with the ground truth
}


def run_demo(
    out: Path, *, overwrite: bool = False, blocks: int = 20, best: int = 50, steps: int | None = None, scenes: int = 80
) -> dict:
    """Runs the demo in the folder `out`, or the stages that have not finished yet, and prints the figures.

    Args:
        out: Run folder.
        overwrite: Render and compute everything again.
        blocks: Number of blocks of 53 photos.
        best: Photos in the archive of each kind.
        steps: Training steps of the experts and of the segmenter, instead of the demo's own numbers.
        scenes: Number of scenes that the segmenter is scored on.

    Returns:
        The figures, as in demo.json.

    Raises:
        UserError: If `out`/photos holds files of other origin, or photos that another version has rendered.
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

    settings: dict[str, Any] = {
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
    _expect_rendered(out / "photos", blocks * BLOCK)
    with locked(out):
        if read_record(out).photos is None:
            expect_no_files(out, ("photos", FIGURES, *SHEETS))
        run.claim(out, settings["photos"])
    if overwrite:
        (out / FIGURES).unlink(missing_ok=True)
    with timed("render"):
        render(out / "photos", SEED, blocks * BLOCK, overwrite)
    # One thread per kernel: on a busy machine, several threads per matrix product slow the training of such small
    # networks down by a factor of several, and the rounding would depend on their number.
    with kernels_on_one_thread("cuda" if count_gpus(None, 1) else "cpu"):
        for stage in STAGES:
            with timed(stage):
                run.start(out, settings, [stage], overwrite=overwrite and stage == STAGES[0])

    figures = read_figures(out)
    if figures is None or not all((out / name).exists() for name in (*SHEETS, "report.html")):
        with timed("score"):
            figures, examples = score(out, SEED, DetectorConfig(**SPECTRAL), RefineConfig(**COARSE))
            scene_figures, scene_examples = score_scenes(out, SEED, scenes)
            figures |= scene_figures
        with timed("report"):
            drawn = draw_scenes(SEED), draw_masks(examples), draw_segments(scene_examples)
            for sheet, name in zip(drawn, SHEETS, strict=True):
                with atomic_write(out / name) as file:
                    sheet.save(file, "png")
            write_report(out, SHEETS)
        figures |= {"seconds": {**seconds, "all": round(sum(seconds.values()), 1)}, "made_of": results_digest(out)}
        write_json(out / FIGURES, figures)
    print_figures(figures)
    print(f"figures: {out / FIGURES}; sheets: {', '.join(str(out / name) for name in SHEETS)}")
    print(f"the gallery is {out / 'report.html'}")
    return figures


def read_figures(out: Path) -> dict | None:
    """The figures of an earlier demo in `out`; None if there are none, or if the results have changed since."""
    try:
        figures = json.loads((out / FIGURES).read_bytes())
        return figures if figures["made_of"] == results_digest(out) else None
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged: scored again
        return None


def render(folder: Path, seed: int, count: int, overwrite: bool) -> None:
    """Renders the photos that are missing in `folder`."""
    from PIL import Image

    make_folder(folder)
    existing = {path.name for path in folder.iterdir()}

    def draw(number: int) -> None:
        if overwrite or photo_name(number) not in existing:
            # Names with a leading dot, as a kill may leave them, are never read as photos.
            with atomic_write(folder / photo_name(number)) as file:
                Image.fromarray(index_photo(seed, number).image).save(file, "png", compress_level=1)

    with Progress("render", Worker()) as progress:
        progress.total = count
        for _ in map_ahead(draw, range(count), thread_count()):
            progress.advance(1)


def _expect_rendered(folder: Path, count: int) -> None:
    """Raises UserError if the folder holds other files, so that the demo never changes photos of the user."""
    names = {photo_name(number) for number in range(count)}
    existing = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    if foreign := sorted(existing.difference(names)):
        raise UserError(f"{folder} holds files that the demo has not rendered ({foreign[0]}); choose another --out")


def photo_name(number: int) -> str:
    """File name of photo `number`."""
    return f"{number:05}.png"
