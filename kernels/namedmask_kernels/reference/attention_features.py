# SPDX-License-Identifier: MIT
"""Attention that holds all softmax weights in memory: the definition, for one sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    output: Tensor  # [n, H, D], dtype of qkv
    rows: Tensor  # [n, H, R], like lse and key_norms in the dtype of the computation
    lse: Tensor  # [n, H]
    key_norms: Tensor  # [n]


def attention_features(qkv: Tensor, scale: float, taps: list[int]) -> Attention:
    """Computes in float32, or in float64 if qkv is float64.

    Args:
        qkv: [n, 3, H, D]
        scale: Factor of q . k before the softmax.
        taps: Positions of the tapped queries in the sequence.
    """
    q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).permute(1, 2, 0, 3)  # [H, n, D] each
    scores = scale * q @ k.mT
    weights = scores.softmax(-1)
    output = (weights @ v).transpose(0, 1).to(qkv.dtype)
    rows = weights[:, taps].permute(2, 0, 1)
    return Attention(output, rows, scores.logsumexp(-1).T, k.square().sum((0, 2)))
