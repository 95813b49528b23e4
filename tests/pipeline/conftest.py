# SPDX-License-Identifier: MIT
"""A small ViT with random weights, in a file as a user would bring it, and the options that run it."""

from __future__ import annotations

from pathlib import Path

import pytest

BACKBONE = "vit_tiny_patch16_224"


@pytest.fixture(scope="session")
def backbone_weights(tmp_path_factory) -> Path:
    """Random weights for BACKBONE, in a file as a user would bring it."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(BACKBONE, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def detector_options(backbone_weights) -> list[str]:
    """Options with which the spectral detector runs in milliseconds."""
    backbone = ["--backbone", BACKBONE, "--backbone-weights", str(backbone_weights)]
    return [*backbone, "--image-size", "96", "--features", "tokens", "--centre"]
