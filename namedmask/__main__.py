# SPDX-License-Identifier: MIT
"""Entry points of the commands: where only the kernels are installed, they say in one line what is missing."""

from __future__ import annotations

import sys


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Makes Ctrl-C a line, until `process.handle_signals` is imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("namedmask: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _excepthook

# ruff: noqa: E402
from importlib.util import find_spec
from types import TracebackType

from . import process
from .errors import UserError

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
    _run("namedmask")


def main_pseudolabel() -> None:
    """The command `namedmask-pseudolabel`, another name of `namedmask run`."""
    _run("namedmask-pseudolabel")


def _run(command: str) -> None:
    """Runs a command in a prepared process. An interruption or a wrong environment is one line on stderr."""
    try:
        process.handle_signals()
        process.prepare()
        try:
            _require_pipeline(command)
            from .cli import app, pseudolabel_app

            (app if command == "namedmask" else pseudolabel_app)()
        finally:
            process.expect_output()
    except process.Interrupted as interrupted:
        process.complain(interrupted.reason)
        sys.exit(interrupted.exit_code)
    except UserError as error:
        process.complain(error)
        sys.exit(2)
    finally:
        process.end_handling()


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
