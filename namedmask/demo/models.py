# SPDX-License-Identifier: MIT
"""The demo's two networks: a tiny CLIP known to open_clip and a tiny ViT known to timm, under ordinary names.

After :func:`register` both are created, loaded and run by exactly the calls that create, load and run
``ViT-L-14-336`` and ``vit_small_patch8_224.dino``: ``--clip-model namedmask-demo --clip-weights CLIP_WEIGHTS
--backbone vit_namedmask_demo --backbone-weights VIT_WEIGHTS``. The weights are fp16 safetensors in the package, made by
``tools/train_demo_weights.py`` from rendered scenes alone.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

CLIP_NAME = "namedmask-demo"
VIT_NAME = "vit_namedmask_demo"
WEIGHTS = Path(__file__).parent / "weights"
CLIP_WEIGHTS = WEIGHTS / "clip.safetensors"
VIT_WEIGHTS = WEIGHTS / "vit.safetensors"
SELFMASK_WEIGHTS = WEIGHTS / "selfmask.safetensors"

VIT_ARGUMENTS = {"img_size": 192, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


@functools.cache
def register() -> None:
    """Make both names known to open_clip and timm; any number of calls does it once."""
    import open_clip
    from timm.models import generate_default_cfgs, register_model
    from timm.models.vision_transformer import _cfg, _create_vision_transformer

    open_clip.add_model_config(Path(__file__).parent / f"{CLIP_NAME}.json")

    def vit_namedmask_demo(pretrained: bool = False, **arguments) -> nn.Module:
        return _create_vision_transformer(VIT_NAME, pretrained=pretrained, **{**VIT_ARGUMENTS, **arguments})

    # timm files a model under the module that defines it, with that module's table of default settings.
    globals()["default_cfgs"] = generate_default_cfgs({VIT_NAME: _cfg(input_size=(3, 192, 192), num_classes=0)})
    register_model(vit_namedmask_demo)


def create_clip(weights: str | Path | None = CLIP_WEIGHTS) -> tuple[nn.Module, object, object]:
    """The tiny CLIP in float32 eval mode: (model, preprocess for a PIL image, tokenizer). No ``weights``: untrained."""
    import open_clip

    register()
    model, _, preprocess = open_clip.create_model_and_transforms(
        CLIP_NAME, pretrained=None if weights is None else str(weights)
    )
    return model.eval(), preprocess, open_clip.get_tokenizer(CLIP_NAME)


def create_vit(weights: str | Path | None = VIT_WEIGHTS, seed: int = 0) -> nn.Module:
    """The tiny ViT in float32 eval mode, for photos of any shape. ``weights`` None: untrained, drawn from ``seed``."""
    import timm
    import torch

    register()
    options = {"num_classes": 0, "dynamic_img_size": True}
    if weights is not None:
        overlay = {"file": str(weights), "hf_hub_id": None, "url": None, "custom_load": False}
        return timm.create_model(VIT_NAME, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(VIT_NAME, pretrained=False, **options).eval()
