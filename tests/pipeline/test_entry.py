# SPDX-License-Identifier: MIT
"""The commands without the packages of the extra `pipeline`; the extra and the package's imports agree."""

import ast
import re
import subprocess
import sys
from importlib.metadata import files, requires
from pathlib import Path

import pytest

import namedmask
from namedmask.__main__ import PIPELINE_MODULES

# Runs the function of a console script as if some modules were not installed.
RUN_WITHOUT = """
import sys
from importlib.metadata import entry_points

command, missing = sys.argv[1], sys.argv[2].split(",")

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name in missing else self.finder.find_spec(name, path, target)

sys.argv = [command, "--help"]
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
[script] = entry_points(group="console_scripts", name=command)
script.load()()
"""


def run_without(command: str, *missing: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-c", RUN_WITHOUT, command, ",".join(missing)]
    return subprocess.run(arguments, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["namedmask", "namedmask-pseudolabel"])
def test_a_command_without_its_packages_says_what_to_install(command):
    done = run_without(command, "typer", "timm")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f'{command}: the commands need more packages: pip install "namedmask[pipeline]" (missing: timm, typer)\n'
    )


@pytest.mark.parametrize("command", ["namedmask", "namedmask-pseudolabel"])
def test_a_command_with_its_packages_runs(command):
    done = run_without(command, "onnx", "tensorboard")  # extras that single commands use
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr


def test_every_package_of_the_extra_is_checked():
    lines = [line for line in requires("namedmask") if re.search("extra == ['\"]pipeline['\"]", line)]
    installed = [re.match(r"[\w.-]+", line)[0] for line in lines if "python_version" not in line]
    checked = [{file.parts[0] for file in files(name)} & set(PIPELINE_MODULES) for name in installed]
    assert sorted(map(list, checked)) == [[module] for module in sorted(PIPELINE_MODULES)]


def test_the_package_imports_what_its_extras_install():
    imported = set()
    for file in Path(namedmask.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {"namedmask", "namedmask_kernels", "numpy", "torch", *sys.stdlib_module_names}
    imported -= {"tomli", "tomllib"}  # which of the two depends on the version of Python
    imported -= {"markupsafe"}  # part of jinja2's interface
    # Extras of their own.
    imported -= {"aiohttp", "cv2", "fsspec", "onnx", "onnxruntime", "onnxscript", "pillow_heif", "pyarrow", "xformers"}
    assert imported == set(PIPELINE_MODULES)
