# SPDX-License-Identifier: MIT
"""Fast batched operators that turn ViT features into masks. Requires only torch and numpy."""

# Import torch before the extension, so that both share the libgomp that torch loads.
import torch  # noqa: F401

from .attention_features import AttentionFeatures, attention_features
from .backends import explain
from .bilateral_solver import bilateral_solver
from .connected_components import Components, connected_components, fill_holes, largest_component
from .dense_crf import dense_crf
from .normalized_cut import NormalizedCut, normalized_cut
from .pamr import pamr
from .ragged import Ragged
from .random_walk import random_walk
from .spectral_clusters import spectral_clusters
from .vote_masks import Vote, vote_masks

__all__ = [
    "AttentionFeatures",
    "Components",
    "NormalizedCut",
    "Ragged",
    "Vote",
    "attention_features",
    "bilateral_solver",
    "connected_components",
    "dense_crf",
    "explain",
    "fill_holes",
    "largest_component",
    "normalized_cut",
    "pamr",
    "random_walk",
    "spectral_clusters",
    "vote_masks",
]
