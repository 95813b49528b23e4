# SPDX-License-Identifier: MIT
"""Commands, options and help are generated from the settings; what holds for each of them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from namedmask import cli, command_line, config, presets
from namedmask.errors import NothingUsable, UserError
from namedmask.process import Interrupted
from namedmask.record import RunRecord, StageRecord
from namedmask.stages import LABELING, STAGES

SETTINGS = list(config.settings())


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False, env={"COLUMNS": "400"})


def test_help_imports_nothing_heavy():
    """What keeps --help under half a second; the time itself is not tested, since timed tests fail by chance."""
    code = (
        "import sys, namedmask.cli as c\n"
        "try: c.app()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'timm', 'open_clip', 'scipy', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and "pseudolabel" in done.stdout, done.stderr


def test_help_is_worded_alike_in_all_commands():
    """Metavars and defaults of options that are generated from settings, and of the others; summaries on one line."""
    listed = CliRunner().invoke(cli.app, ["-h"], env={"COLUMNS": "80"}).output
    assert "..." not in listed.partition("Commands:")[2]
    group = typer.main.get_command(cli.app)
    for name, command in [*group.commands.items(), *group.commands["import"].commands.items()]:
        text = command.get_help(command.context_class(command, info_name=name, max_content_width=400))
        assert "[[" not in text and "default: True" not in text and "default: False" not in text, name
        for option in command.params:
            if option.param_type_name == "option" and not option.is_flag and not option.count:
                assert option.metavar, (name, option.name)


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
        default = command_line.option(setting).__metadata__[0].help.split("default: ")[1].rstrip("]")
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
    given = command_line.given_settings(sections, None, [f"{setting.name}={text}"], {}, {})
    made = config.make_config(config.merge({"photos": "p", "detector": detector}, given))
    value = config.flatten(made.model_dump())[setting.name]
    assert value != default or setting.name == "experts.paste_objects"
    (tmp_path / "run.toml").write_text(config.to_toml(made, {"torch": "2"}))
    again = command_line.given_settings(sections, tmp_path / "run.toml", [], {}, {})
    read = config.flatten(config.make_config(again).model_dump())
    assert read[setting.name] == value


def test_paths_of_files_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = ["detector.name=cluster-vote", "detector.more_backbones=vit_a, vit_b=w/b.safetensors"]
    given = command_line.given_settings(["detector"], None, [*pairs, "detector.weights=w"], {}, {})
    assert given["detector"]["more_backbones"] == ["vit_a", f"vit_b={tmp_path}/w/b.safetensors"]
    assert given["detector"]["weights"] == str(tmp_path / "w")
    (tmp_path / "c.toml").write_text("photos = 'p'\n[detector]\nbackbone_weights = 'b'\n")
    given = command_line.given_settings(["detector"], tmp_path / "c.toml", [], {}, {})
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
    assert command_line.read_names(tmp_path / "names.txt") == ["cat", "traffic light"]
    for text in ("", "\n \n"):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(UserError, match="no category name"):
            command_line.read_names(tmp_path / "names.txt")
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
    file = command_line.given_settings(["detector", "index"], tmp_path / "run.toml", [], {}, {})
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


# -- what each command calls -----------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The arguments of the functions that commands call, which do nothing here; the current folder is empty."""
    recorded = {}

    def record(name, result=None):
        def function(*arguments, **more):
            recorded[name] = (*arguments, more) if more else arguments
            return recorded.get(f"{name} returns", result)

        return function

    monkeypatch.chdir(tmp_path)
    for name, result in {
        "run.start": True,
        "segmenter.segment.segment_photos": (3, 0),
        "segmenter.export.export_onnx": 1.23e-7,
        "demo.run.run_demo": None,
        "evaluate.folders.evaluate_folders": "figures",
        "evaluate.folders.evaluate_segmenter": "figures",
        "evaluate.folders.print_table": None,
        "files.write_json": None,
        "evaluate.scoring.evaluate_benchmark": "figures",
        "evaluate.scoring.print_benchmark": None,
        "imports.archive.import_archive": SimpleNamespace(photos={"cat": "ab", "dog": "c" * 999}, categories=[1, 2]),
        "imports.masks.import_masks": (1234, None),
        "imports.experts.import_experts": ["a", "b"],
        "imports.embeddings.import_embeddings": 1234,
    }.items():
        module, _, function = name.rpartition(".")
        monkeypatch.setattr(f"namedmask.{module}.{function}", record(function, result))
    monkeypatch.setattr("namedmask.segmenter.predict.Segmenter.load", record("load", "segmenter"))
    monkeypatch.setattr("namedmask.distributed.count_gpus", lambda requested, workers: 0)
    (tmp_path / "photos").mkdir()
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    return recorded


def source_path(source) -> str:
    return Path(source.path).name


@pytest.mark.parametrize(
    ("words", "out", "given", "rest"),
    [
        (["run", "photos"], "run", {"photos": "photos"}, [LABELING, 1, None, False, None, False]),
        (["run", "--trace", "t"], "run", {}, [LABELING, 1, None, False, Path("t"), False]),
        (
            ["index", "photos", "--out", "o", "--workers", 1, "--gpus", 0, "--overwrite"],
            "o",
            {"photos": "photos"},
            [("index",), 1, 0, True, None, False],
        ),
        (
            ["archive", "o", "--categories-file", "names.txt", "--photos", "photos", "--gpus", 2],
            "o",
            {"categories": ["cat", "dog"], "photos": "photos"},
            [("archive",), 1, 2, False, None, False],
        ),
        (
            ["train", "o", "--workers", 3, "--seed", 4, "--update"],
            "o",
            {"segmenter": {"seed": 4}},
            [("train",), 3, None, False, None, True],
        ),
    ],
)
def test_stages_are_started(calls, words, out, given, rest, tmp_path):
    assert invoke(*words).exit_code == 0
    if "photos" in given:
        given["photos"] = str(tmp_path / "photos")
    assert list(calls["start"]) == [Path(out), given, *rest]
    calls["start returns"] = False
    assert invoke(*words).exit_code == 3


def test_presets_that_need_names_ask_for_them(calls, monkeypatch):
    monkeypatch.setattr(presets, "preset", lambda name: {"detector": {"tau": 0.5, "image_size": 480}})
    monkeypatch.setattr(presets, "needs_names", lambda name: True)
    result = invoke("run", "photos", "--preset", "p")
    assert result.exit_code == 2 and "--preset p: pass its category names as --categories-file FILE" in result.stderr
    assert invoke("run", "photos", "--preset", "p", "--categories", "cat", "--tau", 0.25).exit_code == 0
    assert calls["start"][1]["detector"] == {"tau": 0.25, "image_size": 480}
    assert invoke("pseudolabel", "o", "--preset", "p").exit_code == 0  # has no archive to retrieve
    recorded = RunRecord(stages={"archive": StageRecord({"categories": ["cat"]})})
    monkeypatch.setattr(presets, "read_record", lambda out: recorded)
    assert invoke("archive", "o", "--preset", "p").exit_code == 0  # recorded names


def test_segment_command(calls, tmp_path):
    words = ["segment", "w.pth", "photos", "--out", "out"]
    result = invoke(
        *words, "--categories", "cat,dog", "--encoder", "resnet18", "--precision", "bfloat16", "--overwrite"
    )
    assert result.exit_code == 0 and result.output == "masks and overlays are in out\n"
    more = {"categories": ["cat", "dog"], "encoder": "resnet18", "precision": "bfloat16", "overwrite": True}
    unset = {"overlays": "sample", "workers": 1, "gpus": None, "scales": [1.0], "horizontal_flip": False}
    assert calls["segment_photos"] == (Path("w.pth"), "photos", Path("out"), more | unset)
    calls["segment_photos returns"] = 0, 2
    result = invoke(*words)
    assert result.exit_code == 3 and result.output == "no photo could be segmented; 2 photos failed: out/errors.jsonl\n"
    more = {"categories": None, "encoder": "resnet50", "precision": None, "overwrite": False}
    assert calls["segment_photos"][-1] == more | unset
    calls["segment_photos returns"] = 3, 2
    result = invoke(*words, "--overlays", "none", "--workers", 2, "--gpus", 0)
    assert calls["segment_photos"][-1] == more | unset | {"overlays": "none", "workers": 2, "gpus": 0}
    assert result.output.startswith("masks are in out; 2 photos failed")
    invoke(*words, "--scales", "0.75,1", "--horizontal-flip")
    assert calls["segment_photos"][-1] == more | unset | {"scales": [0.75, 1.0], "horizontal_flip": True}
    for wrong in ("", "0,1", "5", "x"):
        result = invoke(*words, "--scales", wrong)
        assert result.exit_code == 2 and "detector.scales" in result.stderr
    calls["segment_photos returns"] = None  # not the main worker of torchrun
    result = invoke(*words)
    assert result.exit_code == 0 and not result.output
    for weights, out in (("w.pth", "."), ("photos", "photos"), ("photos", tmp_path / "photos")):
        result = invoke("segment", weights, "photos", "--out", out)
        assert result.exit_code == 2 and "holds the weights: choose another --out" in result.stderr


def test_one_source_of_names(calls, monkeypatch):
    from itertools import combinations

    sources = [["--categories", "cat"], ["--categories-file", "names.txt"], ["--preset", "p"]]
    monkeypatch.setattr(presets, "preset", lambda name: {"categories": ["a", "b"]})
    for one, other in combinations(sources, 2):
        result = invoke("evaluate", "a", "b", *one, *other)
        assert result.exit_code == 2 and "only one of them" in result.stderr
    for words, names in zip([*sources, []], (["cat"], ["cat", "dog"], ["a", "b"], None), strict=True):
        assert invoke("evaluate", "a", "b", *words).exit_code == 0
        assert calls["evaluate_folders"][2] == names
    monkeypatch.setattr(presets, "preset", lambda name: {})
    result = invoke("evaluate", "a", "b", "--preset", "p")
    assert result.exit_code == 2 and "--preset p has no category names" in result.stderr
    Path("names.txt").write_text("cat\nCat\n")
    result = invoke("evaluate", "a", "b", "--categories-file", "names.txt")
    assert result.exit_code == 2 and "--categories-file names.txt: the names 'Cat'" in result.stderr


@pytest.mark.parametrize("text", ["", " , "])
def test_no_name_is_a_mistake(calls, text):
    for words in (
        ["evaluate", "a", "b"],
        ["segment", "w.pth", "photos", "--out", "o"],
        ["export", "w", "--onnx", "f.onnx"],
        ["import", "archive", "f", "--photos", "p", "--overwrite"],
        ["import", "embeddings", "f", "--out", "o"],
        ["run", "photos"],
    ):
        result = invoke(*words, "--categories", text)
        assert result.exit_code == 2 and "--categories: no category name was given" in result.stderr, words
    assert not calls


@pytest.mark.parametrize("ignore", [None, 0, 65535])
def test_evaluate_command(calls, ignore):
    words = [] if ignore is None else ["--ignore", ignore]
    assert invoke("evaluate", "a", "b", *words).exit_code == 0
    assert calls["evaluate_folders"] == (Path("a"), Path("b"), None, ignore, False)
    assert calls["print_table"] == ("figures",) and not {"write_json", "load", "print_benchmark"} & calls.keys()
    assert invoke("evaluate", "w", "b", "--photos", "photos", "--red-green", "--json", "f.json", *words).exit_code == 0
    segmenter, source, *rest = calls["evaluate_segmenter"]
    assert (segmenter, source_path(source), rest) == ("segmenter", "photos", [Path("b"), ignore, True])
    assert calls["write_json"] == (Path("f.json"), "figures")
    assert invoke("evaluate", "a", "b", "--ignore", 65536).exit_code == 2


def test_evaluate_command_with_a_benchmark(calls, monkeypatch):
    start = ["evaluate", "--benchmark", "duts-te", "--root", "r"]
    assert invoke(*start, "--detector", "selfmask", "--tau", 0.5, "--split", "s").exit_code == 0
    benchmark, root, split, source, names, _, device = calls["evaluate_benchmark"]
    assert (benchmark, root, split, names, device) == ("duts-te", Path("r"), "s", None, "cpu")
    assert (source.detector.name, source.detector.tau, source.refine.name) == ("selfmask", 0.5, "bilateral")
    assert calls["print_benchmark"] == ("figures",) and "print_table" not in calls
    assert invoke("evaluate", "w", *start[1:], "--categories", "cat").exit_code == 0
    assert calls["evaluate_benchmark"][3:5] == (Path("w"), ["cat"])
    assert calls["evaluate_benchmark"][5](["fish"]) == "segmenter" and calls["load"][1]["categories"] == ["fish"]
    detection = {"detector": {"name": "spectral", "tau": 0.75}, "refine": {"name": "none"}, "index": {"shard_size": 7}}
    monkeypatch.setattr(presets, "preset", lambda name: detection | {"categories": ["fish"]})
    assert invoke(*start, "--preset", "p", "--tau", 0.25).exit_code == 0
    made = calls["evaluate_benchmark"][3]
    assert (made.detector.tau, made.refine.name, made.index.shard_size) == (0.25, "none", 1024)
    assert calls["evaluate_benchmark"][4] is None
    assert invoke("evaluate", "w", *start[1:], "--preset", "p").exit_code == 0
    assert calls["evaluate_benchmark"][3:5] == (Path("w"), ["fish"])
    monkeypatch.setattr(presets, "preset", lambda name: {"segmenter": {"steps": 7}})
    assert invoke(*start, "--preset", "p", "--detector", "selfmask").exit_code == 0  # it has no setting of a detector
    assert calls["evaluate_benchmark"][3].detector.name == "selfmask"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "pass PREDICTIONS and TRUTH, or a --benchmark"),
        ([], "pass PREDICTIONS and TRUTH, or a --benchmark"),
        (["a", "b", "--root", "r"], "--root requires --benchmark"),
        (["a", "b", "--split", "s"], "--split requires --benchmark"),
        (["a", "b", "--tau", "0.5"], "a detector requires --benchmark"),
        (["--benchmark", "duts-te"], "pass the folder of duts-te with --root FOLDER"),
        (["--benchmark", "duts-te", "--root", "r"], "pass PREDICTIONS, or --detector"),
        (["--benchmark", "duts-te", "--root", "r", "--tau", "0.5"], "pass PREDICTIONS, or --detector"),
        (
            ["a", "--benchmark", "duts-te", "--root", "r", "--tau", "0.5"],
            "pass PREDICTIONS or a detector with its settings",
        ),
        (["a", "b", "--benchmark", "duts-te"], "leave out TRUTH: --benchmark duts-te has its own"),
        (
            ["a", "--benchmark", "duts-te", "--photos", "p", "--ignore", "0", "--red-green"],
            "leave out --photos, --ignore, --red-green: --benchmark duts-te",
        ),
    ],
)
def test_options_of_evaluate_that_do_not_fit_together(calls, words, message):
    result = invoke("evaluate", *words)
    assert result.exit_code == 2 and message in result.stderr


def test_other_commands(calls):
    result = invoke("export", "w", "--onnx", "f.onnx", "--categories", "cat", "--encoder", "resnet18")
    assert result.output == "f.onnx: onnxruntime's logits differ from torch's by at most 1e-07 of the largest\n"
    assert calls["load"] == (Path("w"), {"categories": ["cat"], "encoder": "resnet18"})
    assert calls["export_onnx"] == ("segmenter", Path("f.onnx"))
    assert invoke("demo").exit_code == 0 and calls["run_demo"] == (Path("namedmask-demo"), {"overwrite": False})
    assert invoke("demo", "--out", "d", "--overwrite").exit_code == 0
    assert calls["run_demo"] == (Path("d"), {"overwrite": True})


def test_import_commands(calls):
    result = invoke("import", "archive", "f", "--photos", "p", "--categories", "cat,dog")
    assert result.output == "1,001 photos of 2 categories in run/archive.json\n"
    assert calls["import_archive"] == (Path("f"), "p", Path("run"), ["cat", "dog"], False)
    result = invoke("import", "masks", "f", "--out", "o", "--overwrite")
    assert result.output == "1,234 masks in o/masks\n"
    assert calls["import_masks"] == (Path("f"), Path("o"), None, True)
    result = invoke("import", "experts", "f", "--out", "o")
    assert result.output == "2 networks in o/experts; `namedmask experts o` relabels with them\n"
    assert calls["import_experts"] == (Path("f"), Path("o"), "resnet50", False)
    result = invoke(
        "import", "embeddings", "f", "--out", "o", "--categories", "cat", "--clip-model", "m", "--allow-pickle"
    )
    assert result.output == "o: embeddings of 1,234 photos and 1 category\n"
    path, out, photos, names, index, allow_pickle, overwrite = calls["import_embeddings"]
    assert (path, out, photos, names, allow_pickle, overwrite) == (Path("f"), Path("o"), None, ["cat"], True, False)
    assert index.clip_model == "m" and index.clip_weights is None
    result = invoke("import", "embeddings", "f", "--out", "o", "--clip-weights", "w", "--overwrite")
    assert result.output.endswith("photos and no category; pass --categories to add their text embeddings\n")
    assert calls["import_embeddings"][3] == [] and calls["import_embeddings"][4].clip_weights.endswith("/w")
    assert calls["import_embeddings"][5:] == (False, True)


def test_presets_command():
    lines = invoke("presets").output.splitlines()
    assert len(lines) == len(presets.PRESETS) and all(line[28] == " " != line[29] for line in lines)
    name = next(iter(presets.PRESETS))
    assert "[detector]" in invoke("presets", name).output


def test_fetch_trains_the_same_models_unless_told(monkeypatch):
    """The encoder of the experts is that of the segmenter, SelfMask's backbone that of the detector."""
    made = []
    monkeypatch.setattr("namedmask.hub.needed", lambda given, stages: made.append((given, stages)) or [])
    assert invoke("fetch", "--encoder", "e", "--set", "detector.backbone=b", "--clip-model", "m").exit_code == 0
    given, stages = made[0]
    assert (given.experts.encoder, given.segmenter.encoder, given.saliency.backbone) == ("e", "e", "b")
    assert given.index.clip_model == "m" and stages is STAGES
    assert invoke("fetch", "--encoder", "e", "--set", "experts.encoder=x").exit_code == 0
    assert (made[1][0].experts.encoder, made[1][0].segmenter.encoder) == ("x", "e")


def test_errors_with_debug_are_raised(monkeypatch):
    for error in (UserError("a"), RuntimeError("b")):
        monkeypatch.setattr("namedmask.doctor.examine", lambda error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            invoke("doctor", "--debug")
    monkeypatch.setattr("namedmask.doctor.examine", lambda: (_ for _ in ()).throw(MemoryError()))
    result = invoke("doctor")
    assert result.exit_code == 2 and "out of memory" in result.stderr
    monkeypatch.setattr("namedmask.doctor.examine", lambda: (_ for _ in ()).throw(OSError("no address")))
    result = invoke("doctor")
    assert result.exit_code == 2 and result.stderr == "namedmask: OSError: no address (--debug shows where)\n"


def test_interrupted_command_continues_without_overwrite(calls, monkeypatch):
    monkeypatch.setattr("namedmask.run.start", lambda *_: (_ for _ in ()).throw(Interrupted()))
    assert "run the same command again to continue" in invoke("train", "o").stderr
    assert "run the same command without --overwrite to continue" in invoke("train", "o", "--overwrite").stderr


def test_commands_without_arguments_show_their_help():
    for words in ([], ["import"]):
        result = CliRunner().invoke(cli.app, words, prog_name="namedmask")
        assert result.exit_code == 2 and "Usage: namedmask" in result.output and "namedmask: " not in result.stderr
    result = CliRunner().invoke(cli.app, ["segment"], prog_name="namedmask")
    assert result.exit_code == 2
    assert result.stderr.startswith("namedmask: missing argument 'WEIGHTS' (see `namedmask segment --help`)")
    result = CliRunner().invoke(cli.app, ["convert", "run", "--out", "o"], prog_name="namedmask")
    assert "missing option '--to'. Choose from: coco, yolo-seg, " in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("index.clip_weights", ""),
        ("detector.tau", " [-1<=x<=1; default: 0.2]"),
        ("detector.horizontal_flip", " [default: false]"),
        ("detector.more_backbones", ""),
        ("segmenter.scale", " [default: 0.1,1.0]"),
        ("segmenter.seed", " [0<=x<=4294967295; default: 0]"),
    ],
)
def test_notes_of_options(name, note):
    one = config.find_setting(name)
    option = command_line.option(one).__metadata__[0]
    assert option.help == one.field.description + note
    flag = "--horizontal-flip/--no-horizontal-flip" if one.kind is bool else one.flag
    assert [option.default, *option.param_decls] == [flag]
