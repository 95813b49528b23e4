# SPDX-License-Identifier: MIT
"""A small call of every operator, for test_operators.py. Imports only torch and namedmask_kernels."""

import torch

import namedmask_kernels as nk

_generator = torch.Generator().manual_seed(0)
MASK = torch.rand(7, 9, generator=_generator) > 0.4
IMAGE = torch.randint(0, 256, (7, 9, 3), dtype=torch.uint8, generator=_generator)
SOFT = torch.rand(7, 9, 2, generator=_generator)
FEATURES = torch.randn(7, 9, 16, generator=_generator) + 3 * torch.randn(3, 16, generator=_generator).repeat(3, 1)[:9]

# public operator -> its arguments: tensors, then settings
CALLS = {
    nk.attention_features: (torch.randn(12, 3, 2, 8, generator=_generator), torch.tensor([0, 5, 12]).int()),
    nk.bilateral_solver: (MASK, IMAGE),
    nk.connected_components: (MASK,),
    nk.dense_crf: (SOFT.softmax(-1), IMAGE),
    nk.fill_holes: (MASK,),
    nk.largest_component: (MASK,),
    nk.mask_cut: (FEATURES,),
    nk.normalized_cut: (FEATURES,),
    nk.pamr: (SOFT, IMAGE),
    nk.random_walk: (SOFT, FEATURES),
    nk.resize: (IMAGE, (5, 12)),
    nk.run_lengths: (MASK,),
    nk.spectral_clusters: (FEATURES, 3),
    nk.vote_masks: (torch.stack([MASK[1:, 1:], MASK[:-1, 1:], MASK[1:, :-1]]),),
}


def flat(result) -> list:
    """The arrays of a result, which is one array or a tuple of them."""
    return list(result) if isinstance(result, tuple) else [result]
