# SPDX-License-Identifier: MIT
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from namedmask import cli, config
from namedmask.errors import UserError


def test_help_imports_nothing_heavy():
    """What makes --help quick; the half second itself is measured by hand, since a timed test would fail by chance."""
    code = (
        "import sys, namedmask.cli as c\n"
        "try: c.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'timm', 'open_clip', 'scipy', 'PIL', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and "pseudolabel" in done.stdout, done.stderr


def test_doctor_names_every_kernel_and_its_backends():
    result = CliRunner().invoke(cli.app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 0
    for line in ("bilateral_solver on cpu: cpu, reference", "torch ", "C++ kernels for ", "weights"):
        assert line in result.output


def test_every_option_has_its_place_among_the_settings():
    """A renamed setting must not leave an option behind that sets nothing."""
    fields = config.RunConfig.model_fields
    for option, (*part, key) in cli.SETTINGS.items():
        owner = fields[part[0]].annotation.model_fields if part else fields
        assert key in owner, option


def test_defaults_in_the_help_are_those_of_the_settings():
    text = " ".join(CliRunner().invoke(cli.alone, ["--help"]).output.split())
    defaults = config.RunConfig(photos="photos")
    for value in (
        defaults.index.clip_model,
        defaults.archive.photos_per_category,
        defaults.detector.backbone,
        defaults.detector.features,
        defaults.detector.tau,
        defaults.detector.image_size,
        defaults.detector.precision,
        defaults.refine.name,
    ):
        assert f"(default: {value})" in text


def test_files_of_more_backbones_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = cli.settings_of({"detector": "cluster-vote", "more_backbones": "vit_a, vit_b=w/b.safetensors"})
    assert given["detector"]["more_backbones"] == ["vit_a", f"vit_b={tmp_path}/w/b.safetensors"]
    assert config.make_config({"photos": "p", **given}).detector.name == "cluster-vote"


def test_settings_survive_the_disk(tmp_path):
    given = config.make_config(
        {"photos": "/p", "categories": ["a 'b'", "ç"], "detector": {"tau": 0.25}, "index": {"embeddings": "/e"}}
    )
    config.write_config(tmp_path / "run.toml", given, {"torch": "1"})
    assert config.read_config(tmp_path / "run.toml") == given
    assert config.read_facts(tmp_path / "run.toml") == {"torch": "1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "photos: field required"),
        ({"photos": "p", "speed": 3}, "speed: extra inputs are not permitted, got 3"),
        ({"photos": "p", "detector": {"image_size": 3.5}}, "detector.image-size: input should be a valid integer"),
        (
            {"photos": "p", "detector": {"more_backbones": ["b"]}},
            "detector.more-backbones: value error, only the detector cluster-vote takes several backbones, got ['b']",
        ),
        ({"photos": "p", "archive": {"photos_per_category": 0}}, "greater than or equal to 1, got 0"),
    ],
)
def test_wrong_settings_are_named_with_what_was_expected(settings, message):
    with pytest.raises(UserError, match="wrong settings") as caught:
        config.make_config(settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["photos = ", "photos = 3", "\udcff"])
def test_a_damaged_run_toml_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "run.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        config.read_config(tmp_path / "run.toml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is missing"):
        config.read_config(tmp_path / "none" / "run.toml")
