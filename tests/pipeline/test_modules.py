# SPDX-License-Identifier: MIT
"""What docs/architecture.md says of imports holds for every module."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules() -> dict[str, Path]:
    """The file of each module of both packages, by its name."""
    found = {}
    for folder in (ROOT, ROOT / "kernels"):
        for path in folder.glob("namedmask*/**/*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, those within functions too, without imports for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The known modules that a module imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {one if one in known else base for one in inner}
    return found & (known.keys() - {name})


def test_modules_do_not_import_each_other_in_a_circle():
    known = modules()
    del known["namedmask"]  # it imports what it offers on demand, and others take its version
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert "namedmask.run" in graph["namedmask.commands.stages"]
    assert list(TopologicalSorter(graph).static_order())  # a CycleError names the circle
