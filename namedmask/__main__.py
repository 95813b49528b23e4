# SPDX-License-Identifier: MIT
"""Entry points of the commands: where only the kernels are installed, they say in one line what is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# What the extra `pipeline` in pyproject.toml installs.
PIPELINE_MODULES = (
    "PIL",
    "huggingface_hub",
    "jinja2",
    "open_clip",
    "pycocotools",
    "pydantic",
    "rich",
    "safetensors",
    "timm",
    "tomli_w",
    "torchvision",
    "typer",
)


def main() -> None:
    """The command `namedmask`."""
    _require_pipeline("namedmask")
    from .cli import main

    main()


def main_pseudolabel() -> None:
    """The command `namedmask-pseudolabel`."""
    _require_pipeline("namedmask-pseudolabel")
    from .cli import main_pseudolabel

    main_pseudolabel()


def _require_pipeline(command: str) -> None:
    """Exits with code 2 and one line on stderr if a package that the commands import is not installed."""
    if missing := [name for name in PIPELINE_MODULES if find_spec(name) is None]:
        print(
            f'{command}: the commands need more packages: pip install "namedmask[pipeline]" '
            f"(missing: {', '.join(missing)})",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
