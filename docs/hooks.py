# SPDX-License-Identifier: MIT
"""MkDocs hooks: pages made from files outside docs/, and the tables of the settings page.

Links in all files are those that work in the repository. They are rewritten for the site.
"""

from __future__ import annotations

import html
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from namedmask.config import RunConfig, Section, Setting, settings
from namedmask.stages import STAGES

ROOT = Path(__file__).parents[1]

# File of the site -> file of the repository
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "bench/RESULTS.md",
    "ablations.md": "bench/ABLATIONS.md",
    "tools.md": "tools/README.md",
    "demo_masks.jpg": "tests/pipeline/demo_masks.jpg",
}
ON_SITE = {source: name for name, source in OUTSIDE.items()}

SETTINGS_MARKER = "<!-- docs/hooks.py puts the tables of all settings here -->"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the files outside docs/."""
    from mkdocs.structure.files import File

    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Rewrites links and fills in the settings."""
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = LINK.sub(lambda link: site_link(source, link[1]), markdown)
    return markdown.replace(SETTINGS_MARKER, settings_tables())


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
