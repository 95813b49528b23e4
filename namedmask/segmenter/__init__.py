# SPDX-License-Identifier: MIT
"""The segmenter: one semantic segmentation network for all categories, trained on the masks of a run."""
