# SPDX-License-Identifier: MIT
"""Arrays computed with the authors' code, and the weights they were computed with."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def fill_weights(network: torch.nn.Module) -> torch.nn.Module:
    """Sets the weights of the golden arrays, in place: hashes of the tensor's name and the element's index."""
    gains = {"query_embed": 8.0, "decoder.norm.": 0.2, "ffn.layers.2.": 4.0}
    mask, odd = (1 << 64) - 1, np.uint64(0x9E3779B97F4A7C15)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        state = 0xCBF29CE484222325
        for byte in name.encode():
            state = ((state ^ byte) * 0x100000001B3) & mask
        with np.errstate(over="ignore"):
            z = np.uint64(state) + np.arange(1, tensor.numel() + 1, dtype=np.uint64) * odd
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        noise = ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0
        if name.endswith(("_token", "_embed")):
            base, scale = 0.0, 1.0
        elif name.endswith("running_var"):
            base, scale = 1.0, 0.25
        elif tensor.ndim <= 1:
            base, scale = float(name.endswith("weight")), 0.1
        else:
            base, scale = 0.0, math.sqrt(3.0 / math.prod(tensor.shape[1:]))
        gain = next((gain for prefix, gain in gains.items() if name.startswith(prefix)), 1.0)
        tensor.copy_(torch.from_numpy(((base + scale * noise) * gain).astype(np.float32)).view_as(tensor))
    return network
