# SPDX-License-Identifier: MIT
"""Detectors, which find the object of a photo: one class for each `name` of DetectorConfig."""

from __future__ import annotations

from ..config import DetectorConfig
from .detector import Detector


def make_detector(config: DetectorConfig, device: str) -> Detector:
    """Creates the detector of the settings.

    Args:
        config: The settings.
        device: Device as torch names it.

    Raises:
        UserError: If the backbone is unknown or weights cannot be loaded.
    """
    if config.name == "selfmask":
        from .selfmask import SelfMaskDetector

        return SelfMaskDetector(config, device)
    if config.name == "cluster-vote":
        from .cluster_vote import ClusterVoteDetector

        return ClusterVoteDetector(config, device)
    from .spectral import SpectralDetector

    return SpectralDetector(config, device)
