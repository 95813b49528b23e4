# SPDX-License-Identifier: MIT
"""The segmenter: one network for all categories, trained on the masks of a run."""
