# SPDX-License-Identifier: MIT
"""The documentation: links lead somewhere, Python examples run, commands and settings exist.

Examples that need photos or weights run on generated photos and the networks of the demo.
"""

from __future__ import annotations

import doctest
import html
import importlib.util
import io
import json
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import typer
from nbclient import NotebookClient
from PIL import Image
from typer.testing import CliRunner

import namedmask_kernels
from namedmask import cli, command_line, config
from namedmask.stages import LABELING, STAGES
from namedmask_kernels import backends

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}

spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)

APP = typer.main.get_command(cli.app)
PSEUDOLABEL = typer.main.get_command(cli.pseudolabel_app)
SETTINGS = {one.name: one for one in config.settings()}

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    """A test parameter (page, code) for each fenced block of a language."""
    found = []
    for page, text in TEXTS.items():
        for match in FENCE.finditer(text):
            if match[1] == language:
                line = text[: match.start()].count("\n") + 1
                found.append(pytest.param(page, match[2], id=f"{page}:{line}"))
    return found


def commands() -> list:
    """A test parameter for each namedmask command in the shell blocks."""
    found = []
    for block in blocks("bash"):
        page, code = block.values
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word in ("namedmask", "namedmask-pseudolabel")]
            if starts:
                found.append(pytest.param(words[starts[0] :], id=f"{page}: {line.strip()}"))
    return found


def inline_code() -> Iterator[tuple[str, str]]:
    """(page, code) for all code in running text."""
    for page, text in TEXTS.items():
        for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
            yield page, code


def flags_of(command) -> set[str]:
    return {flag for one in command.params for flag in (*one.opts, *one.secondary_opts) if flag.startswith("-")}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files(page):
    text = FENCE.sub("", TEXTS[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.is_file(), target
        if anchor:
            content = hooks.complete(file.read_text(encoding="utf-8"))
            headings = re.findall(r"^#+ (.*)", content, re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors.union(re.findall(r'<a id="(\w+)">', content)), target


@pytest.mark.parametrize("source", [source for source in hooks.ON_SITE if source.endswith(".md")])
def test_links_of_pages_from_other_folders_lead_to_pages_of_the_site(source):
    for target in hooks.LINK.findall(FENCE.sub("", (ROOT / source).read_text(encoding="utf-8"))):
        name = hooks.site_link(source, target)
        assert name in hooks.OUTSIDE or (ROOT / "docs" / name).is_file(), target


def test_links_are_rewritten_for_the_site():
    assert hooks.site_link("README.md", "docs/train.md") == "train.md"
    assert hooks.site_link("docs/performance.md", "../bench/RESULTS.md") == "benchmarks.md"
    assert hooks.site_link("docs/train.md", "settings.md") == "settings.md"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with photo.jpg, photo2.jpg, and a labeled run with a segmenter."""
    from PIL import Image

    from namedmask.backbones import untrained_encoder
    from namedmask.demo.scenes import KINDS, index_photo
    from namedmask.segmenter.deeplab import DeepLab, save_segmenter

    folder = tmp_path_factory.mktemp("docs")
    for number in range(2):
        path = folder / "photos" / list(KINDS)[number] / f"{number}.png"
        path.parent.mkdir(parents=True)
        photo = Image.fromarray(index_photo(7, number).image)
        photo.save(path)
        photo.save(folder / f"photo{number + 1 if number else ''}.jpg")
    words = ["run", folder / "photos", "--out", folder / "run", "--backbone", "vit_namedmask_demo"]
    words += ["--image-size", "64", "--features", "tokens", "--center-features"]
    result = CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (folder / "run" / "segmenter").mkdir()
    (folder / "embeddings.pkl").write_bytes(pickle.dumps({"0.png": np.ones(8, np.float32)}))
    encoder = untrained_encoder("resnet_namedmask_demo")
    save_segmenter(folder / "run" / "segmenter", DeepLab(encoder, 3, head_channels=16), ["cat", "dog"])
    return folder


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_examples_run(page, code, stand_ins, monkeypatch):
    monkeypatch.chdir(stand_ins)
    exec(compile(code.replace("vit_small_patch8_224.dino", "vit_namedmask_demo"), page, "exec"), {})


def test_the_notebook_runs_and_its_page_has_its_cells(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on a busy machine, threads that wait for each other take minutes
    path = ROOT / "docs" / "quickstart.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # stored without outputs
    page = hooks.notebook_as_markdown(path)
    assert all(cell.source in page for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = ["".join(str(output.get("data", output.get("text"))) for output in cell.get("outputs", ()))
               for cell in notebook.cells]  # fmt: skip
    assert "Run('run', categories=2, stages=['index', 'archive', 'pseudolabel'])" in outputs[3]
    assert outputs[4].count("pixels") == 8 and "image/png" in outputs[6] and "train" in outputs[8]
    assert "'background', 'fish', 'mushroom'" in outputs[8]


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words):
    name, *rest = words
    command = PSEUDOLABEL
    if name == "namedmask":
        name, *rest = rest or ["--help"]
        if name.startswith("-"):
            assert name in flags_of(APP)
            return
        command = APP.commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
    context = command.make_context(name, rest)
    stages = LABELING if name in ("run", "namedmask-pseudolabel") else (name,)
    sections = [section for stage in stages if stage in STAGES for section in STAGES[stage].sections]
    flags = command_line.flags_of(sections)
    options = {name: context.params.get(name) for name in flags}
    given = command_line.given_settings(sections, None, context.params.get("set_") or [], flags, options)
    config.make_config({"photos": "photos", **given})


def test_inline_commands_flags_and_settings_exist():
    sections = {name.split(".")[0] for name in SETTINGS if "." in name}
    all_flags = set().union(
        *(flags_of(command) for command in (APP, *APP.commands.values(), *APP.commands["import"].commands.values()))
    )
    for page, code in inline_code():
        words = code.split()
        if words[0] == "namedmask" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in APP.commands, (page, code)
            command = APP.commands[words[1]]
            if hasattr(command, "commands") and len(words) > 2:
                command = command.commands[words[2]]
            unknown = {word for word in words[2:] if word.startswith("--")} - flags_of(command)
            assert not unknown, (page, code)
        elif code.startswith("--"):
            assert words[0] in all_flags, (page, code)
        elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", code) and code.split(".")[0] in sections:
            known = any(name == code or name.startswith(code + ".") for name in SETTINGS)
            assert known or code.endswith((".toml", ".jsonl", ".json", ".html", ".safetensors")), (page, code)


def test_every_command_is_documented():
    for command in APP.commands:
        assert f"namedmask {command}" in TEXTS["docs/label-photos.md"], command


def test_every_operator_is_on_the_page():
    page = hooks.complete(TEXTS["docs/operators.md"])
    documented = re.findall(r"^::: namedmask_kernels\.([\w.]+)$", page, re.MULTILINE)
    assert sorted(path.split(".")[-1] for path in documented) == sorted(namedmask_kernels.__all__)
    for path in documented:
        # For mkdocstrings, namedmask_kernels.pamr is the module. The function is namedmask_kernels.pamr.pamr.
        assert "." in path or importlib.util.find_spec(f"namedmask_kernels.{path}") is None, path
    assert set(hooks.operators()) == set(backends.IMPLEMENTATIONS)
    for name, available in backends.IMPLEMENTATIONS.items():
        cells = re.search(rf"^\| \[`{name}`\]\(#{name}\) \| (.*\.) \| (.*) \|$", page, re.MULTILINE)
        assert set(re.findall(r"\w+", cells[2])) == set(available) - {"reference"}


@pytest.mark.parametrize("name", backends.IMPLEMENTATIONS)
def test_docstring_examples_run(name):
    torch.manual_seed(0)  # 6 of 1,000 random examples of mask_cut find other objects
    names = {"torch": torch} | {public: getattr(namedmask_kernels, public) for public in namedmask_kernels.__all__}
    (example,) = doctest.DocTestFinder().find(getattr(namedmask_kernels, name), name, globs=names)
    assert any(f"{name}(" in one.source for one in example.examples)
    report = io.StringIO()
    assert not doctest.DocTestRunner().run(example, out=report.write).failed, report.getvalue()


def test_settings_page_lists_every_setting():
    assert hooks.SETTINGS_MARKER in TEXTS["docs/settings.md"]
    tables = hooks.settings_tables()
    rows = {line.split("</code>")[0].partition("<code>")[2]: line for line in tables.splitlines() if "<code>" in line}
    assert list(rows) == list(SETTINGS)
    for name, one in SETTINGS.items():
        cells = rows[name].strip("| ").split(" | ")
        assert len(cells) == 4 and cells[1] == html.escape(one.field.description)
        assert one.flag is None or f"<code>{one.flag}</code>" in cells[0]


def test_every_key_of_the_figures_is_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((8, 10), np.uint8)
    mask[2:5, 3:6] = 255
    voc = Path("VOCdevkit/VOC2012")
    for path in ("photos/0.jpg", "truth/0.png", "ECSSD/images/0.jpg", "ECSSD/ground_truth_mask/0.png"):
        save(Path(path), mask)
    for path in ("labels/0.png", voc / "JPEGImages/0.jpg", voc / "SegmentationClass/0.png"):
        save(Path(path), mask // 255)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("0")
    Path("names.txt").write_text("cat")
    Path("masks.json").write_text('{"0": {"size": [8, 10], "counts": [26, 3, 5, 3, 5, 3, 35]}}')
    found = set()
    for words in (
        "import masks masks.json --photos photos --out run",
        "evaluate run truth --json figures.json",
        "evaluate labels labels --categories-file names.txt --json figures.json",
        "evaluate labels --benchmark voc2012 --root VOCdevkit --json figures.json",
        "evaluate truth --benchmark ecssd --root ECSSD --json figures.json",
    ):
        done = CliRunner().invoke(cli.app, words.split())
        assert done.exit_code == 0, done.output
        if "--json" in words:
            found |= set(json.loads(Path("figures.json").read_text()))
    section = TEXTS["docs/evaluate.md"].partition("## Figures as JSON")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")]
    assert set(re.findall(r"`(\w+)`", "".join(row[2] for row in rows))) == found


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_the_readme_is_short():
    assert 600 <= len(TEXTS["README.md"].split()) <= 900


def test_docs_are_free_of_heavy_imports():
    """What builds the site needs neither torch nor timm."""
    code = """
import sys
sys.path.insert(0, "docs")
import hooks
hooks.complete(hooks.SETTINGS_MARKER + hooks.OPERATORS_MARKER + hooks.DOCSTRINGS_MARKER)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
