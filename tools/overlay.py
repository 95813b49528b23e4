# SPDX-License-Identifier: MIT
"""Makes a folder in which `namedmask_kernels` has another extension than the installed one.

    PYTHONPATH=$(python tools/overlay.py FOLDER EXTENSION.so) python ...

The Python files are links to this checkout.
"""

import shutil
import sys
from pathlib import Path

# Editable installs come before PYTHONPATH otherwise. Python imports this file at its start, in subprocesses too.
SITECUSTOMIZE = """import sys

sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


def overlay(folder: Path, extension: Path) -> Path:
    """Fills the folder, removing what it held, and returns its absolute path."""
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "namedmask_kernels"
    package.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    sources = Path(__file__).resolve().parents[1] / "kernels" / "namedmask_kernels"
    for path in (*sources.iterdir(), extension.resolve()):
        (package / path.name).symlink_to(path)
    return folder


if __name__ == "__main__":
    print(overlay(Path(sys.argv[1]), Path(sys.argv[2])))
