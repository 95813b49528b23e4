# SPDX-License-Identifier: MIT
"""Fast batched operators that turn ViT features into masks. Requires only torch and numpy."""

import os

# Import torch before the extension, so that both share the libgomp that torch loads.
import torch

from .attention_features import AttentionFeatures, attention_features
from .backends import explain
from .bilateral_solver import bilateral_solver
from .connected_components import Components, connected_components, fill_holes, largest_component
from .dense_crf import dense_crf
from .mask_cut import MaskCut, mask_cut
from .normalized_cut import NormalizedCut, normalized_cut
from .pamr import pamr
from .ragged import Ragged
from .random_walk import random_walk
from .resize import resize
from .run_lengths import RunLengths, run_lengths
from .spectral_clusters import spectral_clusters
from .vote_masks import Vote, vote_masks

# A forked child has no copies of libgomp's threads, and torch would wait for them forever. The C++ kernels have a
# handler of their own.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

__all__ = [
    "AttentionFeatures",
    "Components",
    "MaskCut",
    "NormalizedCut",
    "Ragged",
    "RunLengths",
    "Vote",
    "attention_features",
    "bilateral_solver",
    "connected_components",
    "dense_crf",
    "explain",
    "fill_holes",
    "largest_component",
    "mask_cut",
    "normalized_cut",
    "pamr",
    "random_walk",
    "resize",
    "run_lengths",
    "spectral_clusters",
    "vote_masks",
]
