# SPDX-License-Identifier: MIT
"""Commands, options and help are generated from the settings; what holds for each of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from namedmask import cli, config
from namedmask.errors import NothingUsable, UserError
from namedmask.process import Interrupted
from namedmask.stages import STAGES

SETTINGS = list(config.settings())


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False, env={"COLUMNS": "400"})


def test_help_imports_nothing_heavy():
    """What keeps --help under half a second; the time itself is not tested, since timed tests fail by chance."""
    code = (
        "import sys, namedmask.cli as c\n"
        "try: c.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'timm', 'open_clip', 'scipy', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and "pseudolabel" in done.stdout, done.stderr


def test_doctor_names_every_kernel_and_its_backends():
    result = invoke("doctor")
    assert result.exit_code == 0
    for line in ("bilateral_solver on cpu: cpu, reference", "torch ", "C++ kernels for ", "weights"):
        assert line in result.output


def test_short_help_version_and_similar_commands():
    assert invoke("-h").output == invoke("--help").output
    assert invoke("--version").output.startswith("namedmask ")
    assert "Did you mean 'train'" in invoke("trian").stderr
    assert "--steps" in invoke("train", "run", "--stpes", 3).stderr


def test_namedmask_pseudolabel_is_namedmask_run():
    words = [line.split()[0] for line in invoke("run", "-h").output.splitlines() if line.strip().startswith("--")]
    alone = CliRunner().invoke(cli.pseudolabel_app, ["-h"], env={"COLUMNS": "400"}).output
    assert words and all(word in alone for word in words)


@pytest.mark.parametrize("setting", [one for one in SETTINGS if one.flag], ids=lambda one: one.name)
def test_every_flag_is_in_the_help_of_its_command(setting):
    (stage,) = [s for s in STAGES.values() if setting.name.split(".")[0] in s.sections]
    lines = " ".join(invoke(stage.name, "-h").output.split())
    at = lines.index(f"{setting.flag} " if setting.kind is not bool else f"{setting.flag} / ")
    shown = lines[at:].split(" --")[0] if setting.kind is not bool else lines[at:]
    assert setting.field.description in shown and setting.limits in shown
    if setting.field.default not in (None, []):
        default = cli._option(setting).__metadata__[0].help.split("default: ")[1].rstrip("]")
        assert f"default: {default}]" in shown
        if setting.kind is not bool:
            assert setting.parse(default) == setting.field.default


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=lambda one: one.name)
def test_set_and_config_reach_every_setting(setting, tmp_path):
    """A value other than the default, as text and in a file: it ends in the settings of a run."""
    default = setting.field.default
    other = {
        "categories": "cat,dog", "detector.more_backbones": "a,b=w", "index.embeddings": "e.safetensors",
        "experts.paste_objects": "0,0", "refine.crf.confidence": "0.7",
    }  # fmt: skip
    if setting.name in other:
        text = other[setting.name]
    elif setting.choices:
        text = next(choice for choice in setting.choices if choice != default)
    elif isinstance(default, bool):
        text = str(not default).lower()
    elif isinstance(default, (list, tuple)):
        text = ",".join(str(value / 2 if isinstance(value, float) else value + 1) for value in default) or "1.5"
    elif isinstance(default, float):
        text = str(default / 2 + 0.25 * (default in (0.0, 1.0)))
    elif isinstance(default, int):
        text = str(default + 1)
    else:
        text = "something" if default is None and not setting.name.endswith("steps") else "17"
    sections = [setting.name.split(".")[0]]
    detector = {"name": "cluster-vote"} if setting.name == "detector.more_backbones" else {}
    given = cli.given_settings(sections, None, [f"{setting.name}={text}"], {})
    made = config.make_config(config.merge({"photos": "p", "detector": detector}, given))
    value = config.flatten(made.model_dump())[setting.name]
    assert value != default or setting.name == "experts.paste_objects"
    (tmp_path / "run.toml").write_text(config.to_toml(made, {"torch": "2"}))
    again = cli.given_settings(sections, tmp_path / "run.toml", [], {})
    read = config.flatten(config.make_config(again).model_dump())
    assert read[setting.name] == value


def test_paths_of_files_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = ["detector.name=cluster-vote", "detector.more_backbones=vit_a, vit_b=w/b.safetensors"]
    given = cli.given_settings(["detector"], None, [*pairs, "detector.weights=w"], {})
    assert given["detector"]["more_backbones"] == ["vit_a", f"vit_b={tmp_path}/w/b.safetensors"]
    assert given["detector"]["weights"] == str(tmp_path / "w")
    (tmp_path / "c.toml").write_text("photos = 'p'\n[detector]\nbackbone_weights = 'b'\n")
    given = cli.given_settings(["detector"], tmp_path / "c.toml", [], {})
    assert given == {"photos": str(tmp_path / "p"), "detector": {"backbone_weights": str(tmp_path / "b")}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "photos: required"),
        ({"photos": "p", "speed": 3}, "there is no setting 'speed'"),
        ({"photos": "p", "detector": {"taus": 0.1}}, "no setting 'detector.taus'; did you mean 'detector.tau'?"),
        (
            {"photos": "p", "detector": {"image_size": 3.5}},
            "(--image-size): expected a valid integer, got",
        ),
        (
            {"photos": "p", "detector": {"more_backbones": ["b"]}},
            "(--more-backbones): only the detector cluster-vote takes several backbones, got ['b']",
        ),
        (
            {"photos": "p", "archive": {"photos_per_category": 0}},
            "(--photos-per-category): expected at least 1, got 0",
        ),
        (
            {"photos": "p", "saliency": {"scale": (1.0, 0.5)}},
            "saliency.scale (--scale): expected two numbers, low and high, from 0.001 to 1, got",
        ),
    ],
)
def test_wrong_settings_are_named_with_what_was_expected(values, message):
    with pytest.raises(UserError, match="wrong settings") as caught:
        config.make_config(values)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"photos = ", b"photos = 3", b"\xff", None])
def test_a_damaged_config_file_is_one_line(tmp_path, content):
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.read_settings(file)
    assert "\n" not in str(caught.value)


def test_categories_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffcat\n\n traffic light \n")
    assert cli.read_names(tmp_path / "names.txt") == ["cat", "traffic light"]
    for text in ("", "\n \n"):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(UserError, match="no category name"):
            cli.read_names(tmp_path / "names.txt")
    both = ["archive", tmp_path, "--categories", "a", "--categories-file", tmp_path / "names.txt"]
    result = invoke(*both)
    assert result.exit_code == 2 and "not both" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell):
    program = Path(sys.executable).with_name("namedmask")
    if not program.exists():
        pytest.skip("the command is not installed beside this Python")
    environment = {**os.environ, "_NAMEDMASK_COMPLETE": f"source_{shell}"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "namedmask" in done.stdout


def test_run_toml_resets_what_its_run_has_not_set(tmp_path):
    """TOML has no null. The settings of another run are all of its settings."""
    (tmp_path / "run.toml").write_text(config.to_toml(config.RunConfig(photos="p")))
    file = cli.given_settings(["detector", "index"], tmp_path / "run.toml", [], {})
    recorded = {"photos": "p", "detector": {"weights": "/x"}, "index": {"embeddings": "/e"}}
    merged = config.make_config(config.merge(recorded, file))
    assert merged.detector.weights is None and merged.index.embeddings is None
    assert config.find_setting("detector.weights").parse("") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pseudolabel", "x", "--tua", "1"], "(see `namedmask pseudolabel --help`)"),
        (["segmnet"], "(see `namedmask --help`)"),
    ],
)
def test_errors_of_the_command_line_name_the_command(words, message):
    result = CliRunner().invoke(cli.app, words, prog_name="namedmask")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a file is missing"), 2, "a file is missing"),
        (NothingUsable("no photo"), 3, "no photo"),
        (OSError(13, "Permission denied", "x"), 2, "Permission denied"),
        (RuntimeError("odd"), 1, "RuntimeError: odd (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue"),
        (Interrupted(15), 143, "ended by SIGTERM; run the same command again to continue"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_one_line_and_an_exit_code(error, code, message, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr("namedmask.doctor.examine", fail)
    result = invoke("doctor")
    assert result.exit_code == code and result.stderr.count("\n") == 1 and message in result.stderr


def test_switches_can_be_turned_off(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("namedmask.run.start", lambda out, values, *_: given.update(values) or True)
    assert invoke("pseudolabel", tmp_path, "--no-fill-holes", "--largest-component").exit_code == 0
    assert given == {"refine": {"fill_holes": False, "largest_component": True}}


def test_names_given_twice_are_rejected_except_for_benchmarks(tmp_path):
    """Two names of ImageNet-S occur twice."""
    names = ["--categories", "crane,crane"]
    result = invoke("evaluate", tmp_path, tmp_path, *names)
    assert result.exit_code == 2 and "crane" in result.stderr and "no such" not in result.stderr
    result = invoke("evaluate", tmp_path, "--benchmark", "imagenet-s50", "--root", tmp_path, *names)
    assert result.exit_code == 2 and "crane" not in result.stderr


@pytest.mark.parametrize(("stage", "takes_photos"), [("index", True), ("archive", False)])
def test_photos_in_a_file_of_settings_are_those_of_a_new_run_alone(stage, takes_photos, tmp_path, monkeypatch):
    (tmp_path / "run.toml").write_text(f'photos = "{tmp_path}"\n')
    given = {}
    monkeypatch.setattr("namedmask.run.start", lambda out, values, *_: given.update(values) or True)
    words = [stage, "--out", tmp_path / "out"] if takes_photos else [stage, tmp_path / "out"]
    assert invoke(*words, "--config", tmp_path / "run.toml").exit_code == 0
    assert given == ({"photos": str(tmp_path)} if takes_photos else {})
