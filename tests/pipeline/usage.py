# SPDX-License-Identifier: MIT
"""A program that uses the pipeline from Python. mypy checks it as it would check a user's; test_pipeline.py runs it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from namedmask import MaskRecord, Pipeline, ProgressEvent, Run, Segmenter, Selection, UserError


def label(photos: Path, out: Path, settings: Mapping[str, Mapping[str, Any]]) -> tuple[Run, list[ProgressEvent]]:
    """Labels photos of cats and dogs and trains a segmenter."""
    events: list[ProgressEvent] = []
    pipeline = Pipeline(
        photos,
        ["cat", "dog"],
        out=out,
        progress=events.append,
        index=settings["index"],
        archive={"photos_per_category": 4},
        detector=settings["detector"],
        segmenter=settings["segmenter"],
    )
    try:
        run = pipeline.run()
    except UserError as error:
        logging.getLogger("usage").error("%s", error)
        raise
    assert run.masks("experts", Selection(min_score=0.5))
    return pipeline.train(), events


def best(run: Run) -> dict[str, np.ndarray]:
    """The best mask of each category, bool [H, W]."""
    records: list[MaskRecord] = list(run.masks(selection=Selection(per_category=1)))
    return {record.category: record.mask() for record in records}


def segment(run: Run) -> dict[str, set[str]]:
    """The names that the segmenter sees in each photo."""
    segmenter: Segmenter = run.segmenter(device="cpu")
    found = {}
    for photo in run.photos:
        mask, names, _ = segmenter(run.photos.decode(photo).pixels)
        found[photo] = {names[label] for label in np.unique(mask)}
    return found
