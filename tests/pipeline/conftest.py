# SPDX-License-Identifier: MIT
"""Fixtures: a small ViT with random weights, options that select it, closed folders, one thread, and a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BACKBONE = "vit_tiny_patch16_224"


@pytest.fixture(scope="session")
def backbone_weights(tmp_path_factory) -> Path:
    """File with random weights for BACKBONE."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(BACKBONE, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def detector_options(backbone_weights) -> list[str]:
    """Options with which the spectral detector takes milliseconds per photo."""
    backbone = ["--backbone", BACKBONE, "--backbone-weights", str(backbone_weights)]
    return [*backbone, "--image-size", "96", "--features", "tokens", "--center-features"]


@pytest.fixture
def printing() -> Iterator[Any]:
    """Messages and progress are printed, as by a command. The `Printer`."""
    from namedmask.console import printing

    with printing() as printer:
        yield printer


@pytest.fixture
def close_folder(monkeypatch) -> Callable[[Path], None]:
    """Denies the permission to list a folder, also for root."""

    def close(folder: Path) -> None:
        scandir = os.scandir

        def closed(path):
            if os.fspath(path) == os.fspath(folder):
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", closed)

    return close


def run_on_one_thread() -> Iterator[None]:
    """Runs torch on one thread, here and in subprocesses: rounding depends on the number of threads."""
    import torch

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


one_thread = pytest.fixture(run_on_one_thread)
one_thread_in_module = pytest.fixture(scope="module")(run_on_one_thread)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium of the system, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium or google-chrome executable")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()
