# SPDX-License-Identifier: MIT
"""tools/gpu_check.py: goes on after failures and time limits, and reports what each part has said."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"
BENCHMARK = {"benchmarks": [{"fullname": "b", "stats": {"median": 0.5}, "extra_info": {"photos/s": 7}}]}
JUNIT = """<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">
<testcase classname="t" name="a"/><testcase classname="t" name="b"><failure/></testcase></testsuite></testsuites>"""


def load_tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", tool)
    spec.loader.exec_module(tool)
    return tool


def test_parts_that_fail_or_take_too_long_do_not_end_the_check(monkeypatch, tmp_path, capsys):
    tool = load_tool(monkeypatch)

    def part(name, script, limit=60.0):
        return tool.Part(name, limit, ("sh", "-c", script))

    (tmp_path / "measured").write_text(json.dumps(BENCHMARK))
    (tmp_path / "tested").write_text(JUNIT)
    parts = [
        part("slow", "echo begun; sleep 60 & wait", 0.3),
        part("interrupted", f"trap 'cp {tmp_path}/measured {{json}}' INT; sleep 60 & wait", 3),
        part("failing", f"cp {tmp_path}/tested {{junit}}; echo why >&2; exit 3"),
        part("passing", f"cp {tmp_path}/measured {{json}}; echo table > {{results}}"),
    ]
    (tmp_path / "slow.json").write_text(json.dumps(BENCHMARK))  # of an earlier run
    assert not tool.check(parts, tmp_path, {"device": "none"})
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"] == "none" and list(report["parts"]) == ["slow", "interrupted", "failing", "passing"]
    slow, interrupted, failing, passing = report["parts"].values()
    assert slow["outcome"] == "stopped after 0 s" and slow["seconds"] < 30 and "figures" not in slow
    assert interrupted["outcome"] == "stopped after 3 s" and interrupted["figures"] == [{"photos/s": 7}]
    assert failing["outcome"] == "exit code 3" and failing["failed"] == ["t::b"] and failing["tests"] == 2
    assert passing["outcome"] == "passed" and passing["figures"] == [{"photos/s": 7}]
    assert passing["medians, ms"] == {"b": 500}
    assert (tmp_path / "slow.txt").read_text() == "begun\n" and (tmp_path / "failing.txt").read_text() == "why\n"
    assert (tmp_path / "tables.md").read_text() == "table\n"
    assert tool.check(parts[3:], tmp_path, {}) and not tool.check(parts[3:], tmp_path, {}, limit=0)
    assert "not run" in capsys.readouterr().out


def test_an_interrupted_bench_keeps_what_was_measured_before(tmp_path):
    for name in ("conftest.py", "common.py"):
        shutil.copy(TOOL.parents[1] / "bench" / name, tmp_path)
    (tmp_path / "test_benches.py").write_text(
        "import os, signal\n"
        "def test_fast(benchmark): benchmark(len, ())\n"
        "def test_interrupted(benchmark): benchmark.pedantic(os.kill, (os.getpid(), signal.SIGINT))\n"
    )
    command = [sys.executable, "-m", "pytest", tmp_path, "-p", "no:cacheprovider"]
    command += ["--benchmark-json=a.json", "--results=a.md"]
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  ignored in background jobs
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=tmp_path, env=own, preexec_fn=restore, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout  # interrupted
    (measured,) = json.loads((tmp_path / "a.json").read_text())["benchmarks"]
    assert measured["name"] == "test_fast" and (tmp_path / "a.md").exists()


def test_every_file_that_the_check_runs_exists(monkeypatch):
    tool = load_tool(monkeypatch)
    words = {word for part in (*tool.ON_GPU, *tool.ON_CPU) for word in part.command}
    paths = {word for word in words if word.startswith(("bench/", "tests/"))}
    assert paths and all((TOOL.parents[1] / path).exists() for path in paths)
    assert sum(part.limit for part in tool.ON_GPU[:5]) <= tool.LIMIT  # the engine and the tests of the kernels
