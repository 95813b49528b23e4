# SPDX-License-Identifier: MIT
"""Random weights for models that are not downloaded: networks take the same time with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, flatten, make_config, merge, nest

if TYPE_CHECKING:
    import torch

    from ..hub import Published


def with_random_weights(config: RunConfig, needed: Iterable[Published], folder: Path) -> tuple[RunConfig, list[str]]:
    """The settings with files of random weights for the models that have none in the caches, and the models' names."""
    import open_clip
    from safetensors.torch import save_file

    from ..backbones import TokenPyramid, untrained, untrained_encoder

    missing = [one.what for one in needed if one.cached() is None]

    def clip(model: str) -> torch.nn.Module:
        return open_clip.create_model(model.partition(":")[0], load_weights=False)

    def encoder(name: str) -> torch.nn.Module:
        network = untrained_encoder(name).network
        return network.vit if isinstance(network, TokenPyramid) else network

    def file(kind: str, name: str, make: Callable[[str], torch.nn.Module]) -> str | None:
        if (what := f"{kind} {name}") not in missing:
            return None
        path = folder / f"{missing.index(what)}.safetensors"
        if not path.exists():  # float16 takes half of the disk; it is read as float32
            logging.disable(logging.WARNING)  # open_clip warns of random weights
            state = make(name).state_dict().items()
            logging.disable(logging.NOTSET)
            save_file({key: t.half().contiguous() if t.is_floating_point() else t for key, t in state}, path)
        return str(path)

    more = {name: file("backbone", name, untrained) for name in config.detector.more_backbones}
    changes: dict[str, Any] = {
        "index": {"clip_weights": file("CLIP model", config.index.clip_model, clip)},
        "detector": {
            "backbone_weights": file("backbone", config.detector.backbone, untrained),
            "more_backbones": [f"{name}={path}" if path else name for name, path in more.items()],
        },
        "experts": {"encoder_weights": file("encoder", config.experts.encoder, encoder)},
        "segmenter": {"encoder_weights": file("encoder", config.segmenter.encoder, encoder)},
    }
    given = nest({name: value for name, value in flatten(changes).items() if value})
    return make_config(merge(config.model_dump(), given)), missing
