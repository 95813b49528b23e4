# SPDX-License-Identifier: MIT
"""Measures the peak memory of labeling or segmenting large synthetic photos, with random weights.

OMP_NUM_THREADS=16 python tools/large_photos.py bilateral --count 12 --megapixels 48 --suffix jpg
"""

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from safetensors.torch import save_file

from namedmask.backbones import untrained_encoder
from namedmask.config import make_config
from namedmask.photos import PhotoError, PhotoSource
from namedmask.pseudolabel import Labeler
from namedmask.segmenter.deeplab import DeepLab
from namedmask.segmenter.predict import Segmenter
from namedmask.threads import thread_count

BACKBONE = "vit_tiny_patch16_224"


def write_photos(folder: Path, count: int, megapixels: float, suffix: str) -> None:
    """Writes equal photos of 4 : 3."""
    side = int((megapixels * 1e6 / 12) ** 0.5)
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    photo = Image.fromarray(noise).resize((4 * side, 3 * side), Image.Resampling.BICUBIC)
    for number in range(count):
        photo.save(folder / f"{number}.{suffix}")


def peak() -> float:
    """Peak resident set of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("bilateral", "crf", "pamr", "none", "segment"), help="refiner, or segment")
    parser.add_argument("--count", type=int, default=12, help="number of photos")
    parser.add_argument("--megapixels", type=float, default=48)
    parser.add_argument("--suffix", default="jpg")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        # In another process: the peak should be that of reading alone.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(write_photos, root, options.count, options.megapixels, options.suffix).result()
        source = PhotoSource(root)
        names = list(source)
        save_file(timm.create_model(BACKBONE, num_classes=0).state_dict(), root / "vit.safetensors")
        if options.step == "segment":
            network = DeepLab(untrained_encoder("resnet50"), 21)
            batches = Segmenter(network, [str(number) for number in range(20)]).segment(source, names)
        else:
            detector = {"backbone": BACKBONE, "backbone_weights": str(root / "vit.safetensors")}
            config = {"photos": str(root), "detector": detector, "refine": {"name": options.step}}
            batches = Labeler(make_config(config), "cpu").label(source, [(name, None) for name in names])
        began, base, done = time.monotonic(), peak(), 0
        for batch in batches:
            done += sum(not isinstance(result[1], PhotoError) for result in batch)
        seconds = time.monotonic() - began
    print(f"{done} photos, {thread_count()} threads: {base:.2f} GB before, peak {peak():.2f} GB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
