# SPDX-License-Identifier: MIT
"""The networks of the demo, as a plugin of `namedmask.registry`: a tiny CLIP, a tiny ViT, a SelfMask and an encoder.

They are used like any model of open_clip and timm: ``--clip-model namedmask-demo``, ``--backbone vit_namedmask_demo``,
``--encoder resnet_namedmask_demo``. The encoder is the image tower of the CLIP. The weights are fp16 safetensors in the
package, trained by ``tools/train_demo_weights.py`` on rendered scenes alone.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import registry

if TYPE_CHECKING:
    from torch import nn

CLIP_NAME = "namedmask-demo"
VIT_NAME = "vit_namedmask_demo"
ENCODER_NAME = "resnet_namedmask_demo"
WEIGHTS = Path(__file__).parent / "weights"
CLIP_WEIGHTS = WEIGHTS / "clip.safetensors"
VIT_WEIGHTS = WEIGHTS / "vit.safetensors"
SELFMASK_WEIGHTS = WEIGHTS / "selfmask.safetensors"

VIT_OPTIONS = {"img_size": 192, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


@functools.cache
def register() -> None:
    """Registers the models with open_clip and timm; the entry point of the plugin."""
    import open_clip
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, checkpoint_filter_fn
    from timm.models.vision_transformer import _cfg, _create_vision_transformer

    open_clip.add_model_config(Path(__file__).parent / f"{CLIP_NAME}.json")

    def vit_namedmask_demo(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create_vision_transformer(VIT_NAME, pretrained=pretrained, **{**VIT_OPTIONS, **options})

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

    def resnet_namedmask_demo(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(
            ByobNet, ENCODER_NAME, pretrained, model_cfg=resnet, feature_cfg={"flatten_sequential": True},
            pretrained_filter_fn=checkpoint_filter_fn, **{"num_classes": 0, **options},
        )  # fmt: skip

    # timm looks for the table of default settings in the module that defines a model.
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
    registry.set_default_weights("clip", CLIP_NAME, CLIP_WEIGHTS)
    registry.set_default_weights("selfmask", VIT_NAME, SELFMASK_WEIGHTS)


def untrained_vit() -> nn.Module:
    """Returns the ViT of the demo with random weights, in float32 and eval mode, for photos of any shape."""
    import timm
    import torch

    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(VIT_NAME, pretrained=False, num_classes=0, dynamic_img_size=True).eval()
