# SPDX-License-Identifier: MIT
"""Checks what `pip install namedmask` without extras brings, in an environment that may hold more than that.

The requirements must be torch and numpy alone, and every module of the kernels must import where no package can be
imported that those two do not bring.
"""

import importlib
import pkgutil
import sys
from importlib.metadata import Distribution, distribution, distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements(name: str, extras: set[str]) -> list[Requirement]:
    """The requirements of an installed distribution that apply on this platform."""
    lines = map(Requirement, distribution(name).requires or [])
    environments = [{"extra": extra} for extra in extras | {""}]
    return [line for line in lines if line.marker is None or any(map(line.marker.evaluate, environments))]


def closure(name: str) -> set[str]:
    """The canonical names of a distribution and of all that it requires, directly or not."""
    todo, done = [Requirement(name)], set()
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in done:
            done.add(key)
            todo += requirements(requirement.name, requirement.extras)
    return {name for name, _ in done}


def modules(found: Distribution) -> set[str]:
    """The top-level modules among the files of a distribution."""
    tops = {file.parts[0].partition(".")[0] for file in found.files or [] if ".dist-info" not in file.parts[0]}
    return {top for top in tops if top.isidentifier()}


direct = sorted(canonicalize_name(requirement.name) for requirement in requirements("namedmask", set()))
if direct != ["numpy", "torch"]:
    sys.exit(f"namedmask without extras requires {direct}, expected numpy and torch alone")
installed = closure("namedmask")
brought: set[str] = set()
others: set[str] = set()
for found in distributions():
    (brought if canonicalize_name(found.metadata["Name"]) in installed else others).update(modules(found))
for module in others - brought:
    sys.modules[module] = None  # type: ignore[assignment]  # importing it raises ImportError

import namedmask_kernels  # noqa: E402

for submodule in pkgutil.walk_packages(namedmask_kernels.__path__, "namedmask_kernels."):
    importlib.import_module(submodule.name)
print(f"{len(installed)} packages: {', '.join(sorted(installed))}")
