# SPDX-License-Identifier: MIT
"""The demo's networks: a tiny CLIP known to open_clip, a tiny ViT and an encoder known to timm, under ordinary names.

After :func:`register` they are created, loaded and run by exactly the calls that create, load and run
``ViT-L-14-336`` and ``vit_small_patch8_224.dino``: ``--clip-model namedmask-demo --clip-weights CLIP_WEIGHTS
--backbone vit_namedmask_demo --backbone-weights VIT_WEIGHTS``. The encoder, ``resnet_namedmask_demo``, is the CLIP's
image tower, for a segmenter to start from as others start from ``resnet50_clip.openai``. The weights are fp16
safetensors in the package, made by ``tools/train_demo_weights.py`` from rendered scenes alone.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

CLIP_NAME = "namedmask-demo"
VIT_NAME = "vit_namedmask_demo"
ENCODER_NAME = "resnet_namedmask_demo"
WEIGHTS = Path(__file__).parent / "weights"
CLIP_WEIGHTS = WEIGHTS / "clip.safetensors"
VIT_WEIGHTS = WEIGHTS / "vit.safetensors"
SELFMASK_WEIGHTS = WEIGHTS / "selfmask.safetensors"

VIT_ARGUMENTS = {"img_size": 192, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


@functools.cache
def register() -> None:
    """Make both names known to open_clip and timm; any number of calls does it once."""
    import open_clip
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, checkpoint_filter_fn
    from timm.models.vision_transformer import _cfg, _create_vision_transformer

    open_clip.add_model_config(Path(__file__).parent / f"{CLIP_NAME}.json")

    def vit_namedmask_demo(pretrained: bool = False, **arguments) -> nn.Module:
        return _create_vision_transformer(VIT_NAME, pretrained=pretrained, **{**VIT_ARGUMENTS, **arguments})

    tower = json.loads((Path(__file__).parent / f"{CLIP_NAME}.json").read_text())["vision_cfg"]
    width = tower["width"]
    stages = [
        ByoBlockCfg(type="bottle", d=depth, c=4 * width * 2**stage, s=1 + (stage > 0), br=0.25)
        for stage, depth in enumerate(tower["layers"])
    ]
    resnet = ByoModelCfg(
        blocks=tuple(stages), stem_chs=(width // 2, width // 2, width), stem_type="", stem_pool="avg2",
        downsample="avg", aa_layer="avg",
    )  # fmt: skip

    def resnet_namedmask_demo(pretrained: bool = False, **arguments) -> nn.Module:
        return build_model_with_cfg(
            ByobNet, ENCODER_NAME, pretrained, model_cfg=resnet, feature_cfg={"flatten_sequential": True},
            pretrained_filter_fn=checkpoint_filter_fn, **{"num_classes": 0, **arguments},
        )  # fmt: skip

    # timm files a model under the module that defines it, with that module's table of default settings.
    globals()["default_cfgs"] = generate_default_cfgs(
        {
            VIT_NAME: _cfg(input_size=(3, 192, 192), num_classes=0, file=str(VIT_WEIGHTS)),
            ENCODER_NAME: _cfg(
                input_size=(3, 64, 64), num_classes=0, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD,
                file=str(CLIP_WEIGHTS), first_conv="stem.conv1.conv", classifier=(),
            ),
        }
    )  # fmt: skip
    for model in (vit_namedmask_demo, resnet_namedmask_demo):
        register_model(model)


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
