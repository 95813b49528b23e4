# SPDX-License-Identifier: MIT
"""MkDocs hooks: pages made from files outside docs/, and the tables and sections of the settings and operators.

Links in all files are those that work in the repository. They are rewritten for the site.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from namedmask.config import RunConfig, Section, Setting, settings
from namedmask.stages import STAGES

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "namedmask_kernels"

# File of the site -> file of the repository
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "bench/RESULTS.md",
    "ablations.md": "bench/ABLATIONS.md",
    "tools.md": "tools/README.md",
    "quickstart.md": "docs/quickstart.ipynb",
    "demo_masks.jpg": "tests/pipeline/demo_masks.jpg",
    **{f"results-{page.name}": f"bench/results/{page.name}" for page in (ROOT / "bench" / "results").glob("*.md")},
}
ON_SITE = {source: name for name, source in OUTSIDE.items()}

# What a reader of the files sees in place of the generated parts.
SETTINGS_MARKER = "The tables of all settings are generated: `mkdocs serve` in a clone shows them here."
OPERATORS_MARKER = "The table of all operators is generated: `mkdocs serve` in a clone shows it here."
DOCSTRINGS_MARKER = "The docstrings of all operators are in `kernels/`; `mkdocs serve` in a clone shows them here."
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the files outside docs/."""
    from mkdocs.structure.files import File

    for name, source in OUTSIDE.items():
        if source.endswith(".ipynb"):
            files.append(File.generated(config, name, content=notebook_as_markdown(ROOT / source)))
        else:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def notebook_as_markdown(path: Path) -> str:
    """The cells of a notebook, without outputs, and a line that links to the file."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f'<a href="{path.name}" download>Download this page as a notebook.</a>'])


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Rewrites links and fills in what is generated."""
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = LINK.sub(lambda link: site_link(source, link[1]), markdown)
    return complete(markdown)


def complete(markdown: str) -> str:
    """Puts the generated parts in the places of their markers."""
    parts = {
        SETTINGS_MARKER: settings_tables,
        OPERATORS_MARKER: operators_table,
        DOCSTRINGS_MARKER: operator_sections,
    }
    for marker, make in parts.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def on_page_content(content: str, **others: Any) -> str:
    """Marks options in running text, for extra.css."""
    return content.replace("<code>--", '<code class="option">--')


def site_link(source: str, target: str) -> str:
    """A link from one file of the repository to another, as a link between files of the site, which has no folders."""
    path = os.path.normpath(Path(source).parent / target)
    return ON_SITE.get(path, path.removeprefix("docs/"))


def settings_tables() -> str:
    """All settings in Markdown: a heading, the commands and a table for each section."""
    parts = []
    for name, section in sections(RunConfig):
        own = [one for one in settings(section, f"{name}." if name else "") if one.name.rpartition(".")[0] == name]
        parts += [f"## {name or 'The run'}", *_introduction(name, section), _table(own)]
    return "\n\n".join(parts)


def sections(kind: type[Section], name: str = "") -> Iterator[tuple[str, type[Section]]]:
    """A section and those below it, with their dotted names."""
    yield name, kind
    for key, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation, f"{name}.{key}".lstrip("."))


def _introduction(name: str, section: type[Section]) -> list[str]:
    commands = [stage.name for stage in STAGES.values() if name.split(".")[0] in stage.sections]
    parts = [inspect.getdoc(section) or ""]
    if commands:
        parts.append("Read by " + ", ".join(f"`namedmask {command}`" for command in commands) + ".")
    return parts


def _table(rows: list[Setting]) -> str:
    lines = ["| Setting and option | Description | Type and range | Default |", "|---|---|---|---|"]
    for one in rows:
        name = _code(one.name) + (f"<br>{_code(one.flag)}" if one.flag else "")
        kind = " or ".join(map(_code, one.choices)) or _code(one.metavar)
        kind += f"<br>{_code(one.limits)}" if one.limits else ""
        cells = name, html.escape(one.field.description), kind, _default(one)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _default(one: Setting) -> str:
    value = one.field.default
    if value is ... or one.field.is_required():
        return "required"
    if value is None or value == []:
        return "none"
    if one.is_list:
        return _code(",".join(map(str, value)))
    return _code(str(value).lower() if isinstance(value, bool) else str(value))


def _code(text: str) -> str:
    """Code in a cell of a table, where a bar would end the cell."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def operators() -> dict[str, tuple[str, str]]:
    """Public operator -> its module and docstring, without importing torch."""
    own = {}
    for name, module in _exports().items():
        tree = ast.parse((KERNELS / f"{module}.py").read_text(encoding="utf-8"))
        for node in (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name):
            if any(argument.arg == "backend" for argument in node.args.kwonlyargs):
                own[name] = module, ast.get_docstring(node) or ""
    return own


def _exports() -> dict[str, str]:
    """Public name of namedmask_kernels -> the module that it comes from."""
    body = ast.parse((KERNELS / "__init__.py").read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.level]
    return {alias.name: node.module for node in imports for alias in node.names}


def operators_table() -> str:
    """A table with the first sentence of each operator's docstring and its backends besides the reference."""
    lines = ["| Operator | What it does | Backends |", "|---|---|---|"]
    for name, (_, docstring) in operators().items():
        summary = docstring.partition("\n")[0]
        backends = re.findall(r'"(\w+)"', re.search(r"^ *backend: (.*)", docstring, re.MULTILINE)[1])
        kinds = ", ".join(f"`{one}`" for one in backends if one not in ("auto", "reference"))
        lines.append(f"| [`{name}`](#{name}) | {summary} | {kinds} |")
    return "\n".join(lines)


def operator_sections() -> str:
    """A section for each operator, followed by the classes of its results, for mkdocstrings."""
    known, parts = operators(), []
    for name, (module, _) in known.items():
        # The module has the name of its main operator, so the path must lead to the function.
        results = [one for one, home in _exports().items() if home == module == name and one not in known]
        path = f"namedmask_kernels.{module}.{name}"
        parts += [f'<a id="{name}"></a>', f"::: {path}\n    options:\n      heading_level: 2"]
        parts += [f"::: namedmask_kernels.{one}" for one in results]
    return "\n\n".join(parts)
