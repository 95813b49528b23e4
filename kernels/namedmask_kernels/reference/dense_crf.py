# SPDX-License-Identifier: MIT
"""Mean-field inference in a fully connected CRF by brute force: the definition, for one image, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1 << 24  # entries of a kernel matrix that are held at a time


def filtered(features: Tensor, values: Tensor) -> Tensor:
    """features [P, d], values [P, C] -> K values, K[i, j] = exp(-|features[i] - features[j]|^2 / 2), i = j included."""
    rows = max(1, TILE // len(features))
    return torch.cat([(-0.5 * torch.cdist(f, features) ** 2).exp() @ values for f in features.split(rows)])


def dense_crf(
    probabilities: Tensor,
    image: Tensor,
    iterations: int,
    gaussian_sigma: float,
    gaussian_weight: float,
    bilateral_sigma: float,
    bilateral_sigma_rgb: float,
    bilateral_weight: float,
) -> Tensor:
    """probabilities float [h, w, L], image uint8 [h, w, 3] -> marginals [h, w, L], in the dtype of probabilities.

    Evaluates both kernels (iterations + 1) * (h * w)^2 times.
    """
    h, w, labels = probabilities.shape
    # With smaller sigmas every kernel is an identity, too, but the squares of distances would overflow.
    gaussian_sigma, bilateral_sigma, bilateral_sigma_rgb = (
        max(sigma, 1e-3) for sigma in (gaussian_sigma, bilateral_sigma, bilateral_sigma_rgb)
    )
    if probabilities.numel() == 0:
        return torch.empty_like(probabilities)
    y, x = (torch.arange(n, device=probabilities.device) for n in (h, w))
    position = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(probabilities.dtype).reshape(-1, 2)
    color = image.to(probabilities.dtype).reshape(-1, 3)
    both = torch.cat([position / bilateral_sigma, color / bilateral_sigma_rgb], dim=1)
    terms = []
    for features, weight in ((position / gaussian_sigma, gaussian_weight), (both, bilateral_weight)):
        norm = filtered(features, position.new_ones(h * w, 1)).rsqrt()  # [P, 1]
        terms.append((features, norm, weight))
    log_unary = probabilities.reshape(-1, labels).clamp(1e-5, 1).log()
    marginals = log_unary.softmax(dim=1)
    for _ in range(iterations):
        messages = [weight * norm * filtered(features, norm * marginals) for features, norm, weight in terms]
        marginals = (log_unary + torch.stack(messages).sum(0)).softmax(dim=1)
    return marginals.reshape(h, w, labels)
