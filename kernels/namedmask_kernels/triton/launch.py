# SPDX-License-Identifier: MIT
"""Launches of Triton kernels, which threads may share."""

from __future__ import annotations

import threading
from typing import Any

_launching = threading.Lock()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches kernel[grid](*arguments, **options), one thread at a time.

    The first launch compiles and loads the kernel, which Triton does without a lock: a second thread that launches it
    while the first one loads it passes None for its function, and fails (triton-lang/triton#11518).
    """
    with _launching:
        kernel[grid](*arguments, **options)
